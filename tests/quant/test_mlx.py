"""MLX checkpoints: weights are s q + b there, embeddings too."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qbl_trl  # noqa: F401  (registers the quantizer)
from qbl_trl.errors import CheckpointError
from qbl_trl.generation import BEFORE_5
from qbl_trl.quant.importers import convert_checkpoint, describe_checkpoint
from qbl_trl.quant.linear import GroupQuantLinear
from tests.quant import foreign
from tests.quant.foreign import affines, linear_layers, random_affine
from tests.quant.test_importer_experts import MIXTURE, write_mixture
from tests.tiny import logits, tokens

SETTINGS = {"group_size": 32, "bits": 4, "mode": "affine"}


def mlx_tensors(affine, bits=4):
    """A negative scale in every other group, as MLX's quantizer makes them where the least weight is the largest."""
    codes, scales, zeros = affine
    scales = scales * (1 - 2 * (torch.arange(scales.shape[1]) % 2)).to(scales.dtype)
    biases = (-scales.float() * zeros.float()).to(scales.dtype)
    return {"weight": foreign.word_matrix(codes, bits).view(torch.uint32), "scales": scales, "biases": biases}


def values(tensors, name, affine):
    """What MLX computes with, in float32."""
    scales, biases = (tensors[f"{name}.{part}"].float()[..., None] for part in ("scales", "biases"))
    return (affine.codes.float().unflatten(1, (-1, 32)) * scales + biases).flatten(1)


def write(folder, tied=False, bits=4, **settings):
    """A folder, the float model that it stands for, and the names of its layers."""
    reference, written = foreign.write_folder(folder, partial(mlx_tensors, bits=bits), {}, affines(bits))
    file, tensors = folder / "model.safetensors", load_file(folder / "model.safetensors")
    tables = ["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"]
    shape = tensors["model.embed_tokens.weight"].shape
    held = dict(written)
    for seed, name in enumerate(tables, 50):
        held[name] = random_affine(*shape, bits, seed)
        tensors |= {f"{name}.{part}": value for part, value in mlx_tensors(held[name], bits).items()}
    if tied:
        tensors.pop("lm_head.weight", None)
    save_file(tensors, file, metadata={"format": "mlx"})
    told = SETTINGS | {"bits": bits} | settings
    config = json.loads((folder / "config.json").read_text()) | {"quantization": told, "quantization_config": told}
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))
    for name in written:
        reference.get_submodule(name).weight.data = values(tensors, name, held[name])
    reference.model.embed_tokens.weight.data = values(tensors, tables[0], held[tables[0]])
    reference.lm_head.weight = torch.nn.Parameter(values(tensors, tables[-1], held[tables[-1]]))
    return reference, written, tensors


@pytest.mark.parametrize(
    ("tied", "bits"), [(False, 4), (True, 4), (False, 2), (False, 3), (True, 5), (True, 6), (False, 8)]
)
def test_codes_and_scales_come_over_and_weights_are_those_of_mlx(tmp_path, tied, bits):
    reference, written, tensors = write(tmp_path / "in", tied, bits)
    convert_checkpoint(tmp_path / "in", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert not hasattr(model.config, "quantization")
    for name, affine in written.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, GroupQuantLinear)
        assert torch.equal(layer.affine().codes, affine.codes)
        assert torch.equal(layer.scales, tensors[f"{name}.scales"])
        # -b / s in float32, times s
        torch.testing.assert_close(layer.dequantize(), values(tensors, name, affine), rtol=0, atol=1e-6)
    expected = logits(reference, tokens())
    scale = max(1.0, float(expected.abs().max()))  # steps are as wide with more bits: weights grow
    torch.testing.assert_close(logits(model, tokens()), expected, rtol=0, atol=1e-5 * scale)  # float32 sums


def test_settings_of_one_layer_count(tmp_path):
    write(tmp_path / "in", **{"model.layers.0.mlp.up_proj": {"group_size": 32, "bits": 9}})
    with pytest.raises(CheckpointError, match=r"up_proj has 9-bit codes; this package stores up to 8 bits"):
        describe_checkpoint(tmp_path / "in")


def test_other_modes_are_refused_by_name(tmp_path):
    write(tmp_path / "in", mode="mxfp4")
    with pytest.raises(CheckpointError, match="MLX mode mxfp4 is not read; allowed: affine"):
        describe_checkpoint(tmp_path / "in")


def test_a_group_of_one_value_is_no_zero_point(tmp_path):
    _, written, tensors = write(tmp_path / "in")
    name = next(iter(written))
    tensors[f"{name}.scales"][0, 0] = 0
    save_file(tensors, tmp_path / "in" / "model.safetensors", metadata={"format": "mlx"})
    with pytest.raises(CheckpointError, match="groups without a scale"):
        convert_checkpoint(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def stack_experts(folder):
    """What `write_mixture` wrote, with the experts of a layer in one tensor."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if ".experts.0." in name]:
        own = [name.replace(".experts.0.", f".experts.{index}.") for index in range(MIXTURE["num_experts"])]
        tensors[name.replace(".experts.0.", ".switch_mlp.")] = torch.stack([tensors.pop(expert) for expert in own])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "mlx"})


@pytest.mark.parametrize("bits", [4, 9])
def test_experts_of_one_tensor_become_layers_with_its_settings(tmp_path, bits):
    written = write_mixture(tmp_path / "in", "qwen3_moe", MIXTURE, lambda name: name, mlx_tensors, SETTINGS)
    stack_experts(tmp_path / "in")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    own = {"model.layers.0.mlp.switch_mlp.up_proj": {"group_size": 32, "bits": bits}}
    (tmp_path / "in" / "config.json").write_text(json.dumps(config | {"quantization": SETTINGS | own}))
    if bits == 9:
        with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.experts\.0\.up_proj has 9-bit codes"):
            describe_checkpoint(tmp_path / "in")
        return
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    convert_checkpoint(tmp_path / "in", tmp_path / "out")
    layers = linear_layers(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32))
    assert sum("experts" in name for name in written) == 2 * 4 * 3
    for name, affine in written.items():
        assert torch.equal(layers[name].affine().codes, affine.codes)
        assert torch.equal(layers[name].scales.abs(), affine.scales)
    stacked = "model.layers.1.mlp.switch_mlp.down_proj"
    third = {f"layer.{part}": tensors[f"{stacked}.{part}"][3] for part in ("weight", "scales", "biases")}
    name = "model.layers.1.mlp.experts.3.down_proj"
    expected = values(third, "layer", written[name])
    torch.testing.assert_close(layers[name].dequantize(), expected, rtol=0, atol=1e-6)


@pytest.mark.skipif(BEFORE_5, reason="transformers 4.57 has no Metal")
def test_what_transformers_wrote_for_metal_comes_over_as_it_reads_it_itself(tmp_path):
    def tensors(affine):
        held = mlx_tensors(affine)
        return {"qbiases": held.pop("biases"), **held}

    settings = {"quant_method": "metal", "bits": 4, "group_size": 32, "modules_to_not_convert": ["lm_head"]}
    _, written = foreign.write_folder(tmp_path / "in", tensors, settings, affines(dtype=torch.float32))
    convert_checkpoint(tmp_path / "in", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, affine in written.items():
        assert torch.equal(model.get_submodule(name).affine().codes, affine.codes)
    widened = AutoModelForCausalLM.from_pretrained(tmp_path / "in", dtype=torch.float32, device_map="cpu")
    torch.testing.assert_close(logits(model, tokens()), logits(widened, tokens()), rtol=0, atol=1e-5)  # float32 sums


def test_what_auto_round_wrote_for_mlx_is_read_as_mlx(tmp_path):
    write(tmp_path / "in")
    settings = tmp_path / "in" / "config.json"
    stated = {"quant_method": "auto-round", "packing_format": "auto_round:mlx", "bits": 4, "group_size": 32}
    config = json.loads(settings.read_text()) | {"quantization_config": stated}
    plain = describe_checkpoint(tmp_path / "in")
    settings.write_text(json.dumps(config))
    assert describe_checkpoint(tmp_path / "in") == plain
