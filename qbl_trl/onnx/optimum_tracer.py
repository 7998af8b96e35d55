"""Trace a skeleton through Optimum: its configurations and patches of every architecture that it knows."""

import inspect
from functools import partial
from pathlib import Path
from typing import Any

import torch
from optimum.exporters.onnx.convert import export_pytorch
from optimum.exporters.onnx.model_configs import LlamaOnnxConfig
from optimum.exporters.tasks import TasksManager
from optimum.utils import DummyPastKeyValuesGenerator, DummyTextInputGenerator, NormalizedTextConfig
from transformers import PreTrainedModel

from qbl_trl.errors import ExportError
from qbl_trl.onnx.layer_caches import LayerCaches
from qbl_trl.onnx.torch_tracer import BATCH, OPSET

NAME = "Optimum"
_TASK = "text-generation-with-past"
_COMMON_INPUTS = {"input_ids", "attention_mask", "position_ids", "past_key_values"}
# States that transformers 4.57 computes in another way in each of these, and 5 by the functions of `recurrent.py`.
_WITH_STATES = ("bamba", "falcon_h1", "granitemoehybrid", "lfm2", "lfm2_moe", "mamba2", "qwen3_next", "zamba2")
_FLOAT_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def check_supported(model: PreTrainedModel) -> None:
    """Raise ExportError if this architecture has no export configuration and does not take the common one."""
    if _is_known(model.config.model_type):
        return
    if model.config.model_type in _WITH_STATES:
        raise ExportError(
            f"decoders of type {model.config.model_type!r}, which keep states beside keys and values, have graphs with "
            'transformers 5 alone: pip install "qbl-trl[onnx5]" into an environment of its own. Merged folders and '
            "adapters open there"
        )
    missing = sorted(_COMMON_INPUTS - set(inspect.signature(model.forward).parameters))
    if missing or model._is_stateful:
        why = f"its forward takes no {', '.join(missing)}" if missing else "its cache is no cache of keys and values"
        raise ExportError(
            f"Optimum has no ONNX configuration for decoders of type {model.config.model_type!r}, and the one that "
            f"most decoders share does not fit: {why}. Register one with "
            "optimum.exporters.tasks.TasksManager.create_register('onnx') and export again"
        )


def _is_known(model_type: str) -> bool:
    try:
        tasks = TasksManager.get_supported_tasks_for_model_type(model_type, "onnx", library_name="transformers")
    except KeyError:
        return False
    return _TASK in tasks


def write_graph(model: PreTrainedModel, path: Path, dtype: torch.dtype, caches: LayerCaches, tokens: int) -> None:
    """Trace a model into a file.

    Args:
        dtype: float type of inputs and outputs.
        caches: of each layer.
        tokens: of each row of the example that is traced.
    """
    constructor: Any = partial(_AnyDecoder, task=_TASK.removesuffix("-with-past"))
    described = model.config
    if _is_known(described.model_type):
        constructor = TasksManager.get_exporter_config_constructor(
            "onnx", model=model, task=_TASK, library_name="transformers"
        )
    else:
        described = described.get_text_config()
    config = constructor(described, float_dtype=_FLOAT_NAMES[dtype], use_past=True, use_past_in_inputs=True)
    _correct_caches(config, caches)
    export_pytorch(model, config, OPSET, path, input_shapes={"batch_size": BATCH, "sequence_length": tokens})


class _AnyDecoder(LlamaOnnxConfig):  # type: ignore[misc]
    """Inputs and outputs that most decoders share; whether they suit one shows at the parity gate."""

    NORMALIZED_CONFIG_CLASS = NormalizedTextConfig
    DUMMY_INPUT_GENERATOR_CLASSES = (DummyTextInputGenerator, DummyPastKeyValuesGenerator)
    DUMMY_PKV_GENERATOR_CLASS = DummyPastKeyValuesGenerator


def _correct_caches(config: Any, caches: LayerCaches) -> None:
    """Let the example inputs have the caches the model really makes; Optimum takes some sizes from wrong settings."""
    original = config.generate_dummy_inputs

    def generate(*args: Any, **kwargs: Any) -> Any:
        inputs = original(*args, **kwargs)
        own = [layer.keys for layer in caches if layer.keys is not None]
        if len(inputs["past_key_values"]) != len(own):
            raise TypeError(f"{len(own)} caches for {len(inputs['past_key_values'])} layers; shared ones have no form")
        inputs["past_key_values"] = [
            (_resized(keys, heads, key_size), _resized(values, heads, value_size))
            for (keys, values), (heads, key_size, value_size) in zip(inputs["past_key_values"], own, strict=True)
        ]
        return inputs

    config.generate_dummy_inputs = generate


def _resized(cache: torch.Tensor, heads: int, size: int) -> torch.Tensor:
    fits = cache.shape[1] == heads and cache.shape[3] == size
    return cache if fits else cache.new_zeros(cache.shape[0], heads, cache.shape[2], size)
