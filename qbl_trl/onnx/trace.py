"""Trace a skeleton into a graph with placeholders: through Optimum, or by torch alone where Optimum does not go."""

import importlib
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from qbl_trl.errors import ExportError, first_line
from qbl_trl.generation import BEFORE_5
from qbl_trl.onnx.alibi import bias_rounded
from qbl_trl.onnx.complex_rotary import rotated_in_real_numbers
from qbl_trl.onnx.experts import every_expert_asked, traced_tokens
from qbl_trl.onnx.layer_caches import LayerCaches, layer_caches, named_tensors
from qbl_trl.onnx.recurrent import Calls, recurrences_traced
from qbl_trl.onnx.skeleton import Skeleton, Unfusable
from qbl_trl.random_state import same_random_state

# Optimum pins transformers to 4.57.
_tracer: Any = importlib.import_module(f"qbl_trl.onnx.{'optimum' if BEFORE_5 else 'torch'}_tracer")


class Untraceable(ExportError):
    """The tracer or Optimum fails on a model.

    Attributes:
        brief: what failed, without what it means for an export that ends there.
    """

    def __init__(self, brief: str) -> None:
        self.brief = brief.rstrip(".")
        super().__init__(
            f"{self.brief}. Nothing was written. If the float model cannot be traced either, this is a limit of "
            f"{_tracer.NAME}"
        )


def trace(skeleton: Skeleton, dtype: torch.dtype) -> ir.Model:
    """Trace the skeleton into a graph with placeholders.

    Args:
        dtype: float type of the graph's inputs and outputs.

    Raises:
        Untraceable: if the trace fails.
        Unfusable: if a placeholder does not fit the model.
        ExportError: if the model's cache has no form, or there is no room for the trace.
    """
    tokens = traced_tokens(skeleton.model.config)
    with (
        tempfile.TemporaryDirectory() as folder,
        _quiet(),
        same_random_state(),
        every_expert_asked(),
        bias_rounded(skeleton.model),
        rotated_in_real_numbers(skeleton.model),
        recurrences_traced(skeleton.model) as calls,
    ):
        path = Path(folder, "model.onnx")
        try:
            caches = layer_caches(skeleton.model)
            _check_states(skeleton.model, caches, calls)
            _tracer.write_graph(skeleton.model, path, dtype, caches, tokens)
        except (Unfusable, ExportError):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:
                where = tempfile.gettempdir()
                raise ExportError(f"{where} (TMPDIR), where the graph is traced: {error.strerror}") from error
            reason = f"{type(error).__name__}: {first_line(error)}".removesuffix(": ")
            raise Untraceable(
                f"a {type(skeleton.model).__name__} could not be traced: {reason}{_of_adapters(skeleton.model)}"
            ) from error
        model = ir.load(path)
        ir.external_data.load_to_model(model)
    _state_caches(model, caches)
    _count_booleans(model)
    return model


def _of_adapters(model: PreTrainedModel) -> str:
    """What may be at fault: adapters of PEFT's own that read the weight below them, or have functions of their own."""
    modules = {type(part).__module__ for part in model.modules() if isinstance(part, BaseTunerLayer)}
    kinds = {module.removeprefix("peft.tuners.").partition(".")[0] for module in modules}
    return f". It carries adapters of PEFT ({', '.join(sorted(kinds))}): merge_and_unload() them first" * bool(kinds)


def _check_states(model: PreTrainedModel, caches: LayerCaches, calls: Calls) -> None:
    """Raise ExportError if states come from other functions than those that are replaced, once a layer or several times
    (Zamba)."""
    kept = Counter(name for layer in caches for name in layer.states)
    if kept.keys() != calls.keys() or any(calls[name] % layers for name, layers in kept.items()):
        raise ExportError(
            f"a {type(model).__name__} keeps states ({', '.join(sorted(kept))}) by a recurrence or convolution that no "
            "operator computes; nothing was written"
        )


def check_supported(model: PreTrainedModel) -> None:
    """Raise ExportError if this architecture cannot be traced, as far as its forward tells, or its adapters cannot."""
    _tracer.check_supported(model)
    stacked = next((name for name, part in model.named_modules() if type(part).__name__ == "ParamWrapper"), None)
    if stacked is not None:
        raise ExportError(
            f"{stacked}: PEFT put a LoRA on a tensor that stacks experts (target_parameters), which no trace follows; "
            "export what merge_and_unload() gives"
        )


def _count_booleans(model: ir.Model) -> None:
    """torch sums booleans and compares the counts with booleans, as the mask of attention in chunks does (Llama 4)."""
    for node in [node for node in model.graph if node.op_type == "CumSum"]:
        told = node.inputs[0]
        made = None if told is None else told.producer()
        if made is not None and made.op_type == "Cast" and made.attributes["to"].as_int() == ir.DataType.BOOL:
            _as_integer(model, node, 0)
            for use in list(node.outputs[0].uses()):
                if use.node.op_type == "Equal":
                    _as_integer(model, use.node, 1 - use.idx)


def _as_integer(model: ir.Model, node: ir.Node, index: int) -> None:
    cast = ir.node("Cast", [node.inputs[index]], {"to": int(ir.DataType.INT64)}, name=f"{node.name}/number_{index}")
    cast.outputs[0].name, cast.outputs[0].type = f"{cast.name}/out", ir.TensorType(ir.DataType.INT64)
    model.graph.insert_before(node, cast)
    node.replace_input_with(index, cast.outputs[0])


def _state_caches(model: ir.Model, caches: LayerCaches) -> None:
    """Write the caches' sizes where the tracer lost them."""
    outputs = {value.name: value for value in model.graph.outputs}
    for name, shape in named_tensors(caches):
        value = outputs.get(f"present.{name}")
        if value is not None and value.shape is not None and len(value.shape) == 1 + len(shape):
            known = list(value.shape)
            value.shape = ir.Shape(
                [known[0], *(known[1 + axis] if size is None else size for axis, size in enumerate(shape))]
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the tracer's warnings about Python values: placeholders make their number harmless."""
    logger = logging.getLogger("torch.onnx")
    level, told = logger.level, torch._C._jit_onnx_log
    logger.setLevel(logging.ERROR)
    # A trace that fails would print its whole graph: torch 2.13 turns this log on whatever it was told before.
    torch._C._jit_onnx_log = lambda *parts: None  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        torch._C._jit_onnx_log = told  # type: ignore[assignment]
