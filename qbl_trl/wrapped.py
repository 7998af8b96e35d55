"""The transformers model under whatever wraps it, and run as it is by itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import PreTrainedModel

PATCHES = ("forward", "_original_forward")  # what trainers set on a module itself, hiding its class's own


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside a PeftModel and wrappers of distributed training or compilation."""
    while True:
        model = without_launch(model)
        if isinstance(model, PeftModel):
            model = model.get_base_model()
        elif isinstance(model, PeftMixedModel):
            model = model.base_model
        elif isinstance(model, BaseTuner):
            model = model.model
        else:
            return model


def without_launch(model: nn.Module) -> nn.Module:
    """A model, with its adapters, inside wrappers of distributed training or compilation."""
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            return model


def base_folder(model: nn.Module) -> Path | None:
    """The folder that a model was loaded from, if it was one."""
    named = getattr(getattr(unwrap(model), "config", None), "_name_or_path", "")
    return Path(named) if named and Path(named).is_dir() else None


def is_decoder(model: nn.Module) -> bool:
    """Whether a transformers model, without its wrappers, writes text by itself: no classifier, no encoder-decoder."""
    return isinstance(model, PreTrainedModel) and model.can_generate() and not model.config.is_encoder_decoder


@contextmanager
def unpatched_forward(model: nn.Module) -> Iterator[None]:
    """While open, the model runs by its classes' own `forward`, in its own precision."""
    own = [vars(module) for module in model.modules() if "_hf_hook" not in vars(module)]
    patched = [(attributes, name, attributes.pop(name)) for attributes in own for name in PATCHES if name in attributes]
    try:
        yield
    finally:
        for attributes, name, value in patched:
            attributes[name] = value


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off while open; every module gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
