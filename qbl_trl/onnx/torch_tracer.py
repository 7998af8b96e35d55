"""Trace a skeleton with torch alone, for versions of transformers that Optimum does not take yet.

Inputs, outputs and their names are those that Optimum gives and ORTModelForCausalLM reads.
"""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.onnx import symbolic_helper
from transformers import DynamicCache, PreTrainedModel

from qbl_trl.errors import ExportError
from qbl_trl.generation import cache_argument, cache_of
from qbl_trl.onnx.layer_caches import RECURRENT, LayerCaches, filled, held, named_tensors
from qbl_trl.onnx.threads import replaced_here

NAME = "torch"
BATCH = 2
OPSET = 18
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
    """Raise ExportError if the model is no decoder with a cache."""
    missing = sorted({"input_ids", "attention_mask"} - set(inspect.signature(model.forward).parameters))
    missing += [] if cache_argument(model) else ["past_key_values"]
    why = f"its forward takes no {', '.join(missing)}" if missing else ""
    if why:
        raise ExportError(f"decoders of type {model.config.model_type!r} have no graph: {why}")


def write_graph(model: PreTrainedModel, path: Path, dtype: torch.dtype, caches: LayerCaches, tokens: int) -> None:
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
    for name, shape in named_tensors(caches):
        kind = torch.float32 if name.endswith(RECURRENT) else dtype
        sizes = [_PAST if size is None else size for size in shape]
        example[f"past_key_values.{name}"] = torch.zeros(BATCH, *sizes, dtype=kind)
        growing = {1 + axis for axis, size in enumerate(shape) if size is None}
        axes[f"past_key_values.{name}"] = {0: _BATCH, **dict.fromkeys(growing, _CACHED)}
        axes[f"present.{name}"] = {0: _BATCH, **dict.fromkeys(growing, _ALL_TOKENS)}
        outputs.append(f"present.{name}")
    if "position_ids" in inspect.signature(model.forward).parameters:
        example["position_ids"] = torch.arange(_PAST, _PAST + tokens).expand(BATCH, tokens)
        axes["position_ids"] = {0: _BATCH, 1: _TOKENS}
    with torch.no_grad(), replaced_here([(Tensor, "repeat_interleave", _repeat_interleave)]):
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


_repeat_any = Tensor.repeat_interleave


def _repeat_interleave(x: Tensor, repeats: Any, dim: int | None = None, **size: Any) -> Tensor:
    """Neighbours along an axis, as rotations of interleaved pairs have them: the tracer loses the rank of torch's."""
    if not isinstance(repeats, int) or dim is None:
        return _repeat_any(x, repeats, dim, **size)
    axis = dim % x.dim()
    apart = x.unsqueeze(axis + 1)
    sizes = [repeats if place == axis + 1 else -1 for place in range(apart.dim())]
    return apart.expand(sizes).flatten(axis, axis + 1)


class _Step(nn.Module):
    """Logits of new tokens and the cache with them, from tensors in the order of `names`."""

    def __init__(self, model: PreTrainedModel, names: list[str], caches: LayerCaches) -> None:
        super().__init__()
        self.model, self.names, self.caches = model, names, caches

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given: dict[str, Any] = dict(zip(self.names, tensors, strict=True))
        past = iter([given.pop(name) for name in self.names if name.startswith("past_key_values")])
        cache = DynamicCache()
        cache.layers = [filled(layer, {name: next(past) for name, _ in layer.tensors()}) for layer in self.caches]
        made = self.model(**given, **{str(cache_argument(self.model)): cache}, use_cache=True)
        layers = zip(self.caches, cache_of(made).layers, strict=True)
        return made.logits, *(tensor for layer, now in layers for tensor in held(layer, now))
