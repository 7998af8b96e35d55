"""Checkpoints in narrow floats (FP8, MXFP4): `qbl-trl quantize` makes them wide, then quantizes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

from qbl_trl import GroupQuantConfig
from qbl_trl.cli import main
from qbl_trl.generation import BEFORE_5
from tests.tiny import logits, tiny_llama, tokens

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])  # the eight magnitudes of four bits


def quantized(folder, method, tensors, **settings):
    """State in a saved folder that its weights are stored otherwise, and store them so."""
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method} | settings
    (folder / "config.json").write_text(json.dumps(config))


def fp8_llama(folder):
    """A folder in float8, and the model whose weights these are."""
    model = tiny_llama()
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        wide = tensors[name]
        rows, columns = -(-wide.shape[0] // 32), -(-wide.shape[1] // 32)
        scales = 2.0 ** -torch.randint(6, 9, (rows, columns)).float()  # of two, so that all products are exact
        each = scales.repeat_interleave(32, 0).repeat_interleave(32, 1)
        tensors[name] = (wide / each).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales
        model.get_parameter(name).data = tensors[name].float() * each
    quantized(folder, "fp8", tensors, activation_scheme="dynamic", weight_block_size=[32, 32])
    return model


def mxfp4_gpt_oss(folder):
    """A folder with experts in MXFP4, and the model whose weights these are."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    experts = {"num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1}
    model = GptOssForCausalLM(GptOssConfig(vocab_size=100, **sizes, **experts)).eval()
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        count, inputs, outputs = tensors.pop(name).shape
        codes = torch.randint(0, 16, (count, outputs, inputs))
        powers = torch.randint(120, 124, (count, outputs, inputs // 32))
        values = E2M1[codes % 8] * torch.where(codes >= 8, -1.0, 1.0)
        wide = values * (2.0 ** (powers - 127).float()).repeat_interleave(32, 2)
        pairs = codes.view(count, outputs, inputs // 32, 16, 2)
        tensors[f"{name}_blocks"] = (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8)
        tensors[f"{name}_scales"] = powers.to(torch.uint8)
        model.get_parameter(name).data = wide.transpose(1, 2).contiguous()
    quantized(folder, "mxfp4", tensors, modules_to_not_convert=["model.layers.*.self_attn", "lm_head"])
    return model


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(fp8_llama, marks=pytest.mark.skipif(BEFORE_5, reason="transformers 4.57 widens no FP8")),
        mxfp4_gpt_oss,
    ],
)
def test_narrow_floats_are_quantized_as_the_float_model_of_their_values(make, tmp_path, capsys):
    model = make(tmp_path / "narrow")
    model.save_pretrained(tmp_path / "wide")
    arguments = ["--bits", "8", "--dtype", "float32"]
    assert main(["quantize", str(tmp_path / "narrow"), str(tmp_path / "packed"), *arguments]) == 0, capsys.readouterr()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    expected = AutoModelForCausalLM.from_pretrained(
        tmp_path / "wide", quantization_config=GroupQuantConfig(bits=8), dtype=torch.float32
    )
    assert set(found.state_dict()) == set(expected.state_dict())
    assert torch.equal(logits(found, tokens()), logits(expected, tokens()))
