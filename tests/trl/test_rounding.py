"""Training that rounds the merged change as deployment stores it."""

import json

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from qbl_trl.adapter.layer import adapter_layers
from qbl_trl.errors import ConfigError
from qbl_trl.quant.linear import GroupQuantLinear
from qbl_trl.trl.callback import REPORT, QBLoRACallback
from qbl_trl.trl.rounding import STORED, DeltaRounding, round_delta, rounded
from tests.tiny import logits, tokens
from tests.trl import data
from tests.trl.runs import adapter, base, losses, sft

IDS = tokens(vocabulary=32)


def adapted():
    torch.manual_seed(0)
    model = peft.get_peft_model(base(), adapter()).eval()
    for layer in adapter_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    return model


@pytest.mark.parametrize("stored", STORED)
def test_rounding_twice_is_rounding_once_and_the_error_is_at_most_half_a_step(stored):
    delta = torch.randn(6, 5) * torch.logspace(-3, 2, 6)[:, None]
    once = round_delta(delta, stored)
    torch.testing.assert_close(round_delta(once, stored), once, rtol=1e-6, atol=0)  # int8 scales round in fp32
    step = {"float16": 2**-11, "bfloat16": 2**-8}.get(stored)
    allowed = delta.abs() * step if step else delta.abs().amax(1, keepdim=True) / 127 * 0.5001
    assert bool(((once - delta).abs() <= allowed + 1e-7).all())


class Averaging(torch.optim.SGD):
    """Trains one set of weights and is evaluated with another, as schedule-free optimizers are."""

    def train(self):
        self._move(-0.05)

    def eval(self):
        self._move(0.05)

    @torch.no_grad()
    def _move(self, step):
        if step > 0 or getattr(self, "moved", False):
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter += step
        self.moved = step > 0


def test_an_evaluation_with_other_weights_rounds_those(tmp_path):
    callback = QBLoRACallback(adapter(), stored_delta="int8", eval_merged_loss=True, save_merged=True)
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = sft(
        tmp_path, callback, eval_dataset=data.texts(4), optimizer_cls_and_kwargs=(Averaging, {"lr": 0.1}), **options
    )
    trainer.train()
    logged = {name: [e[name] for e in trainer.state.log_history if name in e] for name in ("eval_loss", "loss")}
    merged = [entry["eval_merged_loss"] for entry in trainer.state.log_history if "eval_merged_loss" in entry]
    assert len(merged) == 2
    assert logged["eval_loss"] == pytest.approx(merged, abs=1e-6)  # fp32 rounding


@pytest.mark.parametrize("flushed", [False, True])
def test_a_row_of_zeros_stays_zero(flushed):
    torch.set_flush_denormal(flushed)
    try:
        assert round_delta(torch.zeros(2, 3), "int8").abs().max() == 0
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("stored", STORED)
def test_a_rounded_layer_computes_with_the_rounded_delta(stored):
    layers = adapter_layers(adapted())
    layer = next(iter(layers.values()))
    x = torch.randn(3, layer.base.in_features)
    weight = layer.get_base_layer().dequantize()
    change = round_delta(layer.block_delta("default").detach(), stored)
    expected = x @ (weight + change.repeat_interleave(2, 0).repeat_interleave(32, 1)).T
    with rounded(layers, stored), torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-4)  # fp32 rounding of sums of 64


def test_the_gradient_goes_straight_through():
    """A and B get the gradient of a layer whose output gradient is the same and whose rounding is not there."""
    layers = adapter_layers(adapted())
    layer = next(iter(layers.values()))
    x, upstream = torch.randn(3, layer.base.in_features), torch.randn(3, layer.base.out_features)

    def gradients():
        layer.zero_grad()
        layer(x).backward(upstream)
        return [p.grad.clone() for p in layer.parameters() if p.requires_grad]

    plain = gradients()
    with rounded(layers, "int8"):
        for got, expected in zip(gradients(), plain, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_disabled_adapters_are_the_base_and_removing_leaves_no_trace():
    model = adapted()
    with torch.no_grad():
        before = model(IDS).logits
        with model.disable_adapter():
            plain = model(IDS).logits
        with rounded(adapter_layers(model), "int8"):
            assert not torch.equal(model(IDS).logits, before)
            with model.disable_adapter():
                assert torch.equal(model(IDS).logits, plain)
        assert torch.equal(model(IDS).logits, before)


def test_the_cost_is_the_relative_change_of_all_deltas():
    layers = adapter_layers(adapted())
    rounding = DeltaRounding(layers, "int8")
    rounding.refresh()
    deltas = [layer.block_delta("default").detach() for layer in layers.values()]
    lost = sum(float((round_delta(d, "int8") - d).norm() ** 2) for d in deltas)
    assert rounding.cost == pytest.approx((lost / sum(float(d.norm() ** 2) for d in deltas)) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("stored", STORED)
def test_the_written_model_is_what_training_saw(tmp_path, stored):
    callback = QBLoRACallback(
        adapter(), stored_delta=stored, merged_output_dir=tmp_path / "m", eval_merged_loss=True, save_merged=True
    )
    trainer = sft(
        tmp_path / "run",
        callback,
        eval_dataset=data.texts(4),
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        learning_rate=0.02,
    )
    trainer.train()
    history = trainer.state.log_history
    assert all(0 < entry["qbl/rounding_cost"] < 0.02 for entry in history if "loss" in entry)
    plain = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    merged = [entry["eval_merged_loss"] for entry in history if "eval_merged_loss" in entry]
    assert merged == pytest.approx(plain, abs=1e-5)  # rounded alike: fp32 rounding is left
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    for delta in (m.delta for m in model.modules() if isinstance(m, GroupQuantLinear)):
        torch.testing.assert_close(round_delta(delta, stored), delta, rtol=1e-6, atol=0)  # narrowing loses nothing
    with rounded(adapter_layers(trainer.model), stored), torch.no_grad():
        expected = trainer.model.eval()(IDS).logits
    torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=1e-5)  # fp32 rounding
    report = json.loads((tmp_path / "run" / REPORT).read_text())
    assert report["rounding"]["stored"] == stored
    assert report["merge"]["parity"]["max_abs_difference"] <= 1e-5


def test_rounding_starts_at_the_step_it_is_told_to_and_is_off_by_default(tmp_path):
    runs = {}
    for name, options in (("off", {}), ("late", {"stored_delta": "int8", "round_from_step": 2})):
        trainer = sft(tmp_path / name, QBLoRACallback(adapter(), **options), learning_rate=0.05)
        trainer.train()
        runs[name] = trainer
    # Step 1 and 2 are the same; the logs of step 3 show the first rounded loss.
    assert losses(runs["off"])[:2] == losses(runs["late"])[:2]
    assert losses(runs["off"])[2:] != losses(runs["late"])[2:]
    costs = ["qbl/rounding_cost" in entry for entry in runs["late"].state.log_history if "loss" in entry]
    assert costs == [False, False, True, True]


def test_rounding_is_refused_where_no_delta_is_stored(tmp_path):
    with pytest.raises(ConfigError, match="this layer stores none"):
        sft(tmp_path, QBLoRACallback(adapter(quantization_aware=False), stored_delta="int8"))
    with pytest.raises(ConfigError, match="stored_delta='int3' is not known; allowed: float16, bfloat16, int8"):
        sft(tmp_path, QBLoRACallback(adapter(), stored_delta="int3"))


def test_rounding_leaves_a_reference_adapter_alone():
    model = peft.get_peft_model(base(), adapter(init_lora_weights=False)).eval()
    model.add_adapter("ref", adapter(init_lora_weights=False))
    layers, ids = adapter_layers(model), IDS
    rounding = DeltaRounding(layers, "int8")
    model.set_adapter("ref")
    plain = logits(model, ids)
    rounding.install()
    rounding.refresh()
    assert torch.equal(logits(model, ids), plain)
    model.set_adapter("default")
    rounded_logits = logits(model, ids)
    rounding.remove()
    assert not torch.equal(logits(model, ids), rounded_logits)


def test_hooks_that_are_put_back_round_nothing_anew(monkeypatch):
    """Under FSDP the main process alone takes them off, to merge, and rounding asks every process."""
    rounding = DeltaRounding(adapter_layers(adapted()), "float16")
    rounding.install()
    rounding.remove()
    monkeypatch.setattr(rounding, "refresh", None)
    rounding.install(anew=False)
    assert rounding.installed
