"""Checkpoints of mixtures, with the names and settings that quantizers write under transformers 5."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import qbl_trl  # noqa: F401  (registers the quantizer)
from qbl_trl.config import GroupQuantConfig
from qbl_trl.errors import CheckpointError
from qbl_trl.quant.affine import dequantize
from qbl_trl.quant.importers import convert_checkpoint, describe_checkpoint
from qbl_trl.quant.importers.spelling import name_in_files
from tests.quant.foreign import GPTQ, HQQ, gptq_tensors, hqq_tensors, linear_layers, random_affine
from tests.tiny import SIZES

EXPERTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
PACKED = (".experts.", "_proj")
ROUTERS = ("mlp.gate.", "mlp.shared_expert_gate.")
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "head_dim": 16}


def write_mixture(folder, model_type, settings, names, make=gptq_tensors, quantization=GPTQ, packed=PACKED):
    """A checkpoint of a mixture; returns the Affine of each packed layer.

    Args:
        names: the file's name of a float tensor -> what the checkpoint calls it.
        make: (Affine, bits) -> the tensors of a layer.
        packed: parts of the names of the packed layers.
    """
    AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES, **settings)).save_pretrained(folder)
    written, tensors = {}, {}
    for seed, (name, value) in enumerate(load_file(folder / "model.safetensors").items()):
        layer = name.removesuffix(".weight")
        if value.dim() != 2 or not any(part in name for part in packed):
            tensors[names(name)] = value
            continue
        written[layer] = random_affine(*value.shape, 4, seed, zeros="float" if quantization is HQQ else "integer")
        tensors |= {f"{names(layer)}.{key}": part.contiguous() for key, part in make(written[layer], 4).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return written


def separated_by_a_tool(block, model_type="mixtral"):
    def names(name):
        for ours, theirs in EXPERTS.items():
            name = name.replace(f".{ours}", f".{theirs}")
        if model_type == "phimoe":
            name = name.replace(".gate.weight", ".router.weight")
        return name.replace("block_sparse_moe", block)

    return names


@pytest.mark.parametrize(
    ("model_type", "block"), [("mixtral", "mlp"), ("mixtral", "block_sparse_moe"), ("phimoe", "mlp")]
)
def test_experts_under_the_names_of_transformers_5_are_found_where_files_have_other_names(tmp_path, model_type, block):
    settings = {"num_local_experts": 2, "num_experts_per_tok": 2}
    written = write_mixture(tmp_path / "in", model_type, settings, separated_by_a_tool(block, model_type))
    convert_checkpoint(tmp_path / "in", tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {name.removesuffix(".scales") for name in stored if name.endswith(".scales")} == set(written)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    layers = linear_layers(model)
    for name, affine in written.items():
        here = next(name for name in (name, name.replace("block_sparse_moe", "mlp")) if name in layers)
        assert torch.equal(layers[here].dequantize(), dequantize(*affine, 32)), name


def test_settings_of_single_experts_are_found_by_the_names_of_the_tool(tmp_path):
    settings = {"num_local_experts": 2, "num_experts_per_tok": 2}
    write_mixture(tmp_path / "in", "mixtral", settings, separated_by_a_tool("mlp"))
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    rules = {r".*\.1\.down_proj": {"sym": True}, ".*": {"sym": False}}
    config["quantization_config"] = GPTQ | {"dynamic": rules}
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    described = GroupQuantConfig(**describe_checkpoint(tmp_path / "in"))
    assert described.layer_format("model.layers.0.block_sparse_moe.experts.1.w2").zeros == "none"
    assert described.layer_format("model.layers.0.block_sparse_moe.experts.0.w2").zeros == "packed"


def test_a_count_of_experts_that_transformers_5_wrote_under_its_name_is_read(tmp_path):
    written = write_mixture(tmp_path / "in", "qwen3_moe", MIXTURE, lambda name: name)
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    config["num_local_experts"] = config.pop("num_experts", config.get("num_local_experts"))
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    convert_checkpoint(tmp_path / "in", tmp_path / "out")
    layers = linear_layers(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32))
    assert all(torch.equal(layers[name].dequantize(), dequantize(*affine, 32)) for name, affine in written.items())


@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen2_moe"])
def test_routers_that_were_quantized_too_become_float_without_a_loss(tmp_path, model_type):
    settings = MIXTURE | {"shared_expert_intermediate_size": 96}
    packed = (*PACKED, *ROUTERS)
    written = write_mixture(tmp_path / "in", model_type, settings, lambda name: name, hqq_tensors, HQQ, packed)
    described = describe_checkpoint(tmp_path / "in")
    routers = {name for name in written if f"{name}.".endswith(ROUTERS)}
    assert len(routers) == (4 if model_type == "qwen2_moe" else 2)
    assert routers < set(described["modules_to_not_convert"])
    convert_checkpoint(tmp_path / "in", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    layers = linear_layers(model)
    for name, affine in written.items():
        weight = model.get_parameter(f"{name}.weight") if name in routers else layers[name].dequantize()
        assert torch.equal(weight, dequantize(*affine, 32)), name


@pytest.mark.parametrize(
    ("model_type", "told", "name"),
    [
        ("phimoe", "model.layers.0.mlp.router.weight", "model.layers.0.block_sparse_moe.gate.weight"),
        ("minimax", "model.layers.0.mlp.experts.1.up_proj", "model.layers.0.block_sparse_moe.experts.1.w3"),
        ("lfm2_moe", "model.layers.0.feed_forward.experts.1.gate_proj", "model.layers.0.feed_forward.experts.1.w1"),
        ("lfm2_moe", "model.layers.0.feed_forward.gate_proj", "model.layers.0.feed_forward.gate_proj"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.1.w3", "model.layers.0.block_sparse_moe.experts.1.w3"),
        ("qwen3_moe", "model.layers.0.mlp.experts.1.up_proj", "model.layers.0.mlp.experts.1.up_proj"),
    ],
)
def test_names_in_files(model_type, told, name):
    assert name_in_files(model_type, told) == name
    assert name_in_files(model_type, f"{told}.weight") == f"{name}.weight"


@pytest.mark.parametrize("elsewhere", ["mtp.layers.0.", "model.layers.2."])
def test_packed_experts_of_a_layer_that_the_model_lacks_are_left_unread(tmp_path, elsewhere):
    """What predicts further tokens, which some tools quantize beside the model (`mtp`, or one more layer)."""
    written = write_mixture(tmp_path / "in", "qwen3_moe", MIXTURE, str)
    file = tmp_path / "in" / "model.safetensors"
    tensors = load_file(file)
    first = "model.layers.0."
    more = {name.replace(first, elsewhere): t.clone() for name, t in tensors.items() if name.startswith(first)}
    save_file(tensors | more, file, metadata={"format": "pt"})
    convert_checkpoint(tmp_path / "in", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    name = "model.layers.1.mlp.experts.3.down_proj"
    assert torch.equal(model.get_submodule(name).dequantize(), dequantize(*written[name], 32))


def test_experts_in_other_parts_than_the_models_are_refused_before_anything_is_written(tmp_path):
    """GPT-OSS has one layer for gate and up, row by row, and the biases of all experts in one tensor."""
    settings = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
    folder = tmp_path / "in"
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_oss", **SIZES, **settings)).save_pretrained(folder)
    tensors = {n: t for n, t in load_file(folder / "model.safetensors").items() if ".experts." not in n}
    for layer, expert, part in itertools.product(range(2), range(4), ("gate_proj", "up_proj", "down_proj")):
        width, inner = SIZES["hidden_size"], SIZES["intermediate_size"]
        shape = (width, inner) if part == "down_proj" else (inner, width)
        name = f"model.layers.{layer}.mlp.experts.{expert}.{part}"
        made = gptq_tensors(random_affine(*shape, 4, expert), 4)
        tensors |= {f"{name}.{key}": value.contiguous() for key, value in made.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": GPTQ}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"experts\.0\.\w+_proj.* is no part of an expert of GptOssForCausalLM"):
        convert_checkpoint(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
