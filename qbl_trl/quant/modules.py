"""Finding, replacing and cleaning modules of a transformers model."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from accelerate.hooks import add_hook_to_module
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qbl_trl.generation import BEFORE_5
from qbl_trl.wrapped import PATCHES

Model = TypeVar("Model", bound=nn.Module)


def replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of another; transformers will not initialize it again, nor its parents for it."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
    for parameter in layer.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    if not BEFORE_5:  # it asks each tensor, and fills the buffers of a module that is not marked
        return
    while parent:  # 4.57 goes by modules, and some of them (GPT-2's attention) reach into their children
        holder: Any = model.get_submodule(parent)
        if not any(True for _ in holder.parameters(recurse=False)):
            holder._is_hf_initialized = True
        parent = parent.rpartition(".")[0]


def empty_model(kind: type[nn.Module], config: Any) -> nn.Module:
    """A model of a class and configuration, built once more without memory: what the class itself has where."""
    try:
        with torch.device("meta"):
            return kind(copy.deepcopy(config))
    except NotImplementedError:  # Apertus' activation reads the numbers that it begins with, in 4.57
        with init_empty_weights(include_buffers=False):
            model = kind(copy.deepcopy(config))
        model.tie_weights()  # type: ignore[operator]
        return model


def copied(
    model: Model, given: Callable[[Tensor], Tensor | None], modules: Mapping[nn.Module, nn.Module] | None = None
) -> Model:
    """A second set of modules.

    What a module remembers of its last batch (RecurrentGemma's states) is copied by value, without its graph.

    Args:
        given: what stands there for a parameter or a buffer; None where it is copied.
        modules: those that stand there for modules, whole.
    """
    memo: dict[int, Any] = {id(old): new for old, new in (modules or {}).items()}
    for tensor in (*model.parameters(), *model.buffers()):
        found = given(tensor)
        if found is not None:
            memo[id(tensor)] = found
    for value in (value for module in model.modules() for kept in vars(module).values() for value in _items(kept)):
        if isinstance(value, Tensor) and not value.is_leaf:
            memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def _items(value: Any) -> Iterable[Any]:
    """What a list, a tuple or a dictionary holds, or a value itself."""
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list | tuple) else (value,)


def itself(tensor: Tensor) -> Tensor:
    """For `copied`: tensors are shared."""
    return tensor


def frozen(parameter: nn.Parameter) -> nn.Parameter:
    """The same storage in a parameter that does not train; one of another library's class as it is."""
    plain = type(parameter) is nn.Parameter
    return nn.Parameter(parameter.detach(), requires_grad=False) if plain else parameter


def on_meta(tensor: Tensor) -> Tensor:
    """A tensor of the same form that holds nothing, a parameter where it was one."""
    empty = tensor.detach().to("meta")
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def same_module_name(model: nn.Module, wanted: nn.Module) -> str:
    """Full name of a module that is known to be in the model."""
    return next(name for name, module in model.named_modules() if module is wanted)


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are spread over processes: FSDP2, FSDP1's flat parameters, DeepSpeed ZeRO-3."""
    marks = ("_sharded_size", "ds_id")
    return any(isinstance(p, DTensor) or any(hasattr(p, mark) for mark in marks) for p in model.parameters())


def plain_forward_(model: Model, placed: bool = True) -> Model:
    """Take off what trainers put on instances, in place: a copied module's patched `forward` runs the original.

    TRL's fused head and Accelerate's autocast both replace `forward` on the instance, in a closure over the old one.
    Accelerate's placement of a model over several devices is put back unless `placed` is False.
    """
    for module in model.modules():
        for name in PATCHES:
            vars(module).pop(name, None)
        hook = vars(module).pop("_hf_hook", None)
        if hook is not None:
            vars(module).pop("_old_forward", None)
            if placed:
                add_hook_to_module(module, hook)
    return model
