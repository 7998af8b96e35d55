"""Gradient checkpointing over packed layers.

Re-entrant checkpointing needs inputs with a gradient. PEFT asks float models for it and leaves quantized ones to
`prepare_model_for_kbit_training`, which does not know this format, and which such a base does not need.
"""

from typing import Any

from peft import PeftModel
from torch import nn

from qbl_trl.adapter.recorded import quantization
from qbl_trl.config import GroupQuantConfig


def let_inputs_require_grad(model: nn.Module) -> None:
    """Give the inputs of a model in groups a gradient; any other model is left to PEFT."""
    if isinstance(quantization(model), GroupQuantConfig):
        model.enable_input_require_grads()  # type: ignore[operator]


def register() -> None:
    """Have `PeftModel.prepare_model_for_gradient_checkpointing` prepare such models as well (once)."""
    cls: Any = PeftModel
    prepare = cls._prepare_model_for_gradient_checkpointing

    def prepare_model(self: Any, model: Any) -> Any:
        let_inputs_require_grad(model.get_base_model() if isinstance(model, PeftModel) else model)
        return prepare(self, model)

    cls._prepare_model_for_gradient_checkpointing = prepare_model
