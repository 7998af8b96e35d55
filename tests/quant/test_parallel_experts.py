"""Experts that are split by token counts (GraniteMoe, JetMoe), of attention (JetMoe), or one below the other (DBRX)."""

import copy
import json

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from qbl_trl import GroupQuantConfig, QBLoRAConfig
from qbl_trl.errors import CheckpointError
from qbl_trl.generation import BEFORE_5
from qbl_trl.quant.checkpoint import read_headers
from qbl_trl.quant.experts import Experts
from qbl_trl.quant.hf_quantizer import quantize_model_
from qbl_trl.quant.importers.places import check_places
from qbl_trl.quant.linear import GroupQuantLinear
from qbl_trl.quant.stacks import unstack_
from tests.quant.test_experts import mixture, modules_of
from tests.tiny import logits, tokens

NAMES = ["GraniteMoe", "GraniteMoeShared", "GraniteMoeHybrid", "JetMoe", "Dbrx"]
PARTS = {
    "GraniteMoe": ["block_sparse_moe.experts.3.gate_proj", "block_sparse_moe.experts.3.down_proj"],
    "JetMoe": ["mlp.experts.3.up_proj", "self_attention.experts.3.q_proj", "self_attention.experts.3.o_proj"],
    "Dbrx": ["ffn.experts.3.w1", "ffn.experts.3.v1", "ffn.experts.3.w2"],
}
ALSO = {"GraniteMoe": {"up_proj"}, "JetMoe": {"gate_proj", "down_proj"}, "Dbrx": set()}


def pair(name):
    """A float model as transformers has it, and the same with its experts apart."""
    stacked = mixture(name)
    apart = copy.deepcopy(stacked)
    unstack_(apart)
    assert modules_of(apart, Experts)
    return stacked, apart


def padded():
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return ids, mask


def with_logits_of_routers(name):
    """JetMoe of transformers 4.57 fails on it: it reads attributes that it has not."""
    return {"output_router_logits": not (BEFORE_5 and name == "JetMoe")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_padded_batches_and_single_tokens_have_transformers_own_logits(name, dtype):
    stacked, apart = (model.to(dtype) for model in pair(name))
    ids, mask = padded()
    for rows, seen in ((ids, mask), (ids[:1, -1:], mask[:1, -1:])):  # of one token two experts of four hear nothing
        with torch.no_grad():
            one, other = (m(rows, attention_mask=seen, **with_logits_of_routers(name)) for m in (stacked, apart))
        torch.testing.assert_close(other.logits, one.logits)  # sums may be taken in another order
        for expected, found in zip(one.router_logits or (), other.router_logits or (), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_generated_tokens_are_those_of_the_stacked_model(name):
    ids, mask = padded()
    answers = [m.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False) for m in pair(name)]
    assert torch.equal(*answers)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_stacked_model(name):
    """Routers and the loss that balances them included, and those of the experts themselves."""
    stacked, apart = pair(name)
    ids, mask = padded()
    for model in (stacked, apart):
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        model.train()
        model(ids, attention_mask=mask, labels=ids, **with_logits_of_routers(name)).loss.backward()
    expected = {key: p.grad for key, p in stacked.named_parameters()}
    found = {key: p.grad for key, p in apart.named_parameters() if key in expected}
    for path in modules_of(apart, Experts):
        found |= {f"{path}.{key}": grad for key, grad in stacked_gradients(apart.get_submodule(path)).items()}
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        bound = 2e-6 * float(gradient.abs().max())  # float32, sums in another order
        torch.testing.assert_close(found[key], gradient, rtol=0, atol=bound, msg=lambda text, key=key: f"{key}: {text}")


def stacked_gradients(experts):
    for layer in (layer for layer in experts.modules() if isinstance(layer, nn.Linear)):
        layer.weight.data = torch.zeros_like(layer.weight) if layer.weight.grad is None else layer.weight.grad
    tensors = list(experts.parts)
    stacked = experts.stacked()
    return {key: stacked.get_parameter(key).data for key in tensors}


@pytest.mark.parametrize("name", PARTS)
def test_files_name_experts_alike_under_every_version(name, tmp_path):
    quantize_model_(mixture(name), GroupQuantConfig()).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    block = "transformer.blocks.1" if name == "Dbrx" else "model.layers.1"
    assert {f"{block}.{part}.{kind}" for part in PARTS[name] for kind in ("weight", "scales", "zeros")} <= set(stored)
    assert not [key for key in stored if ".router." in key and not key.endswith("router.layer.weight")]


@pytest.mark.parametrize("name", ["GraniteMoe", "Dbrx"])
def test_a_projection_that_stays_in_float_stays_stacked(name, tmp_path):
    mixture(name).save_pretrained(tmp_path / "float")
    config = GroupQuantConfig(modules_to_not_convert=["w2" if name == "Dbrx" else "down_proj"])
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    packed.save_pretrained(tmp_path / "packed")
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    assert [key for key in stored if key.endswith(("block_sparse_moe.output_linear.weight", "ffn.experts.mlp.w2"))]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(again, tokens()), logits(packed, tokens()))


@pytest.mark.parametrize("name", ["GraniteMoe", "JetMoe", "Dbrx"])
def test_a_folder_that_holds_stacked_experts_in_float_is_read_as_it_is(name, tmp_path):
    """As importers make it of checkpoints whose library quantizes linear layers alone."""
    packed = quantize_model_(mixture(name), GroupQuantConfig(modules_to_not_convert=["experts", "router"]))
    packed.hf_quantizer.quantization_config.modules_to_not_convert = None
    packed.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not [layer for layer in modules_of(again, GroupQuantLinear) if "experts" in layer]
    assert torch.equal(logits(again, tokens()), logits(packed, tokens()))


@pytest.mark.parametrize("name", NAMES)
def test_dequantized_models_compute_the_same_and_save_as_transformers_saves_them(name, tmp_path):
    model = quantize_model_(mixture(name), GroupQuantConfig())
    expected = logits(model, tokens())
    plain = model.dequantize()
    assert not modules_of(plain, Experts)
    names = set(dict(mixture(name).named_parameters()))
    assert set(dict(plain.named_parameters())) == names
    plain.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, tokens()), expected, rtol=0, atol=2e-6)  # another order of sums


@pytest.mark.parametrize("name", ["GraniteMoe", "JetMoe", "Dbrx"])
def test_calibrated_rounding_reaches_each_expert(name):
    config = GroupQuantConfig(algorithm="gptq", calibration=[tokens(4, 16, seed) for seed in range(2)])
    model = quantize_model_(mixture(name), config)
    packed = modules_of(model, GroupQuantLinear)
    assert len([layer for layer in packed if ".experts." in layer]) == 2 * 4 * (5 if name == "JetMoe" else 3)
    assert torch.isfinite(logits(model, tokens())).all()


@pytest.mark.parametrize("name", ["GraniteMoe", "JetMoe", "Dbrx"])
def test_every_expert_that_tokens_ask_teaches_its_adapters(name):
    model = get_peft_model(quantize_model_(mixture(name), GroupQuantConfig()), QBLoRAConfig(r=4)).train()
    ids, mask = padded()
    model(ids, attention_mask=mask, labels=ids).loss.backward()
    learns = {key: bool(p.grad.any()) for key, p in model.named_parameters() if "lora_B" in key and p.grad is not None}
    experts = {key.split(".lora_B")[0].rpartition(".") for key in learns if ".experts." in key}
    assert {part for _, _, part in experts} == {part.rpartition(".")[2] for part in PARTS[name]} | ALSO[name]
    assert all(learns.values())


@pytest.mark.parametrize("name", ["GraniteMoe", "JetMoe", "Dbrx"])
def test_a_checkpoint_with_experts_of_their_own_is_whole(name, tmp_path):
    """As libraries make it that quantize expert by expert."""
    mixture(name).save_pretrained(tmp_path / "float")
    quantize_model_(mixture(name), GroupQuantConfig()).save_pretrained(tmp_path)
    packed = [key.removesuffix(".scales") for key in read_headers(tmp_path) if key.endswith(".scales")]
    layers = {f"{key}.weight": (1, 1) for key in packed if ".experts." in key}
    others = {key: stored.shape for key, stored in read_headers(tmp_path / "float").items() if "linear.w" not in key}
    others = {key: shape for key, shape in others.items() if ".experts.mlp." not in key}
    settings = json.loads((tmp_path / "float" / "config.json").read_text())
    check_places(tmp_path, settings, layers, others)
    with pytest.raises(CheckpointError, match=r"no tensor for .*(input_linear|gate_up_proj|mlp\.w1)"):
        check_places(tmp_path, settings, {}, others)
