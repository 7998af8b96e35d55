"""Graphs for CUDA, which no test here can run there: what its kernels ask of them, and that they are right."""

import json

import onnx
import pytest
import torch
from peft import get_peft_model

from qbl_trl import GroupQuantConfig, QBLoRAConfig, export_onnx, merge
from qbl_trl.errors import ExportError
from qbl_trl.onnx import making
from qbl_trl.onnx.gqa import Input
from qbl_trl.onnx.masks import BIASED
from qbl_trl.onnx.session import OnnxLogits
from qbl_trl.onnx.unpadded import choose_unpadded
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


@pytest.mark.parametrize("tied", [False, True])
def test_layers_whose_last_group_is_cut_keep_weights_of_their_own(tmp_path, tied):
    model = tiny_llama(hidden_size=384, vocab_size=384, tie_word_embeddings=tied)
    model = quantize_model_(model, GroupQuantConfig(group_size=256, quantize_embeddings=True))
    assert export_onnx(model, tmp_path / "out", provider="cuda").parity.max_abs_difference < 1e-5  # fp32 on both sides
    stored = [
        weight.name for weight in written(tmp_path / "out").initializer if weight.data_type == onnx.TensorProto.UINT8
    ]
    assert sum("lm_head" in name for name in stored) == (0 if tied else 2)


def test_the_gate_looks_at_what_reads_single_tokens_without_padding(tmp_path, monkeypatch):
    def swapped(path):
        choose_unpadded(path)
        model = onnx.load(path, load_external_data=False)
        choice = next(node for node in model.graph.node if node.op_type == "If")
        for node in attentions(next(one.g for one in choice.attribute if one.name == "then_branch")):
            node.input[Input.PAST_KEY], node.input[Input.PAST_VALUE] = (
                node.input[Input.PAST_VALUE],
                node.input[Input.PAST_KEY],
            )
        onnx.save(model, path)

    monkeypatch.setattr(making, "choose_unpadded", swapped)
    with pytest.raises(ExportError, match="logits differ"):
        export_onnx(merged_llama(), tmp_path / "out", provider="cuda", attention="gqa")


def test_what_is_made_of_weights_alone_is_made_once_for_both_branches(tmp_path):
    export_onnx(merged_llama(), tmp_path / "out", provider="cuda")
    graph = written(tmp_path / "out")
    (choice,) = [node for node in graph.node if node.op_type == "If"]
    for branch in choice.attribute:
        inside = {name for node in branch.g.node for name in node.output}
        for node in branch.g.node:
            assert inside & set(node.input) or {"input_ids", "attention_mask", "position_ids"} & set(node.input)


def test_an_adapter_and_fractional_zero_points_are_one_product_there_too(tmp_path):
    model = quantize_model_(tiny_llama(), GroupQuantConfig(algorithm="hqq"))
    merged = merge(get_peft_model(model, QBLoRAConfig(r=4, quantization_aware=True, init_lora_weights=False)))
    report = export_onnx(merged, tmp_path / "out", provider="cuda")
    products = {layer.name for layer in report.layers if layer.operator == "MatMulNBits"}
    kinds = [node.op_type for node in written(tmp_path / "out", "model_genai.onnx").node]
    assert kinds.count("MatMulNBits") == kinds.count("MatMul") == len(products)  # the head is a FusedMatMul
