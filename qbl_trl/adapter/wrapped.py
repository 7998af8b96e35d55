"""The transformers model under whatever wraps it."""

from peft import PeftModel
from torch import nn


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside a PeftModel and wrappers of distributed training or compilation."""
    while True:
        if isinstance(model, PeftModel):
            model = model.get_base_model()
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model
