"""What surrounds the graph: the model that is read, and the files beside it (config, tokenizer)."""

import copy
import importlib
import shutil
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from qbl_trl.errors import ExportError

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
)


def load_model(model_or_path: Any) -> torch.nn.Module:
    """A model as it is, or the one a folder holds.

    Raises:
        ExportError: if the folder holds none.
    """
    if isinstance(model_or_path, torch.nn.Module):
        return model_or_path
    if not isinstance(model_or_path, (str, PathLike)):
        raise ExportError(f"export_onnx takes a model or a folder, not a {type(model_or_path).__name__}")
    folder = Path(model_or_path)
    importlib.import_module("qbl_trl")  # registers our quantization config and adapter type
    if (folder / "adapter_config.json").is_file():
        adapted: torch.nn.Module = importlib.import_module("peft").AutoPeftModelForCausalLM.from_pretrained(folder)
        return adapted
    if not (folder / "config.json").is_file():
        raise ExportError(f"{folder} holds no model: neither config.json nor adapter_config.json is there")
    auto = importlib.import_module("transformers").AutoModelForCausalLM
    model: torch.nn.Module = auto.from_pretrained(folder, torch_dtype="auto")
    return model


def causal_lm(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers decoder inside `model`.

    Raises:
        ExportError: if there is none.
    """
    unwrap = getattr(model, "get_base_model", None)
    inner = unwrap() if unwrap is not None else model
    if not isinstance(inner, PreTrainedModel) or not inner.can_generate() or inner.config.is_encoder_decoder:
        raise ExportError(
            f"export_onnx: a {type(inner).__name__} is no decoder of transformers; load it with AutoModelForCausalLM"
        )
    return inner


def max_positions(config: Any) -> int:
    """Longest text the model was made for."""
    config = config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2048)


def write(model: PreTrainedModel, source: Any, tokenizer: Any, folder: Path, dtype: torch.dtype) -> None:
    """Configuration, generation settings and tokenizer, as ORTModelForCausalLM reads them."""
    config = copy.deepcopy(model.config)
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        for name in ("quantization_config", "_pre_quantization_dtype"):
            if hasattr(part, name):
                delattr(part, name)
    config.dtype = dtype
    config.use_cache = True
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None and hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
        return
    origin = tokenizer or (source if isinstance(source, (str, PathLike)) else model.config._name_or_path)
    for name in _TOKENIZER_FILES:
        path = Path(origin or "", name)
        if origin and path.is_file():
            shutil.copyfile(path, folder / name)
