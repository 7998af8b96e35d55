"""Layers of float models whose weight the module around them reads itself, as the source of its class says.

    x.to(self.wo.weight.dtype)                      activations take the type of the weight: codes are no type for them
    dtype = self.proj.weight.dtype; self.proj(x.to(dtype))
    F.linear(x, self.query.weight), F.conv2d(x, self.k_proj.weight.unsqueeze(-1), ...)

A packed layer has its codes under that name, so it cannot stand there. Where the source itself leaves out weights of
uint8, nothing is read of packed ones.
"""

import inspect
import re
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

_CAST = re.compile(r"\.(?:to|type_as)\(\s*(?:[^()]*\bdtype=)?self\.(\w+)\.weight(?:\.dtype)?\s*[,)]")
_TYPE = re.compile(r"(\w+) = self\.(\w+)\.weight\.dtype\s*$", re.MULTILINE)
_READ = r"(?:[^()]|\([^()]*\))*?\bself\.(\w+)\.weight\b(?!\.(?:device|dtype|shape))"
_PRODUCT = re.compile(r"\b(?:F|functional)\.(?:linear|conv[123]d)\(" + _READ)
_COMMENT = re.compile(r"#.*")
_known: WeakKeyDictionary[type, frozenset[str]] = WeakKeyDictionary()


def read_by_others(model: nn.Module) -> set[str]:
    """Full names of the linear layers of a model whose weight is read in one of these ways."""
    return {
        f"{path}.{child}" if path else child
        for path, module in model.named_modules()
        for child in read_by(type(module))
        if isinstance(module._modules.get(child), nn.Linear)
    }


def read_by(kind: type[nn.Module]) -> frozenset[str]:
    """Names of the children whose weight methods of a class read."""
    if kind not in _known:
        _known[kind] = frozenset(name for text in _sources(kind) for name in _names(_COMMENT.sub("", text)))
    return _known[kind]


def _names(text: str) -> Iterator[str]:
    found = {*_CAST.findall(text), *_PRODUCT.findall(text)}
    found |= {
        name for kept, name in _TYPE.findall(text) if re.search(rf"self\.{name}\(.*\.to\((dtype=)?{kept}\)", text)
    }
    return (name for name in found if f"self.{name}.weight.dtype != torch.uint8" not in text)


def _sources(kind: type[nn.Module]) -> Iterator[str]:
    """The source of every method that reads a weight and that no class below has replaced."""
    seen = set[str]()
    for part in kind.__mro__:
        if part.__module__.startswith("torch."):
            continue
        for name, value in vars(part).items():
            if name.startswith("__") or name in seen or not callable(value):
                continue
            seen.add(name)
            try:
                method: Any = inspect.unwrap(value)
                if "weight" in getattr(getattr(method, "__code__", None), "co_names", ()):
                    yield inspect.getsource(method)
            except (OSError, TypeError, ValueError):  # made without a file, or no function at all
                continue
