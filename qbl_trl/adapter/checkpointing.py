"""Gradient checkpointing over packed layers.

Re-entrant checkpointing needs inputs with a gradient. PEFT asks float models for it and leaves quantized ones to
`prepare_model_for_kbit_training`, which does not know this format, and which such a base does not need.
"""

import functools
from collections.abc import Callable
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from qbl_trl.adapter.recorded import quantization
from qbl_trl.config import GroupQuantConfig
from qbl_trl.generation import BEFORE_5
from qbl_trl.quant.head import input_table

_HOOK = "make_inputs_require_grads"  # what transformers calls its own, on the embedding


def is_checkpointing(model: nn.Module) -> bool:
    """Whether a model of transformers computes activations again in the backward pass."""
    return bool(getattr(model, _named(model, "is_{}_checkpointing"), False))


def stop_checkpointing_(model: nn.Module) -> None:
    """Let it keep its activations, as a model does that is not trained."""
    if is_checkpointing(model):
        getattr(model, _named(model, "{}_checkpointing_disable"))()


def _named(model: nn.Module, name: str) -> str:
    """By the name of later versions of transformers 5, where the model has it: the older one is deprecated there."""
    newer = name.format("activation")
    return newer if hasattr(type(model), newer) else name.format("gradient")


def let_inputs_require_grad(model: nn.Module) -> None:
    """Give the inputs of a model in groups a gradient, unless they have one; any other model is left to PEFT."""
    if not hasattr(model, "enable_input_require_grads") or not isinstance(quantization(model), GroupQuantConfig):
        return
    hooks = getattr(input_table(model), "_forward_hooks", {}).values()
    if not any(getattr(hook, "__name__", "") == _HOOK for hook in hooks):
        model.enable_input_require_grads()  # type: ignore[operator]
        let_towers_require_grad(model)


def let_towers_require_grad(model: Any) -> None:
    """The same for what reads images and sound, by convolutions: transformers 4.57 thinks of the embedding alone."""
    config: Any = getattr(model, "config", None)
    if not BEFORE_5 or not hasattr(config, "get_text_config") or config.get_text_config() is config:
        return
    for module in model.modules():
        if (
            isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
            and _require_grad not in module._forward_hooks.values()
        ):
            module.register_forward_hook(_require_grad)


def _require_grad(module: nn.Module, inputs: Any, output: Tensor) -> None:
    output.requires_grad_(True)


def register() -> None:
    """Have such models prepared as well: by PEFT, where they are checkpointing by then, and by transformers,
    where a trainer turns it on later."""
    cls: Any = PeftModel
    prepare = cls._prepare_model_for_gradient_checkpointing

    def prepare_model(self: Any, model: Any) -> Any:
        let_inputs_require_grad(model.get_base_model() if isinstance(model, PeftModel) else model)
        return prepare(self, model)

    cls._prepare_model_for_gradient_checkpointing = prepare_model
    for name in ("gradient_checkpointing_enable", "activation_checkpointing_enable"):
        if name in vars(PreTrainedModel):
            setattr(PreTrainedModel, name, _preparing(getattr(PreTrainedModel, name)))


def _preparing(enable: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(enable)
    def enable_checkpointing(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        enable(model, *args, **kwargs)
        let_inputs_require_grad(model)

    return enable_checkpointing
