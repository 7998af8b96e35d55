"""Packed layers whose tensors are not where, or not what, they were: offloaded, exchanged, cast."""

import pytest
import torch
from accelerate import cpu_offload, dispatch_model, load_checkpoint_and_dispatch
from peft import get_peft_model
from torch.func import functional_call, grad, jvp, vmap
from transformers import AutoModelForCausalLM

from qbl_trl import GroupQuantConfig, QBLoRAConfig, merge
from qbl_trl.errors import ConfigError, MergeError
from qbl_trl.generation import BEFORE_5
from qbl_trl.quant.affine import min_max
from qbl_trl.quant.hf_quantizer import quantize_model_
from qbl_trl.quant.linear import GroupQuantLinear
from tests.tiny import logits, tiny_llama, tokens

PLACES = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
PLACES |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
ADAPTER = {"r": 1, "quantization_aware": True, "init_lora_weights": False, "task_type": "CAUSAL_LM"}


def layer(seed=0, bits=4, symmetric=False):
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(seed))
    affine = min_max(weight, 32, bits, symmetric, torch.float16)
    return GroupQuantLinear.from_affine(affine, bits=bits, group_size=32, symmetric=symmetric)


def inputs():
    return torch.randn(3, 64, generator=torch.Generator().manual_seed(9))


def offloaded(model, folder, adapted=False):
    """A model of which one block lies on disk but for its forward pass."""
    places = {f"base_model.model.{name}": place for name, place in PLACES.items()} if adapted else PLACES
    options = {"main_device": "cpu", "force_hooks": True, "offload_buffers": True}
    return dispatch_model(model, places, offload_dir=str(folder), **options)


@pytest.mark.parametrize("buffers", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_gradient_through_an_offloaded_layer_is_that_of_its_weight(bits, symmetric, buffers):
    packed, x = layer(bits=bits, symmetric=symmetric), inputs().requires_grad_()
    expected = packed.dequantize().sum(0).expand(3, -1)
    cpu_offload(packed, torch.device("cpu"), offload_buffers=buffers)
    packed(x).sum().backward()
    assert packed.weight.is_meta
    torch.testing.assert_close(x.grad, expected)


def test_the_gradient_is_that_of_the_codes_the_forward_pass_was_given():
    one, other, x = layer(0), layer(1), inputs().requires_grad_()
    y = functional_call(one, dict(other.state_dict()), (x,))
    assert torch.equal(y, other(x))
    (found,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(found, other.dequantize().sum(0).expand(3, -1))


def test_the_transforms_of_torch_func_follow_a_packed_layer():
    packed, x = layer(), inputs()
    weight = packed.dequantize()
    torch.testing.assert_close(vmap(packed)(x), x @ weight.T)
    torch.testing.assert_close(jvp(packed, (x,), (2 * x,))[1], 2 * x @ weight.T)
    of_each = vmap(grad(lambda row: packed(row).square().sum()))(x)
    torch.testing.assert_close(of_each, 2 * x @ weight.T @ weight)


def test_an_offloaded_model_answers_and_trains_where_its_adapters_are_here(tmp_path):
    adapter = {**ADAPTER, "target_modules": ["q_proj"], "layers_to_transform": [0]}

    def gradients(base):
        torch.manual_seed(0)
        model = get_peft_model(base, QBLoRAConfig(**adapter))
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    whole, parted = (quantize_model_(tiny_llama(), GroupQuantConfig()) for _ in range(2))
    offloaded(parted, tmp_path)
    assert torch.equal(logits(parted, tokens()), logits(whole, tokens()))
    expected, found = gradients(whole), gradients(parted)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_what_needs_an_offloaded_layer_says_so(tmp_path):
    model = offloaded(quantize_model_(tiny_llama(), GroupQuantConfig()), tmp_path / "one")
    with pytest.raises(ConfigError, match=r"dequantize: model\.layers\.1\..* is on no device"):
        model.dequantize()
    with pytest.raises(ConfigError, match=r"model\.layers\.1\..* is offloaded"):
        get_peft_model(model, QBLoRAConfig(**ADAPTER))


def test_adapters_that_are_offloaded_with_their_layers_answer_and_do_not_merge(tmp_path):
    model = get_peft_model(quantize_model_(tiny_llama(), GroupQuantConfig()), QBLoRAConfig(**ADAPTER)).eval()
    expected = logits(model, tokens())
    offloaded(model, tmp_path, adapted=True)
    assert torch.equal(logits(model, tokens()), expected)
    with pytest.raises(MergeError, match=r"model\.layers\.1\..* is on no device"):
        merge(model)


def test_an_offloaded_model_is_saved_whole_or_not_at_all(tmp_path):
    model = quantize_model_(tiny_llama(), GroupQuantConfig())
    expected = logits(model, tokens())
    offloaded(model, tmp_path / "disk")
    if BEFORE_5:
        with pytest.raises(ConfigError, match="is on no device"):
            model.save_pretrained(tmp_path / "saved")
        return
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), tokens()), expected)


def test_scales_that_something_has_cast_are_not_saved(tmp_path):
    model = quantize_model_(tiny_llama(), GroupQuantConfig(scale_dtype="float32"))
    model.save_pretrained(tmp_path / "whole")
    cast = load_checkpoint_and_dispatch(model, str(tmp_path / "whole"), device_map={"": "cpu"}, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match=r"scales of model\.layers\.0\..* are torch.bfloat16, and were float32"):
        cast.save_pretrained(tmp_path / "cast")
    assert not (tmp_path / "cast" / "model.safetensors").exists()
