"""Graphs for CUDA, which no test here can run there: what its kernels ask of them, and that they are right."""

import json

import onnx
import pytest
import torch

from qbl_trl import GroupQuantConfig, export_onnx
from qbl_trl.onnx.gqa import Input
from qbl_trl.onnx.masks import BIASED
from qbl_trl.onnx.session import OnnxLogits
from qbl_trl.quant.hf_quantizer import quantize_model_
from tests.onnx.architectures import ARCHITECTURES, FUSED, build
from tests.onnx.models import merged_llama
from tests.onnx.test_right_padding import in_genais_way, one_by_one
from tests.tiny import logits, tiny_llama, tokens

HALF = 2e-2  # float16 arithmetic, where no logit is much larger than 1


def written(folder, name="model.onnx"):
    return onnx.load(folder / name, load_external_data=False).graph


def attentions(graph):
    for node in graph.node:
        if node.op_type == "GroupQueryAttention":
            yield node
        for attribute in node.attribute:
            yield from attentions(attribute.g) if attribute.type == onnx.AttributeProto.GRAPH else ()


def test_a_text_without_padding_is_attended_without_a_bias(tmp_path):
    model = merged_llama()
    export_onnx(model, tmp_path / "out", provider="cuda")
    (choice,) = [node for node in written(tmp_path / "out").node if node.op_type == "If"]
    text, padded = (attribute.g for attribute in sorted(choice.attribute, key=lambda one: one.name, reverse=True))
    assert {node.input[Input.BIAS] for node in attentions(text)} == {""}
    assert {node.input[Input.BIAS] for node in attentions(padded)} != {""}
    graph, ids = OnnxLogits(tmp_path / "out"), tokens()
    whole, mask = torch.ones_like(ids), torch.ones_like(ids)
    mask[0, :3] = 0
    expected = [logits(model, ids), model(ids, attention_mask=mask).logits]
    for given, wanted in zip((whole, mask), expected, strict=True):
        torch.testing.assert_close(graph(ids, given)[given.bool()], wanted[given.bool()], rtol=0, atol=HALF)
        stepped = graph.with_cache(ids, given, 5)
        torch.testing.assert_close(stepped[given.bool()], wanted[given.bool()], rtol=0, atol=HALF)


@pytest.mark.parametrize("case", [name for name in FUSED if "experts" not in name])  # whose router may choose others
def test_genai_reads_rows_of_different_lengths_without_a_bias_of_padding(tmp_path, case):
    model = build(*ARCHITECTURES[case][:2])
    report = export_onnx(model, tmp_path / "out", provider="cuda")
    if report.attention != "gqa":
        pytest.skip(report.attention_reason)
    named = json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]["decoder"]["filename"]
    assert named == "model_genai.onnx"
    biases = {node.input[Input.BIAS] for node in attentions(written(tmp_path / "out", named))}
    assert all(not bias or bias.startswith(f"right/{BIASED}") for bias in biases)  # the model's own may stay
    expected = one_by_one(model)
    found = in_genais_way(OnnxLogits(tmp_path / "out" / named))
    torch.testing.assert_close(found, expected, rtol=0, atol=HALF * max(1, float(expected.abs().max())))


@pytest.mark.parametrize("width", [512, 384])  # whole groups, and one that ends in the middle
@pytest.mark.parametrize("algorithm", ["rtn", "hqq"])
def test_groups_of_256_are_written_as_two_of_128(tmp_path, width, algorithm):
    model = tiny_llama(hidden_size=256, intermediate_size=width)
    model = quantize_model_(model, GroupQuantConfig(group_size=256, algorithm=algorithm, quantize_embeddings=True))
    report = export_onnx(model, tmp_path / "out", provider="cuda")
    assert report.parity.max_abs_difference < 1e-5  # fp32 on both sides
    held = [node for choice in written(tmp_path / "out").node for one in choice.attribute for node in one.g.node]
    sizes = {one.i for node in held for one in node.attribute if one.name == "block_size"}
    assert sizes == {128}
