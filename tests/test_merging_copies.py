"""What a merged model owns, and the models that merge beside those of transformers."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from qbl_trl import GroupQuantConfig, QBLoRAConfig, merge
from qbl_trl.errors import MergeError
from qbl_trl.quant.apply import quantize_layer_
from qbl_trl.quant.linear import GroupQuantLinear
from tests.tiny import logits, tiny_gpt2, tiny_llama, tokens

IDS = tokens()


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_training_on_does_not_move_the_biases_of_a_merged_model(bias):
    model = get_peft_model(tiny_gpt2(), QBLoRAConfig(r=2, bias=bias, task_type="CAUSAL_LM"))
    merged = merge(model)
    before = logits(merged, IDS)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, 1.0)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert torch.equal(logits(merged, IDS), before)
    assert model.get_input_embeddings().weight.data_ptr() == merged.get_input_embeddings().weight.data_ptr()


def sequence(quantized):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    for name in ("0", "2") if quantized else ():
        quantize_layer_(model, name, model.get_submodule(name).weight.data, GroupQuantConfig())
    return model


@pytest.mark.parametrize("quantized", [False, True])
def test_a_model_of_torch_alone_merges(quantized):
    settings = {"target_modules": ["0", "2"], "init_lora_weights": False}
    model = get_peft_model(sequence(quantized), QBLoRAConfig(r=2, in_factor=32, **settings))
    x = torch.randn(3, 64)
    with torch.no_grad():
        expected, merged = model(x), merge(model)
        torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-4)  # float32 sums in another order
    assert type(merged) is nn.Sequential
    assert isinstance(merged[0], GroupQuantLinear) == quantized


def test_a_model_of_torch_alone_is_refused_by_layer_like_any_other():
    model = get_peft_model(sequence(True), QBLoRAConfig(r=2, target_modules=["0"], out_factor=1))
    with pytest.raises(MergeError, match=r"0: in_factor=2 is no multiple"):
        merge(model)


def test_a_model_in_data_parallel_is_seen_through():
    model = get_peft_model(tiny_llama(), QBLoRAConfig(r=2, init_lora_weights=False)).eval()
    merged = merge(nn.DataParallel(model))
    torch.testing.assert_close(logits(merged, IDS), logits(model, IDS), rtol=0, atol=1e-5)  # float32 rounding
