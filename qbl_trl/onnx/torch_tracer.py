"""Trace a skeleton with torch alone, for versions of transformers that Optimum does not take yet.

Inputs, outputs and their names are those that Optimum gives and ORTModelForCausalLM reads.
"""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.onnx import symbolic_helper
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from qbl_trl.errors import ExportError
from qbl_trl.generation import cache_argument, cache_of

NAME = "torch"
BATCH = 2
OPSET = 18
CacheSizes = list[tuple[int, int, int] | None]  # heads, key size and value size of each layer; None: another's
_PAST = 3  # tokens of the traced cache: no other axis has this size by default

_BATCH, _TOKENS, _CACHED = "batch_size", "sequence_length", "past_sequence_length"
_ALL_TOKENS = f"{_CACHED} + {_TOKENS}"


@symbolic_helper.parse_args("v")
def _expm1(g: Any, x: Any) -> Any:
    return g.op("Sub", g.op("Exp", x), g.op("CastLike", g.op("Constant", value_t=torch.tensor(1.0)), x))


@symbolic_helper.parse_args("v", "is", "v", "f")
def _rms_norm(g: Any, x: Any, normalized_shape: list[int], weight: Any, epsilon: float) -> Any:
    axes = g.op("Constant", value_t=torch.arange(-len(normalized_shape), 0))
    floor = g.op("CastLike", g.op("Constant", value_t=torch.tensor(epsilon)), x)
    mean = g.op("Add", g.op("ReduceMean", g.op("Mul", x, x), axes, keepdims_i=1), floor)
    y = g.op("Div", x, g.op("Sqrt", mean))
    return y if symbolic_helper._is_none(weight) else g.op("Mul", y, weight)


# What torch's tracer does not write.
for _name, _symbolic in (("expm1", _expm1), ("rms_norm", _rms_norm)):
    torch.onnx.register_custom_op_symbolic(f"aten::{_name}", _symbolic, OPSET)  # type: ignore[attr-defined]


def check_supported(model: PreTrainedModel) -> None:
    """Raise ExportError if the model is no decoder with a cache of keys and values."""
    missing = sorted({"input_ids", "attention_mask"} - set(inspect.signature(model.forward).parameters))
    missing += [] if cache_argument(model) else ["past_key_values"]
    if missing or model._is_stateful:
        why = f"its forward takes no {', '.join(missing)}" if missing else "its cache is no cache of keys and values"
        raise ExportError(f"decoders of type {model.config.model_type!r} have no graph: {why}")


def write_graph(model: PreTrainedModel, path: Path, dtype: torch.dtype, caches: CacheSizes, tokens: int) -> None:
    """Trace a model into a file.

    Args:
        dtype: float type of inputs and outputs.
        caches: of each layer.
        tokens: of each row of the example that is traced.
    """
    example: dict[str, Tensor] = {
        "input_ids": torch.zeros(BATCH, tokens, dtype=torch.long),
        "attention_mask": torch.ones(BATCH, _PAST + tokens, dtype=torch.long),
    }
    axes = {
        "input_ids": {0: _BATCH, 1: _TOKENS},
        "attention_mask": {0: _BATCH, 1: _ALL_TOKENS},
        "logits": {0: _BATCH, 1: _TOKENS},
    }
    outputs = ["logits"]
    for name, heads, width in named_sizes(caches):
        example[f"past_key_values.{name}"] = torch.zeros(BATCH, heads, _PAST, width, dtype=dtype)
        axes[f"past_key_values.{name}"] = {0: _BATCH, 2: _CACHED}
        axes[f"present.{name}"] = {0: _BATCH, 2: _ALL_TOKENS}
        outputs.append(f"present.{name}")
    if "position_ids" in inspect.signature(model.forward).parameters:
        example["position_ids"] = torch.arange(_PAST, _PAST + tokens).expand(BATCH, tokens)
        axes["position_ids"] = {0: _BATCH, 1: _TOKENS}
    with torch.no_grad():
        torch.onnx.export(
            _Step(model, list(example), caches),
            tuple(example.values()),
            str(path),
            input_names=list(example),
            output_names=outputs,
            dynamic_axes=axes,
            opset_version=OPSET,
            dynamo=False,
        )


def named_sizes(caches: CacheSizes) -> Iterator[tuple[str, int, int]]:
    """Name, heads and size of every cache, keys before values: ("0.key", 3, 64), ("0.value", 3, 64), ..."""
    for layer, size in enumerate(caches):
        if size is not None:
            heads, keys, values = size
            yield from ((f"{layer}.key", heads, keys), (f"{layer}.value", heads, values))


class _Step(nn.Module):
    """Logits of new tokens and the cache with them, from tensors in the order of `names`."""

    def __init__(self, model: PreTrainedModel, names: list[str], caches: CacheSizes) -> None:
        super().__init__()
        self.model, self.names, self.caches = model, names, caches

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given: dict[str, Any] = dict(zip(self.names, tensors, strict=True))
        past = iter([given.pop(name) for name in self.names if name.startswith("past_key_values")])
        cache = DynamicCache()
        cache.layers = [_another() if size is None else _filled(next(past), next(past)) for size in self.caches]
        made = self.model(**given, **{str(cache_argument(self.model)): cache}, use_cache=True)
        own = [layer for layer, size in zip(cache_of(made).layers, self.caches, strict=True) if size is not None]
        return made.logits, *(tensor for layer in own for tensor in (layer.keys, layer.values))


def _another() -> Any:
    """Stands for keys and values that another layer has."""
    from transformers.cache_utils import DummyLayer  # of transformers 5

    return DummyLayer()


def _filled(keys: Tensor, values: Tensor) -> DynamicLayer:
    layer = DynamicLayer()
    layer.keys, layer.values = keys, values
    layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
    return layer
