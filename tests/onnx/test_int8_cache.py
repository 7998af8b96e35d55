"""Keys and values in 8 bits: what the scales promise, at every position and in every way a cache is read."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers

from qbl_trl import export_onnx, verify
from qbl_trl.errors import ConfigError, ExportError
from qbl_trl.onnx import making
from qbl_trl.onnx.protos import subgraphs
from qbl_trl.onnx.ranges import draw, measured, spread_over_pairs, write_text
from qbl_trl.onnx.session import OnnxLogits
from qbl_trl.parity import positions
from tests.onnx.architectures import ARCHITECTURES, FUSED, GATED, build
from tests.onnx.models import both_generate, greedy, merged_llama, operators, ort_model, padded_batch
from tests.tiny import logits, tiny_gpt2, tiny_llama, tokens

FP32 = 5e-6  # sums are taken in different orders; logits of the tiny models are below 1


def scales(folder):
    """By the name of a cache's input, its scales (1, heads, 1, features)."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    made = {weight.name: onnx.numpy_helper.to_array(weight) for weight in graph.initializer if "past" in weight.name}
    return {name.removesuffix(".scale"): array for name, array in made.items() if name.endswith(".scale")}


@pytest.mark.parametrize("neighbours", [False, True])
def test_rotation_stays_inside_the_range_of_a_pair(neighbours):
    width, values = 8, np.random.default_rng(0).standard_normal((2, 3, 5, 12)).astype(np.float32)
    ranges = spread_over_pairs(values, width, neighbours).max((0, 2))
    one, other = (np.s_[:width:2], np.s_[1:width:2]) if neighbours else (np.s_[: width // 2], np.s_[width // 2 : width])
    first, second, turned = values[..., one], values[..., other], values.copy()
    for angle in np.linspace(0, 2 * np.pi, 17):
        c, s = np.cos(angle), np.sin(angle)
        turned[..., one], turned[..., other] = c * first - s * second, s * first + c * second
        assert (np.abs(turned).max((0, 2)) <= ranges * (1 + 1e-6)).all()
    np.testing.assert_array_equal(ranges[:, width:], np.abs(values[..., width:]).max((0, 2)))


PARTIAL = ("Phi3", {**GATED, "partial_rotary_factor": 0.5, "num_attention_heads": 2}, "gqa")


@pytest.mark.parametrize("case", ["llama", "phi3 with partial rotary", "ernie with pairs of neighbours"])
def test_keys_fit_at_positions_that_were_not_measured(tmp_path, case, monkeypatch):
    kind, settings, _ = ARCHITECTURES.get(case, PARTIAL)
    export_onnx(build(kind, {**settings, "max_position_embeddings": 512}), tmp_path / "out", attention="gqa")
    graph, ids = OnnxLogits(tmp_path / "out"), tokens()
    mask = torch.ones_like(ids)
    ranges, _ = measured(tmp_path / "out", transformers.AutoConfig.from_pretrained(tmp_path / "out"), 512, [ids])
    for far in (7, 100, 400):
        monkeypatch.setattr("qbl_trl.onnx.session.positions", lambda mask, far=far: positions(mask) + far)
        _, cache = graph.step(ids, mask, graph.empty_cache(2))
        for name, values in cache.items():
            assert (np.abs(values).max((0, 2)) <= ranges[name] * 1.001 + FP32).all()


@pytest.mark.parametrize("case", FUSED)
def test_the_cache_is_the_rounded_one_of_the_float_graph(exported, case):
    made, ids = exported(case, kv_cache_dtype="int8"), tokens()
    mask = torch.ones_like(ids)
    assert (made.report.attention, made.report.kv_cache_dtype) == ("gqa", "int8")
    whole, quantized = OnnxLogits(exported(case).folder), OnnxLogits(made.folder)
    expected, wanted = whole.step(ids, mask, whole.empty_cache(2))
    found, cache = quantized.step(ids, mask, quantized.empty_cache(2))
    torch.testing.assert_close(found, expected, rtol=0, atol=FP32)  # a text from its beginning attends in float32
    for name, scale in scales(made.folder).items():
        assert cache[name].dtype == np.int8
        assert (np.abs(cache[name] * scale - wanted[name]) <= scale * 0.5 + FP32).all()


@pytest.mark.parametrize("case", FUSED)
def test_steps_are_those_of_the_float_graph_over_the_same_values(exported, case):
    """The oracle: the float graph, whose past is the 8-bit one times its scales."""
    folder, (ids, mask) = exported(case, kv_cache_dtype="int8").folder, padded_batch()
    whole, quantized = OnnxLogits(exported(case).folder), OnnxLogits(folder)
    for more in (1, 3):
        _, cache = quantized.step(ids, mask, quantized.empty_cache(2))
        past = cache | {name: (cache[name] * scale).astype(np.float32) for name, scale in scales(folder).items()}
        added, longer = tokens(2, more, seed=1), torch.ones(2, ids.shape[1] + more, dtype=torch.long)
        longer[:, : ids.shape[1]] = mask
        expected, wanted = whole.step(added, longer, past)
        found, present = quantized.step(added, longer, cache)
        # The new keys and values are rounded too, by up to 1/254 of their range, in two layers: of 8 tokens, one may
        # ask another expert, or meet a norm that makes much of a small output of attention (OLMo).
        far = (found - expected).abs().amax(-1) > expected.abs().max() / 30
        assert far.sum() <= ("expert" in case or "moe" in case or "olmo" in case)
        for name in list(scales(folder))[:2]:  # of the first layer, which no rounding precedes
            scale = scales(folder)[name]
            inside = np.clip(wanted[name], -128 * scale, 127 * scale)
            assert (np.abs(present[name] * scale - inside) <= scale * 0.5 + FP32).all()


@pytest.mark.parametrize("levels", [(None, None), (4, None), (4, 0)])
@pytest.mark.parametrize("answers", ["all", "last"])
def test_a_buffer_gives_what_a_growing_cache_gives(tmp_path, levels, answers):
    options = dict(zip(("accuracy_level", "prompt_accuracy_level"), levels, strict=True), logits=answers)
    report = export_onnx(merged_llama(), tmp_path / "out", kv_cache_dtype="int8", **options)
    assert report.parity_as_written is not None
    onnx.checker.check_model(str(tmp_path / "out" / "model.onnx"), full_check=True)
    graph, (ids, mask) = OnnxLogits(tmp_path / "out"), padded_batch()
    torch.testing.assert_close(graph.with_cache(ids, mask, 4, 20), graph.with_cache(ids, mask, 4), rtol=0, atol=FP32)
    written = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert written["model"]["decoder"]["filename"] == "model_genai.onnx"
    assert written["search"]["past_present_share_buffer"]


def test_steps_choose_nothing_where_prompts_have_a_level(tmp_path):
    export_onnx(merged_llama(), tmp_path / "out", kv_cache_dtype="int8", accuracy_level=4, prompt_accuracy_level=0)
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    branches = {part.name: [node.op_type for node in part.node] for node in graph.node for part in subgraphs(node)}
    assert "If" not in branches["steps"]
    assert branches["prompts"].count("If") == branches["steps"].count("GroupQueryAttention") == 2


CHAINS = ["llama", "qwen3 with its own head size", "phi3 with joined projections"]


@pytest.mark.parametrize("case", CHAINS)
def test_optimum_generates_what_the_graph_says_step_by_step(exported, case):
    made = exported(case, kv_cache_dtype="int8")
    found = ort_model(made.folder)
    ids, mask = padded_batch()
    settings = {"attention_mask": mask, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    assert torch.equal(found.generate(ids, **settings), greedy(made.folder, ids, mask, 8))


@pytest.mark.parametrize("case", CHAINS)
def test_optimum_searches_beams_over_it(exported, case):
    made = exported(case, kv_cache_dtype="int8")
    expected, found = (texts[:, 9:] for texts in both_generate(made.model, made.folder, num_beams=2))
    # Beams of random weights are close to each other, and rounding may tip one.
    assert (expected == found).float().mean() >= 0.5


def test_past_and_present_may_be_one_buffer(tmp_path):
    export_onnx(merged_llama(), tmp_path / "out", kv_cache_dtype="int8")
    graph, (ids, mask) = OnnxLogits(tmp_path / "out"), padded_batch()
    expected = graph.with_cache(ids, mask, 4, 20)
    kept = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in graph.empty_cache(2, 20).items()}
    found = []
    for start, stop in [(0, 4), *((end - 1, end) for end in range(5, 10))]:
        binding = graph.session.io_binding()
        binding.bind_cpu_input("input_ids", ids[:, start:stop].contiguous().numpy())
        binding.bind_cpu_input("attention_mask", mask[:, :stop].contiguous().numpy())
        binding.bind_cpu_input("position_ids", positions(mask[:, :stop])[:, start:].contiguous().numpy())
        for name, buffer in kept.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
        binding.bind_output("logits")
        graph.session.run_with_iobinding(binding)
        found.append(torch.from_numpy(binding.get_outputs()[-1].numpy()))
    assert torch.equal(torch.cat(found, 1), expected)


def test_a_text_of_one_token_and_digits_go_with_it(tmp_path):
    for name, options in (("factored", {"lowering": "factored"}), ("digits", {"accuracy_level": 4})):
        export_onnx(merged_llama(), tmp_path / name, kv_cache_dtype="int8", **options)
        graph, ids = OnnxLogits(tmp_path / name), tokens(1, 6)
        mask = torch.ones_like(ids)
        found = graph.with_cache(ids, mask, 1, 20)
        torch.testing.assert_close(found, graph(ids, mask), rtol=0, atol=float(found.abs().max()) / 20)


def test_a_graph_that_is_written_twice_is_traced_once(tmp_path, monkeypatch):
    traced, trace = [], making.trace
    monkeypatch.setattr(making, "trace", lambda *given: traced.append(given) or trace(*given))
    export_onnx(merged_llama(), tmp_path / "digits", accuracy_level=4)
    assert len(traced) == 1
    export_onnx(merged_llama(), tmp_path / "half", dtype="float16")
    assert len(traced) == 3


def test_the_report_says_what_rounding_costs(tmp_path):
    report = export_onnx(merged_llama(), tmp_path / "out", kv_cache_dtype="int8")
    assert report.parity.max_abs_difference < FP32
    assert 0 < report.parity_as_written.max_abs_difference < 0.05
    assert "attention: gqa, cache in int8" in str(report)


def test_texts_of_the_caller_set_the_scales(tmp_path):
    text = [{"input_ids": tokens(1, 12), "attention_mask": torch.ones(1, 12)}, tokens(1, 7, seed=3)]
    text += [tokens(2, 5, seed=4).int(), tokens(1, 5, seed=5).numpy(), [[5, 6, 7]]]
    for name, calibration in (("own", None), ("given", text), ("again", iter(text)), ("one", text[0])):
        export_onnx(merged_llama(), tmp_path / name, kv_cache_dtype="int8", calibration=calibration)
    own, given, again = (scales(tmp_path / name) for name in ("own", "given", "again"))
    for name, scale in given.items():
        assert scale.shape == (1, 2, 1, 16)
        assert not np.allclose(scale, own[name])
        np.testing.assert_array_equal(scale, again[name])


def test_verify_reads_the_cache(tmp_path):
    model, ids = merged_llama(), tokens()
    for name, options in (("all", {}), ("last", {"logits": "last"})):
        export_onnx(model, tmp_path / name, kv_cache_dtype="int8", **options)
        found = verify(model, tmp_path / name, ids)
        assert 1e-5 < found.max_abs_difference < 0.05
        deployed = ort_model(tmp_path / name)
        assert verify(model, deployed, ids).max_abs_difference == pytest.approx(found.max_abs_difference, rel=1e-3)
    export_onnx(model, tmp_path / "float", logits="last")
    export_onnx(model, tmp_path / "again", logits="last", attention="gqa")
    assert verify(tmp_path / "float", tmp_path / "again", ids).max_abs_difference < FP32
    assert verify(tmp_path / "float", tmp_path / "last", ids).tokens == 2


def test_a_feature_that_is_always_zero_has_a_scale(tmp_path):
    model = tiny_llama()
    model.model.layers[0].self_attn.v_proj.weight.data[:16] = 0
    export_onnx(model, tmp_path / "out", kv_cache_dtype="int8")
    assert (scales(tmp_path / "out")["past_key_values.0.value"] > 0).all()
    ids = tokens()
    mask = torch.ones_like(ids)
    found = OnnxLogits(tmp_path / "out").with_cache(ids, mask, 4)
    torch.testing.assert_close(found, logits(model, ids), rtol=0, atol=float(found.abs().max()) / 30)


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


@pytest.mark.parametrize(
    ("calibration", "said"),
    [
        ([torch.ones(3)], "token ids"),
        ([torch.ones(2, 0, dtype=torch.long)], "token ids"),
        ([tokens() > 3], "token ids"),
        ([{"labels": tokens()}], "token ids"),
        (["a text"], "token ids"),
        ([None], "token ids"),
        ([{"input_ids": tokens(), "attention_mask": torch.zeros(2, 9)}], "padded"),
        ([], "holds no text"),
        ([tokens() + 100], "vocabulary of 100"),
        ([tokens(1, 65)], "more tokens than the graph reads"),
        ("a text", "takes batches of token ids"),
        (5, "takes batches of token ids"),
    ],
)
def test_a_calibration_that_is_no_text_is_refused(tmp_path, calibration, said):
    with pytest.raises((ConfigError, ExportError), match=said):
        export_onnx(merged_llama(), tmp_path / "out", kv_cache_dtype="int8", calibration=calibration)
    assert not (tmp_path / "out").exists()


def test_what_the_gate_refuses_is_said_as_it_is(tmp_path):
    with pytest.raises(ExportError, match="the graph's logits differ"):
        export_onnx(merged_llama(), tmp_path / "out", kv_cache_dtype="int8", tolerance=1e-12)


def test_a_model_without_the_operator_is_refused(tmp_path):
    with pytest.raises(ExportError, match="needs GroupQueryAttention, which does not fit this model"):
        export_onnx(tiny_llama(hidden_size=40, num_attention_heads=4), tmp_path / "out", kv_cache_dtype="int8")
    assert not (tmp_path / "out").exists()


def test_heads_that_share_no_keys_have_a_cache_of_8_bits_too(tmp_path):
    export_onnx(tiny_gpt2(), tmp_path / "out", kv_cache_dtype="int8")
    assert operators(tmp_path / "out").count("If") == operators(tmp_path / "out" / "model_genai.onnx").count("If") == 2


def test_text_of_its_own_holds_no_mark_of_beginning_or_end(tmp_path):
    model = merged_llama()
    export_onnx(model, tmp_path / "out", attention="gqa")
    written, cache = write_text(OnnxLogits(tmp_path / "out"), model.config, 8, 24)
    assert written.shape == (8, 24)
    assert (written[1::2, 0] == model.config.bos_token_id).all()
    assert not torch.isin(written[:, 2:], torch.tensor([model.config.bos_token_id, model.config.eos_token_id])).any()
    assert all(values.shape[2] == 23 for values in cache.values())


def test_tokens_are_drawn_as_often_as_they_are_likely():
    likely = torch.tensor([0.0, 0.5, 0.2, 0.3, 0.0])
    drawn = draw(likely.log().expand(20000, -1), torch.Generator().manual_seed(0))
    assert drawn.shape == (20000, 1)
    found = torch.bincount(drawn[:, 0], minlength=5) / 20000
    torch.testing.assert_close(found, likely, rtol=0, atol=0.015)  # 4 standard deviations
    assert found[0] == found[4] == 0
