"""Gradients reach the adapters of a packed base through re-entrant checkpointing, whenever that is turned on."""

import pytest
from peft import get_peft_model
from torch import nn

from qbl_trl.adapter.layer import adapter_layers
from tests.adapter.models import config, groups
from tests.tiny import tokens

IDS = tokens()


@pytest.mark.parametrize("moment", ["before", "toggled", "another embedding"])
def test_re_entrant_checkpointing_trains_whenever_it_is_turned_on(moment):
    base = groups()
    if moment == "another embedding":
        base.gradient_checkpointing_enable({"use_reentrant": True})
        base.set_input_embeddings(nn.Embedding(100, 64))
    model = get_peft_model(base, config(quantization_aware=True)).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    if moment == "toggled":
        model.gradient_checkpointing_disable()
        model.gradient_checkpointing_enable({"use_reentrant": True})
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(layer.lora_B["default"].weight.grad is not None for layer in adapter_layers(model).values())
