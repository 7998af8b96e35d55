"""The numbers in the log, against slow naive ones, and where they show up."""

import warnings

import pytest
import torch
from transformers import TrainerCallback

from qbl_trl.adapter.layer import adapter_layers
from qbl_trl.config import GroupQuantConfig
from qbl_trl.quant.hf_quantizer import quantize_model_
from qbl_trl.trl.callback import QBLoRACallback
from qbl_trl.trl.metrics import is_finite, measure, summarize
from tests.tiny import tiny_llama
from tests.trl.runs import adapter, base, sft


def adapted(seed=0, symmetric=False, **changes):
    """Layers with random adapters."""
    import peft

    frozen = quantize_model_(tiny_llama(vocab_size=32), GroupQuantConfig(symmetric=symmetric))
    model = peft.get_peft_model(frozen, adapter(init_lora_weights=False, **changes))
    torch.manual_seed(seed)
    layers = adapter_layers(model)
    for layer in layers.values():
        for part in (*layer.lora_B.values(), *layer.lora_block.values()):
            torch.nn.init.normal_(part.weight, std=0.05)
    return layers


SHAPES = [
    {},
    {"symmetric": True},
    {"out_factor": 4},
    {"quantization_aware": False, "in_factor": 2},
    {"quantization_aware": False, "in_factor": 8, "out_factor": 1},
    {"adapter": "block"},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_metrics_equal_those_of_the_whole_weight_change(shape):
    layers = adapted(**shape)
    for row, layer in zip(measure(layers), layers.values(), strict=True):
        weight = layer.get_delta_weight("default").detach()
        scales = layer.get_base_layer().scales.float().repeat_interleave(32, dim=1)
        codes = (weight / scales).abs()  # scales without zero points may be negative
        singular = torch.linalg.svdvals(weight)
        assert row.shift_max == pytest.approx(float(codes.max()), rel=1e-5)
        assert row.shift_mean == pytest.approx(float(codes.mean()), rel=1e-5)
        assert row.norm == pytest.approx(float(weight.norm()), rel=1e-5)
        assert row.stable_rank == pytest.approx(float((weight.norm() / singular[0]) ** 2), rel=1e-4)


def test_the_top_singular_value_of_a_large_layer_is_found_without_a_decomposition():
    from qbl_trl.trl.metrics import _norms

    torch.manual_seed(0)
    delta = torch.randn(300, 200)  # a random matrix has the smallest gap: the hardest case
    total, top = _norms(delta)
    assert float(total) == pytest.approx(float(delta.norm() ** 2), rel=1e-5)
    assert float(top) == pytest.approx(float(torch.linalg.svdvals(delta)[0] ** 2), rel=0.05)  # 16 power steps


def test_an_untrained_adapter_measures_zero():
    import peft

    line = summarize(measure(adapter_layers(peft.get_peft_model(base(), adapter()))))
    assert line["qbl/zero_point_shift_max"] == line["qbl/adapter_norm"] == line["qbl/layers_beyond_half_a_code"] == 0
    assert line["qbl/stable_rank/q_proj"] == 0


def test_one_bad_weight_makes_the_metrics_not_finite():
    layers = adapted()
    assert is_finite(measure(layers))
    next(iter(layers.values())).lora_A["default"].weight.data[0, 0] = float("inf")
    assert not is_finite(measure(layers))


def read_the_weight(layer):
    """What a fused kernel does: its own product with the layer's weight."""
    attention = layer.self_attn
    attention.q_proj.forward = lambda x: x @ attention.q_proj.weight.T
    attention.q_proj.weight.requires_grad_(False)


def test_an_adapter_that_the_model_never_calls_is_named_once(tmp_path):
    model = tiny_llama(vocab_size=32)
    trainer = sft(tmp_path, QBLoRACallback(adapter(quantization_aware=False)), model=model)
    read_the_weight(model.model.layers[1])
    with pytest.warns(UserWarning, match=r"still zero: \S*layers\.1\.self_attn\.q_proj\. .*exclude_modules") as said:
        trainer.train()
    assert sum("still zero" in str(warning.message) for warning in said) == 1


def test_adapters_that_the_user_froze_or_that_all_train_are_not_warned_of(tmp_path):
    model = tiny_llama(vocab_size=32)
    trainer = sft(tmp_path, QBLoRACallback(adapter(quantization_aware=False)), model=model)
    model.model.layers[0].requires_grad_(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*still zero")
        trainer.train()


def test_every_reporter_and_the_history_see_the_metrics_at_logging_steps_only(tmp_path):
    class Reporter(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append(dict(logs))

    earlier, later = Reporter(), Reporter()
    trainer = sft(tmp_path, None, callbacks=[earlier, QBLoRACallback(adapter()), later], logging_steps=2)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in history] == [2, 4]
    for lines in (earlier.seen, later.seen, history):
        assert sum("qbl/zero_point_shift_max" in line for line in lines) == 2
    assert history[0]["qbl/adapter_norm"] > 0
