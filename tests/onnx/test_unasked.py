"""Experts that no token asks are not computed."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from peft import get_peft_model

from qbl_trl import GroupQuantConfig, QBLoRAConfig, export_onnx, merge
from qbl_trl.quant.hf_quantizer import quantize_model_
from tests.onnx.architectures import ARCHITECTURES, build
from tests.onnx.models import operators
from tests.quant.test_experts import mixture
from tests.tiny import tokens

MIXTURES = {name: case for name, case in ARCHITECTURES.items() if "experts" in name}


def counted(folder, ids, tmp_path):
    """How many of each operator ran for some tokens over an empty cache."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones_like(ids.numpy())}
    feeds["position_ids"] = np.arange(ids.shape[1])[None].repeat(len(ids), 0)
    for value in session.get_outputs():
        if value.name.startswith("present"):
            past = value.name.replace("present", "past_key_values")
            feeds[past] = np.zeros((len(ids), value.shape[1], 0, value.shape[3]), np.float32)
    session.run(None, {name: feeds[name] for name in (value.name for value in session.get_inputs())})
    events = json.loads(Path(session.end_profiling()).read_text())
    kinds = [event["args"]["op_name"] for event in events if event.get("name", "").endswith("_kernel_time")]
    return {kind: kinds.count(kind) for kind in set(kinds)}


@pytest.mark.parametrize("name", MIXTURES)
def test_every_expert_has_a_choice_of_its_own(name, tmp_path):
    model = build(*MIXTURES[name][:2])
    export_onnx(model, tmp_path / "out")
    layers = sum(hasattr(layer, "experts") for layer in model.modules())
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    turns = [node for node in graph.node if node.op_type == "If" and any("rest" in n.name for n in inner(node))]
    assert len(turns) == 4 * layers
    onnx.checker.check_model(str(tmp_path / "out" / "model.onnx"))


def inner(node):
    return [n for attribute in node.attribute for n in attribute.g.node]


def test_one_token_computes_the_experts_it_chose(tmp_path):
    export_onnx(build(*MIXTURES["qwen3 with experts"][:2]), tmp_path / "out")
    one, many = (counted(tmp_path / "out", tokens(1, length, 0), tmp_path) for length in (1, 40))
    assert (one["NonZero"], many["NonZero"]) == (2 * 2, 2 * 4)  # layers, experts asked
    assert many["MatMulNBits"] - one["MatMulNBits"] == 2 * (4 - 2) * 2  # gate and up in one, and down


def test_two_levels_keep_the_choice_in_both(tmp_path):
    export_onnx(build(*MIXTURES["qwen3 with experts"][:2]), tmp_path / "out", accuracy_level=4, prompt_accuracy_level=0)
    assert operators(tmp_path / "out", inner=True).count("NonZero") == 2 * 2 * 4
    one = counted(tmp_path / "out", tokens(1, 1, 0), tmp_path)
    assert one["NonZero"] == 2 * 2


@pytest.mark.parametrize("name", ["GptOss", "GraniteMoe", "Dbrx"])
def test_experts_in_one_tensor_are_written_one_by_one(name, tmp_path):
    base = quantize_model_(mixture(name), GroupQuantConfig())
    model = merge(get_peft_model(base, QBLoRAConfig(r=4, quantization_aware=True, init_lora_weights=False)).eval())
    report = export_onnx(model, tmp_path / "out")
    assert report.parity.max_abs_difference <= 1e-5
    attention = 2 * 2  # of two layers: q, k and v in one, and o
    assert operators(tmp_path / "out", inner=True).count("MatMulNBits") == attention + 2 * 4 * 2
    assert counted(tmp_path / "out", tokens(1, 1, 0), tmp_path)["MatMulNBits"] == attention + 2 * 2 * 2


def test_experts_of_attention_have_a_choice_of_their_own(tmp_path):
    model = quantize_model_(mixture("JetMoe"), GroupQuantConfig())
    report = export_onnx(model, tmp_path / "out")
    assert report.parity.max_abs_difference <= 1e-5
    one, many = (counted(tmp_path / "out", tokens(1, length, 0), tmp_path) for length in (1, 40))
    assert (one["MatMulNBits"], many["MatMulNBits"]) == (2 * (1 + 2 * 4), 2 * (1 + 4 * 4))  # keys and values; q, o, two


@pytest.mark.parametrize("name", ["GraniteMoe", "JetMoe"])
def test_float_experts_that_are_split_by_token_counts_are_traced(name, tmp_path):
    model = mixture(name)
    names = list(dict(model.named_parameters()))
    report = export_onnx(model, tmp_path / "out")
    assert report.parity_cached.max_abs_difference <= 1e-5
    assert list(dict(model.named_parameters())) == names
