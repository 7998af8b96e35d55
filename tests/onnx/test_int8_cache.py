"""Keys and values in 8 bits: what the scales promise, at every position and in every way a cache is read."""

import json

import numpy as np
import onnx
import pytest
import torch

from qbl_trl import export_onnx
from qbl_trl.errors import ConfigError, ExportError
from qbl_trl.onnx.choices import subgraphs
from qbl_trl.onnx.int8_cache import _spread_over_pairs
from qbl_trl.onnx.session import OnnxLogits
from tests.onnx.models import merged_llama, operators, padded_batch
from tests.onnx.test_runtimes import ARCHITECTURES, both_generate, build
from tests.tiny import tiny_gpt2, tiny_llama, tokens

FP32 = 5e-6  # sums are taken in different orders; logits of the tiny models are below 1
FUSED = [name for name, row in ARCHITECTURES.items() if row[2] == "gqa"]


def scales(folder):
    """By the name of a cache's input, its scales (1, heads, 1, features)."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    made = {weight.name: onnx.numpy_helper.to_array(weight) for weight in graph.initializer if "past" in weight.name}
    return {name.removesuffix(".scale"): array for name, array in made.items() if name.endswith(".scale")}


def test_rotation_stays_inside_the_range_of_a_pair():
    width, values = 8, np.random.default_rng(0).standard_normal((2, 3, 5, 12)).astype(np.float32)
    ranges = _spread_over_pairs(values, width).max((0, 2))
    first, second = values[..., : width // 2], values[..., width // 2 : width]
    for angle in np.linspace(0, 2 * np.pi, 17):
        c, s = np.cos(angle), np.sin(angle)
        turned = np.concatenate([c * first - s * second, s * first + c * second, values[..., width:]], -1)
        assert (np.abs(turned).max((0, 2)) <= ranges * (1 + 1e-6)).all()
    np.testing.assert_array_equal(ranges[:, width:], np.abs(values[..., width:]).max((0, 2)))


@pytest.mark.parametrize("case", FUSED)
def test_the_cache_is_the_rounded_one_of_the_float_graph(tmp_path, case):
    kind, settings, _ = ARCHITECTURES[case]
    model, ids = build(kind, settings), tokens()
    mask = torch.ones_like(ids)
    export_onnx(model, tmp_path / "float", attention="gqa")
    report = export_onnx(model, tmp_path / "int8", kv_cache_dtype="int8", calibration=[ids])
    assert (report.attention, report.kv_cache_dtype) == ("gqa", "int8")
    whole, quantized = (OnnxLogits(tmp_path / name) for name in ("float", "int8"))
    expected, wanted = whole.step(ids, mask, whole.empty_cache(2))
    found, cache = quantized.step(ids, mask, quantized.empty_cache(2))
    torch.testing.assert_close(found, expected, rtol=0, atol=FP32)  # a text from its beginning attends in float32
    for name, scale in scales(tmp_path / "int8").items():
        assert cache[name].dtype == np.int8
        assert (np.abs(cache[name] * scale - wanted[name]) <= scale * 0.5 + FP32).all()


@pytest.mark.parametrize("case", FUSED)
def test_steps_are_those_of_the_float_graph_over_the_same_values(tmp_path, case):
    """The oracle: the float graph, whose past is the 8-bit one times its scales."""
    kind, settings, _ = ARCHITECTURES[case]
    model, (ids, mask) = build(kind, settings), padded_batch()
    export_onnx(model, tmp_path / "float", attention="gqa")
    export_onnx(model, tmp_path / "int8", kv_cache_dtype="int8", calibration=[tokens(8, 16)])
    whole, quantized = (OnnxLogits(tmp_path / name) for name in ("float", "int8"))
    for more in (1, 3):
        _, cache = quantized.step(ids, mask, quantized.empty_cache(2))
        past = {name: (cache[name] * scale).astype(np.float32) for name, scale in scales(tmp_path / "int8").items()}
        added, longer = tokens(2, more, seed=1), torch.ones(2, ids.shape[1] + more, dtype=torch.long)
        longer[:, : ids.shape[1]] = mask
        expected, _ = whole.step(added, longer, past)
        found, _ = quantized.step(added, longer, cache)
        # The new keys and values are rounded too, by up to 1/254 of their range, in two layers, before experts choose.
        torch.testing.assert_close(found, expected, rtol=0, atol=float(expected.abs().max()) / 30)


@pytest.mark.parametrize("levels", [(None, None), (4, None), (4, 0)])
@pytest.mark.parametrize("logits", ["all", "last"])
def test_a_buffer_gives_what_a_growing_cache_gives(tmp_path, levels, logits):
    options = dict(zip(("accuracy_level", "prompt_accuracy_level"), levels, strict=True), logits=logits)
    report = export_onnx(merged_llama(), tmp_path / "out", kv_cache_dtype="int8", **options)
    assert report.parity_as_written is not None
    onnx.checker.check_model(str(tmp_path / "out" / "model.onnx"), full_check=True)
    graph, (ids, mask) = OnnxLogits(tmp_path / "out"), padded_batch()
    torch.testing.assert_close(graph.with_cache(ids, mask, 4, 20), graph.with_cache(ids, mask, 4), rtol=0, atol=FP32)
    written = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert written["model"]["decoder"]["filename"] == "model.onnx"
    assert written["search"]["past_present_share_buffer"]


def test_steps_choose_nothing_where_prompts_have_a_level(tmp_path):
    export_onnx(merged_llama(), tmp_path / "out", kv_cache_dtype="int8", accuracy_level=4, prompt_accuracy_level=0)
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    branches = {part.name: [node.op_type for node in part.node] for node in graph.node for part in subgraphs(node)}
    assert "If" not in branches["steps"]
    assert branches["prompts"].count("If") == branches["steps"].count("GroupQueryAttention") == 2
    assert [file.name for file in (tmp_path / "out").glob("*.onnx")] == ["model.onnx"]


@pytest.mark.parametrize("case", ["llama", "qwen3 with its own head size", "phi3 with joined projections"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_optimum_generates_over_it(tmp_path, case, settings):
    model = build(*ARCHITECTURES[case][:2])
    export_onnx(model, tmp_path / "out", kv_cache_dtype="int8")
    expected, found = both_generate(model, tmp_path / "out", **settings)
    # Random weights have close seconds, so that rounding may tip a token; most stay.
    assert (expected == found).float().mean() > 0.75


def test_the_report_says_what_rounding_costs(tmp_path):
    report = export_onnx(merged_llama(), tmp_path / "out", kv_cache_dtype="int8")
    assert report.parity.max_abs_difference < FP32
    assert 0 < report.parity_as_written.max_abs_difference < 0.05
    assert "attention: gqa, cache in int8" in str(report)


def test_texts_of_the_caller_set_the_scales(tmp_path):
    text = [{"input_ids": tokens(1, 12), "attention_mask": torch.ones(1, 12)}, tokens(1, 7, seed=3)]
    for name, calibration in (("own", None), ("given", text), ("again", iter(text))):
        export_onnx(merged_llama(), tmp_path / name, kv_cache_dtype="int8", calibration=calibration)
    own, given, again = (scales(tmp_path / name) for name in ("own", "given", "again"))
    for name, scale in given.items():
        assert scale.shape == (1, 2, 1, 16)
        assert not np.allclose(scale, own[name])
        np.testing.assert_array_equal(scale, again[name])


def test_a_feature_that_is_always_zero_has_a_scale(tmp_path):
    model = tiny_llama()
    model.model.layers[0].self_attn.v_proj.weight.data[:16] = 0
    export_onnx(model, tmp_path / "out", kv_cache_dtype="int8")
    assert (scales(tmp_path / "out")["past_key_values.0.value"] > 0).all()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kv_cache_dtype": "int4"}, "kv_cache_dtype='int4' is not known; allowed: None, int8"),
        ({"kv_cache_dtype": "int8", "provider": "cuda"}, "not for float16 on cuda"),
        ({"kv_cache_dtype": "int8", "dtype": "float16"}, "not for float16 on cpu"),
        ({"kv_cache_dtype": "int8", "attention": "standard"}, "attention='standard'"),
        ({"calibration": [tokens()]}, 'calibration is for kv_cache_dtype="int8"'),
    ],
)
def test_what_does_not_go_together_is_refused_before_work_starts(tmp_path, settings, said):
    with pytest.raises(ExportError, match=said):
        export_onnx(merged_llama(), tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("batch", [torch.ones(3), torch.ones(2, 0, dtype=torch.long), {"labels": tokens()}])
def test_a_calibration_that_is_no_text_is_refused(tmp_path, batch):
    with pytest.raises(ConfigError, match="token ids"):
        export_onnx(merged_llama(), tmp_path / "out", kv_cache_dtype="int8", calibration=[batch])


def test_a_model_without_the_operator_is_refused(tmp_path):
    with pytest.raises(ExportError, match="needs GroupQueryAttention, which does not fit this model"):
        export_onnx(tiny_llama(hidden_size=40, num_attention_heads=4), tmp_path / "out", kv_cache_dtype="int8")
    assert not (tmp_path / "out").exists()


def test_heads_that_share_no_keys_have_one_too(tmp_path):
    export_onnx(tiny_gpt2(), tmp_path / "out", kv_cache_dtype="int8")
    assert operators(tmp_path / "out").count("If") == 2
