"""Steps over a growing cache, and accuracy levels by length: branches that give what the whole graph gives."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from qbl_trl import export_onnx
from qbl_trl.errors import ExportError
from qbl_trl.onnx.digits import Layout
from qbl_trl.onnx.protos import subgraphs
from qbl_trl.onnx.session import OnnxLogits
from tests.onnx.models import merged_llama, operators, padded_batch
from tests.tiny import tiny_llama

FP32 = 5e-6  # sums are taken in different orders; logits of the tiny models are below 1
SHARING = [
    "llama",
    "mistral with a window",
    "gemma2 with capped scores",
    "gpt_bigcode with one key head",
    "gpt_oss with sinks and windows",
]


@pytest.mark.parametrize("case", SHARING)
def test_grouped_steps_give_the_logits_of_group_query_attention(exported, case):
    auto, gqa, (ids, mask) = exported(case), exported(case, attention="gqa"), padded_batch()
    found, expected = (OnnxLogits(made.folder).with_cache(ids, mask, 4) for made in (auto, gqa))
    torch.testing.assert_close(found, expected, rtol=0, atol=FP32)
    choices = [operators(made.folder).count("If") for made in (auto, gqa)]  # experts have some too
    assert choices[0] - choices[1] == auto.model.config.num_hidden_layers


def test_a_shared_buffer_stays_with_group_query_attention(tmp_path):
    model = merged_llama()
    export_onnx(model, tmp_path / "out")
    ids, mask = padded_batch()
    graph = OnnxLogits(tmp_path / "out")
    torch.testing.assert_close(
        graph.with_cache(ids, mask, 4, buffer=20), graph.with_cache(ids, mask, 4), rtol=0, atol=FP32
    )


def test_heads_that_share_no_keys_have_the_branches_too_and_half_precision_has_none(tmp_path):
    export_onnx(merged_llama(num_key_value_heads=4), tmp_path / "all")
    export_onnx(merged_llama(), tmp_path / "half", dtype="float16")
    assert operators(tmp_path / "all").count("If") == 2
    assert "If" not in operators(tmp_path / "half")


@pytest.mark.parametrize("levels", [(None, None), (4, 0)])
def test_genai_reads_a_graph_without_the_choice(tmp_path, levels):
    options = dict(zip(("accuracy_level", "prompt_accuracy_level"), levels, strict=True))
    for attention in ("auto", "gqa"):
        export_onnx(merged_llama(), tmp_path / attention, attention=attention, **options)
    named = json.loads((tmp_path / "auto" / "genai_config.json").read_text())["model"]["decoder"]["filename"]
    assert named == "model_genai.onnx"
    own, same = tmp_path / "auto" / named, tmp_path / "gqa" / named
    assert sorted(operators(own, inner=True)) == sorted(operators(same, inner=True))
    ids = padded_batch()[0]
    for buffer in (0, 20):
        found, expected = (OnnxLogits(file).with_cache(ids, torch.ones_like(ids), 4, buffer) for file in (own, same))
        assert torch.equal(found, expected)


def test_a_graph_whose_prompts_have_a_level_chooses_once(tmp_path):
    levels = {"accuracy_level": 4, "prompt_accuracy_level": 0, "lowering": "factored"}
    for attention in ("auto", "gqa"):
        export_onnx(merged_llama(), tmp_path / attention, attention=attention, **levels)
    assert operators(tmp_path / "auto", inner=True).count("If") == 1
    graph = onnx.load(tmp_path / "auto" / "model.onnx", load_external_data=False).graph
    branches = {part.name: [node.op_type for node in part.node] for node in graph.node for part in subgraphs(node)}
    steps, prompts = branches["steps"], branches["prompts"]
    assert "Softmax" in steps
    assert "GroupQueryAttention" not in steps
    assert "GroupQueryAttention" in prompts
    assert "Softmax" not in prompts
    ids, mask = padded_batch()
    for buffer in (0, 20):  # a step over a buffer is no step of this graph: its activations are float32
        found, expected = (OnnxLogits(tmp_path / name).with_cache(ids, mask, 4, buffer) for name in ("auto", "gqa"))
        torch.testing.assert_close(found, expected, rtol=0, atol=FP32 if not buffer else 2e-2)


@pytest.mark.parametrize(("steps", "prompts"), [(4, 0), (None, 4)])
def test_prompts_have_an_accuracy_level_of_their_own(tmp_path, steps, prompts):
    model, levels = merged_llama(), {"steps": steps, "prompts": prompts}
    plain = {"attention": "gqa", "lowering": "factored"}
    export_onnx(model, tmp_path / "both", accuracy_level=steps, prompt_accuracy_level=prompts, **plain)
    for name, level in levels.items():
        export_onnx(model, tmp_path / name, accuracy_level=level, **plain)
    onnx.checker.check_model(str(tmp_path / "both" / "model.onnx"))
    for tokens, name in ((1, "steps"), (2, "prompts"), (40, "prompts")):
        ids = torch.from_numpy(np.arange(tokens)[None] % 90 + 3)
        mask = torch.ones_like(ids)
        expected = OnnxLogits(tmp_path / name)(ids, mask)
        assert torch.equal(OnnxLogits(tmp_path / "both")(ids, mask), expected)  # the same kernels


@pytest.mark.parametrize("lowering", ["auto", "factored", "float_zero_point"])
@pytest.mark.parametrize("levels", [(4, None), (4, 0), (None, 4)])
def test_levels_change_half_precision_no_more_than_float32(tmp_path, levels, lowering):
    options = dict(zip(("accuracy_level", "prompt_accuracy_level"), levels, strict=True), lowering=lowering)
    found = {}
    for dtype in ("float32", "float16"):
        export_onnx(merged_llama(), tmp_path / dtype, dtype=dtype, **options)
        for level in ("ORT_ENABLE_ALL", "ORT_ENABLE_BASIC"):
            found[dtype, level] = run_at(tmp_path / dtype, getattr(onnxruntime.GraphOptimizationLevel, level))
    for made in found.values():
        # Weights and activations of 11 bits, and codes of activations that fall to the other side by them.
        torch.testing.assert_close(made, found["float32", "ORT_ENABLE_ALL"], rtol=0, atol=2e-2)


def run_at(folder, level):
    """Logits of a prompt, optimized as told."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(folder / "model.onnx", options)
    ids = np.arange(32)[None] % 90 + 3
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(32)[None]}
    feed |= {i.name: np.zeros((1, 2, 0, 16), kinds[i.type]) for i in session.get_inputs() if "past" in i.name}
    return torch.from_numpy(session.run(["logits"], feed)[0]).float()


def test_the_report_looks_at_prompts_of_short_models_too(tmp_path):
    report = export_onnx(merged_llama(), tmp_path / "out", max_length=12, prompt_accuracy_level=4)
    assert report.parity_as_written.max_abs_difference > 1e-3


def test_both_levels_read_the_same_weights(tmp_path):
    model = merged_llama()
    one = export_onnx(model, tmp_path / "one", accuracy_level=4).bytes
    two = export_onnx(model, tmp_path / "two", accuracy_level=4, prompt_accuracy_level=0)
    data = [(tmp_path / name / "model.onnx.data").stat().st_size for name in ("one", "two")]
    assert data[1] <= data[0]
    assert two.bytes < one + 200_000  # the nodes of the other branch
    assert two.parity_as_written is not None


def test_a_float_model_has_no_levels_to_choose_from(tmp_path):
    export_onnx(tiny_llama(), tmp_path / "out", attention="gqa", accuracy_level=4, prompt_accuracy_level=0)
    assert "If" not in operators(tmp_path / "out")


def test_an_unknown_level_of_prompts_is_refused(tmp_path):
    with pytest.raises(ExportError, match="prompt_accuracy_level=7 is not known; allowed: None, 0, 1, 2, 3, 4"):
        export_onnx(merged_llama(), tmp_path / "out", prompt_accuracy_level=7)
    assert not (tmp_path / "out").exists()


def test_digits_take_the_fewest_blocks_where_prompts_are_read_in_float():
    one, more = Layout.of(4, 32, 18, digits=1), Layout(4, 32, 18, (0,), 3)
    assert (one.blocks, more.blocks) == (1, 2)
    assert one.cost(18, prompts=False) < more.cost(18, prompts=False)
    assert one.cost(18) > more.cost(18)
