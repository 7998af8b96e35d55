"""Other PEFT methods over packed layers: they train, and their merge into codes is refused in words."""

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, get_peft_model

from qbl_trl import GroupQuantConfig, QBLoRAConfig
from qbl_trl.errors import MergeError
from qbl_trl.quant.hf_quantizer import quantize_model_
from tests.tiny import logits, tiny_llama, tokens

IDS = tokens()
TARGETS = ["q_proj", "down_proj"]
METHODS = {
    "lora": LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False),
    "loha": LoHaConfig(r=2, target_modules=TARGETS, init_weights=False),
    "ia3": IA3Config(target_modules=TARGETS, feedforward_modules=[]),
}


def groups(bits=4):
    return quantize_model_(tiny_llama(), GroupQuantConfig(bits=bits))


# LoHa takes the sizes of a layer from the shape of its weight, which at 4 bits is that of the bytes.
@pytest.mark.parametrize(("method", "bits"), [("lora", 4), ("lora", 8), ("ia3", 4), ("ia3", 8), ("loha", 8)])
def test_it_trains_and_its_merge_is_refused_before_a_code_is_touched(method, bits):
    model = get_peft_model(groups(bits), METHODS[method])
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    expected = logits(model.eval(), IDS)
    for safe in (False, True):
        for merging in (model.merge_and_unload, model.merge_adapter):
            with pytest.raises(MergeError, match=r"q_proj: a .* does not merge into packed codes\. Train QBLoRAConfig"):
                merging(safe_merge=safe)
    assert torch.equal(logits(model, IDS), expected)
    assert torch.equal(logits(model.unload(), IDS), logits(groups(bits), IDS))


def test_a_mixed_model_is_asked_as_well():
    ours = QBLoRAConfig(r=4, target_modules=TARGETS, quantization_aware=True)
    model = get_peft_model(groups(), ours, "ours", mixed=True)
    model.add_adapter("other", METHODS["loha"])
    with pytest.raises(MergeError, match="does not merge into packed codes"):
        model.merge_and_unload()


def test_layers_that_stay_in_float_take_it_as_ever():
    base = quantize_model_(tiny_llama(), GroupQuantConfig(modules_to_not_convert=["down_proj"]))
    settings = {"target_modules": ["down_proj"], "init_lora_weights": False}
    model = get_peft_model(base, LoraConfig(r=2, **settings)).eval()
    expected = logits(model, IDS)
    torch.testing.assert_close(logits(model.merge_and_unload(), IDS), expected, rtol=0, atol=1e-5)  # float32 rounding
