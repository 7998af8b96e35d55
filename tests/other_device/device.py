"""A device beside the CPU that needs no hardware: its tensors meet the CPU's as little as a GPU's do.

Each of its tensors holds one of the CPU, which does the arithmetic; results have the CPU's bits. What reads a tensor's
memory by its address, an operator that is given tensors of both devices, and `numpy()` fail as they do on a GPU, and
so does float64, which MPS and some XPUs have not.
Registered for the whole process and seen while `present()` is open, by the thread that opened it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "other"
DEVICE = f"{NAME}:0"
_aten = torch.ops.aten
_TAKE_INDICES = {
    *(_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default),
    _aten._unsafe_index.Tensor,
}
_MADE_FROM_DATA = {torch.tensor, torch.as_tensor, torch.asarray}


class _Module(backend_registration._DummyBackendModule):
    """What accelerate and transformers ask of `torch.<device>`."""

    def set_device(self, device: Any) -> None: ...

    def empty_cache(self) -> None: ...

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16]


def register() -> None:
    """Make the device's name known to torch, once for a process."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Module())


class OtherTensor(Tensor):
    """A tensor of the device; `held` is the CPU's."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, requires_grad: bool = False) -> "OtherTensor":
        """The device's tensor over a tensor of the CPU."""
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = Tensor._make_wrapper_subclass(cls, held.size(), device=DEVICE, requires_grad=requires_grad, **layout)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self, **options: Any) -> str:
        return f"{DEVICE} {self.held}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            made: Tensor = OtherTensor(self.held.detach().clone(), self.requires_grad)
            parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(made, self.requires_grad) if parameter else made
        return memo[id(self)]


OtherTensor.__module__ = "torch"  # layers are told apart by the packages that their tensors come from


@contextmanager
def present() -> Iterator[None]:
    """The device can be named, and tensors moved to it."""
    with _Calls(), _Operators():
        yield


class _Operators(TorchDispatchMode):
    """Operators that make tensors from nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operator, on what the tensors hold."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    here = [tensor for tensor in tensors if isinstance(tensor, OtherTensor)]
    asked = kwargs.get("device")
    on_device = bool(here) if asked is None else torch.device(asked).type == NAME
    if func is not _aten._to_copy.default and func is not _aten.copy_.default and here:
        indices = func in _TAKE_INDICES and isinstance(args[0], OtherTensor)
        if not indices and any(tensor.dim() for tensor in tensors if not isinstance(tensor, OtherTensor)):
            devices = [(tuple(tensor.shape), str(tensor.device)) for tensor in tensors]
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found {devices}")
    given, options = tree_map(_held, (args, kwargs))
    if asked is not None:
        options["device"] = torch.device("cpu")
    if func is _aten.histc.default:
        given = (given[0].float(), *given[1:])  # of integers on GPUs, not on the CPU
    result = func(*given, **options)
    if func is _aten.copy_.default:
        return args[0]
    same = {id(tensor.held): tensor for tensor in here}
    return tree_map(lambda made: _placed(made, same), result) if on_device else result


def _held(value: Any) -> Any:
    return value.held if isinstance(value, OtherTensor) else value


def _placed(made: Any, same: dict[int, OtherTensor]) -> Any:
    """A result on the device; what an operator changed in place is the tensor it was given."""
    if not isinstance(made, Tensor) or isinstance(made, OtherTensor):
        return made
    if made.dtype == torch.float64:
        raise TypeError(f"{DEVICE} has no float64")
    return same.get(id(made)) if id(made) in same else OtherTensor(made)


class _Calls(TorchFunctionMode):
    """What reaches a tensor's memory before any operator does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _MADE_FROM_DATA and kwargs.get("device") and torch.device(kwargs["device"]).type == NAME:
            del kwargs["device"]
            requires_grad = kwargs.pop("requires_grad", False)
            return func(*args, **kwargs).to(DEVICE).requires_grad_(requires_grad)
        first = args[0] if args else None
        if not isinstance(first, OtherTensor):
            return func(*args, **kwargs)
        if func is Tensor.numpy:
            raise TypeError(f"can't convert {DEVICE} device type tensor to numpy; use Tensor.cpu() first")
        if func is Tensor.tolist:
            return first.held.tolist()
        if func in (Tensor.untyped_storage, Tensor.storage):  # PEFT and safetensors compare addresses
            return first.held.untyped_storage()
        if func == Tensor.data.__set__ and isinstance(args[1], OtherTensor):
            first.held = args[1].held
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            parts = tuple(torch.tensor(part).to(DEVICE) if isinstance(part, list) else part for part in parts)
            args = (first, parts if isinstance(args[1], tuple) else parts[0], *args[2:])
        return func(*args, **kwargs)
