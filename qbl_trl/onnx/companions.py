"""What surrounds the graph: the model that is read, and the files beside it (config, tokenizer)."""

import copy
import gc
import json
import logging
import tempfile
from os import PathLike
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from transformers import PreTrainedModel

from qbl_trl.errors import ExportError, first_line
from qbl_trl.folders import is_adapter
from qbl_trl.loading import open_folder, saved_adapter
from qbl_trl.model_files import valid_generation
from qbl_trl.onnx.caches import served
from qbl_trl.onnx.layers import LinearSource
from qbl_trl.onnx.packed_embeddings import Tables, with_tables
from qbl_trl.onnx.rotary import fixed_length, is_rotary
from qbl_trl.onnx.sources import Taken, linear_sources
from qbl_trl.tokenizers import OF_THE_DISK, open_tokenizer, save_tokenizer
from qbl_trl.wrapped import base_folder, is_decoder, unwrap, without_launch

logger = logging.getLogger(__name__)


class Held:
    """The model to export. What was read from a folder is let go while ONNX Runtime holds its own copy of the weights.

    Args:
        model_or_path: a model, or a folder of one.

    Attributes:
        config, generation_config: the decoder's.
        traces: graphs with placeholders, by float type, fused and spelled-out attention: one that is written twice is
            traced once. They hold no weight that has a placeholder, and stay when the model is let go.

    Raises:
        ExportError: if there is no decoder of transformers in it.
    """

    def __init__(self, model_or_path: Any) -> None:
        self._given = model_or_path
        self._model: torch.nn.Module | None = load_model(model_or_path)
        decoder = self.decoder()
        absent = next((name for name, tensor in decoder.named_parameters() if tensor.is_meta), None)
        if absent is not None:
            raise ExportError(f"{absent} is on no device (meta); load the model whole, without offloading")
        self.config, self.generation_config = decoder.config, decoder.generation_config
        self.traces: dict[tuple[torch.dtype, bool, bool], ir.Model] = {}
        self._taken: Taken = {}
        self._tables: Tables | None = None

    def model(self) -> torch.nn.Module:
        """The model as it was given, or read (again) from its folder."""
        if self._model is None:
            self._model = load_model(self._given)
            if self._tables is not None:
                self.take(self._tables)
        return self._model

    def linears(self) -> dict[str, LinearSource]:
        """The decoder's linear layers. Those of other libraries are taken over once."""
        return linear_sources(self.decoder(), self._taken)

    def take(self, tables: Tables) -> None:
        """Hold a copy from now on that has these in the places of its embedding and head."""
        self._tables = tables
        self._model = with_tables(self.model(), self.decoder(), tables)

    def decoder(self) -> PreTrainedModel:
        """The transformers decoder inside the model."""
        return causal_lm(self.model())

    def let_go(self) -> None:
        """Drop the weights, where they can be read again."""
        if not isinstance(self._given, torch.nn.Module):
            self._model = None
            self._taken.clear()
            gc.collect()  # traced modules lie in cycles


def folders_of(model_or_path: Any) -> tuple[Any, ...]:
    """What a graph is made from: the folder that is given or was loaded, and that of an adapter's base."""
    if isinstance(model_or_path, (str, PathLike)):
        base = saved_adapter(model_or_path).base_model_name_or_path if is_adapter(model_or_path) else None
        return model_or_path, base or None
    return (base_folder(model_or_path),) if isinstance(model_or_path, torch.nn.Module) else ()


def load_model(model_or_path: Any) -> torch.nn.Module:
    """A model as it is, or the one a folder holds.

    Raises:
        ExportError: if the folder holds none.
    """
    if isinstance(model_or_path, torch.nn.Module):
        return without_launch(model_or_path)
    if not isinstance(model_or_path, (str, PathLike)):
        raise ExportError(f"export_onnx takes a model or a folder, not a {type(model_or_path).__name__}")
    model: torch.nn.Module = open_folder(model_or_path, "auto", ExportError)
    return model


def causal_lm(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers decoder inside `model`.

    Raises:
        ExportError: if there is none.
    """
    inner = unwrap(model)
    if any(getattr(config, "is_prompt_learning", False) for config in getattr(model, "peft_config", {}).values()):
        raise ExportError(
            "export_onnx: prompt and prefix tuning put trained vectors before a text's tokens, and a graph reads "
            "tokens alone; export the base (get_base_model()), or train adapters on its layers"
        )
    if not is_decoder(inner):
        raise ExportError(
            f"export_onnx: a {type(inner).__name__} is no decoder of transformers that generates text; a graph is made "
            "of a ...ForCausalLM"
        )
    return inner


def warn_of_towers(decoder: PreTrainedModel) -> None:
    """Say that a graph over token ids holds no tower for images or sound."""
    if decoder.config.get_text_config() is not decoder.config:
        logger.warning(
            "a %s reads images or sound, too: the graph will hold its text side alone, which answers to token ids",
            type(decoder).__name__,
        )


def check_tokenizer(given: Any) -> Any:
    """A tokenizer or a folder as it is; a model id is opened.

    Raises:
        ExportError: if it is neither, or a folder whose files are damaged.
    """
    if not isinstance(given, (str, PathLike)):
        return given
    try:
        if Path(given).is_dir():
            for file in Path(given).glob("tokenizer*.json"):
                json.loads(file.read_text(encoding="utf-8"))
            return given
        return open_tokenizer(given)
    except Exception as error:
        reason = first_line(error) or type(error).__name__
        what = "holds files that cannot be read" if Path(given).is_dir() else "is no folder, nor a model id"
        raise ExportError(f"export_onnx: tokenizer={str(given)!r} {what}: {reason}") from error


def max_positions(decoder: PreTrainedModel, wanted: int | None) -> int:
    """The longest text of a graph: as wanted, or the one the model was made for.

    Raises:
        ExportError: if the model has learned positions, or biases instead, and not for as many tokens; if it attends
            in another way to texts that long.
    """
    config = decoder.config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    own = next((int(found) for name in names if (found := getattr(config, name, None))), None)
    # Doge chooses among the keys of longer texts, by a branch that no trace holds.
    kept = getattr(config, "keep_window_size", None)
    if kept is not None and (wanted or own or kept) > kept:
        raise ExportError(
            f"export_onnx: a {type(decoder).__name__} attends in another way to texts of more than {kept} tokens "
            f"(keep_window_size), which no graph holds; pass max_length={kept}"
        )
    if wanted is not None and own is not None and wanted > own and not any(map(is_rotary, decoder.modules())):
        raise ExportError(
            f"export_onnx: max_length={wanted}, and a {type(decoder).__name__} has positions for {own} tokens only"
        )
    fixed = fixed_length(decoder)
    if wanted is not None and wanted > fixed:
        raise ExportError(
            f'export_onnx: max_length={wanted}, and rotary angles of type "dynamic" are fixed for texts of {fixed:g} '
            f"tokens only: those of longer ones change with every token; pass max_length={fixed:g}"
        )
    return int(min(wanted or own or 2048, fixed))


def write(held: Held, source: Any, tokenizer: Any, folder: Path, dtype: torch.dtype) -> None:
    """Configuration, generation settings and tokenizer, as ORTModelForCausalLM reads them."""
    config = copy.deepcopy(served(held.config))
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        for name in ("quantization_config", "_pre_quantization_dtype"):
            if hasattr(part, name):
                delattr(part, name)
    config.dtype = dtype
    config.use_cache = True
    config.save_pretrained(folder)
    if held.generation_config is not None:
        valid_generation(held.generation_config).save_pretrained(folder)
    origin = tokenizer or (source if isinstance(source, (str, PathLike)) else held.config._name_or_path)
    with tempfile.TemporaryDirectory(dir=folder) as draft:
        try:
            if origin:
                save_tokenizer(origin, Path(draft))
        except Exception as error:  # of the model id that a model was loaded from
            if getattr(error, "errno", None) in OF_THE_DISK:
                raise
            if tokenizer is not None:
                raise ExportError(f"export_onnx: the tokenizer that was given is not saved: {error}") from error
            logger.warning("the folder is written without a tokenizer: %s", first_line(error) or type(error).__name__)
            return
        for file in Path(draft).iterdir():
            file.rename(folder / file.name)
