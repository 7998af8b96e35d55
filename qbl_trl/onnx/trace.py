"""Trace a skeleton through Optimum: its inputs, outputs, cache names and patches are the ones that
ORTModelForCausalLM expects, for every architecture that Optimum knows."""

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from optimum.exporters.onnx.convert import export_pytorch
from optimum.exporters.tasks import TasksManager

from qbl_trl.errors import ExportError
from qbl_trl.onnx.skeleton import Skeleton

_TASK = "text-generation-with-past"
_OPSET = 18
_FLOAT_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def trace(skeleton: Skeleton, dtype: torch.dtype) -> ir.Model:
    """Trace the skeleton into a graph with placeholders.

    Args:
        dtype: float type of the graph's inputs and outputs.

    Raises:
        ExportError: if Optimum has no export configuration for this architecture.
    """
    config = _onnx_config(skeleton, dtype)
    # Sizes 1 and 2 are best avoided: the tracer takes them for broadcasting and for constants.
    shapes = {"batch_size": 2, "sequence_length": 5}
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder, "model.onnx")
        export_pytorch(skeleton.model, config, _OPSET, path, input_shapes=shapes)
        model = ir.load(path)
        ir.external_data.load_to_model(model)
    return model


def _onnx_config(skeleton: Skeleton, dtype: torch.dtype) -> Any:
    config = skeleton.model.config
    supported = TasksManager.get_supported_tasks_for_model_type
    try:
        tasks = supported(config.model_type, "onnx", library_name="transformers")
    except KeyError:
        tasks = {}
    if _TASK not in tasks:
        raise ExportError(
            f"Optimum has no ONNX configuration for decoders of type {config.model_type!r}; register one with "
            "optimum.exporters.tasks.TasksManager.create_register('onnx') and export again"
        )
    constructor = TasksManager.get_exporter_config_constructor(
        "onnx", model=skeleton.model, task=_TASK, library_name="transformers"
    )
    return constructor(config, float_dtype=_FLOAT_NAMES[dtype], use_past=True, use_past_in_inputs=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the tracer's warnings about Python values: placeholders make their number harmless."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
