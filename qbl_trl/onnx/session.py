"""Logits of an exported folder, by a bare ONNX Runtime session."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx.external_data_helper import ExternalDataInfo, uses_external_data
from torch import Tensor

from qbl_trl.errors import ExportError
from qbl_trl.onnx.files import MODEL_FILE, graph_files
from qbl_trl.onnx.layer_caches import STATES
from qbl_trl.parity import Logits, positions

_NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}


def graph_file(folder: Path) -> Path:
    """The graph of a folder: model.onnx, or the only one.

    Raises:
        ExportError: if there is none, or several of other names.
    """
    if folder.is_file():
        return folder
    found = graph_files(folder)
    if folder / MODEL_FILE in found:
        return folder / MODEL_FILE
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ExportError(f"{folder}: expected exactly one .onnx file, found {names}; export into a folder of its own")
    return found[0]


def check_external_data(path: Path) -> None:
    """Refuse a graph whose weights are missing, cut short, or said to lie outside its folder.

    Raises:
        ExportError: naming the tensor and the file.
    """
    try:
        graph = onnx.load(path, load_external_data=False).graph
        places = {t.name: ExternalDataInfo(t) for t in graph.initializer if uses_external_data(t)}
    except (DecodeError, ValueError, TypeError) as error:
        raise ExportError(f"{path} is no whole ONNX graph ({error}); copy or export it again") from error
    root = Path(os.path.abspath(path.parent))
    for name, info in places.items():
        data = Path(os.path.normpath(root / info.location))  # a hub's cache holds links to files elsewhere
        if Path(info.location).is_absolute() or root not in data.parents:
            raise ExportError(
                f"{path}: weight {name} is said to lie in {info.location!r}, outside the model's folder; "
                "the file was tampered with, export the model again"
            )
        if not data.is_file():
            raise ExportError(f"{path}: weight {name} needs {data.name}, which is missing; copy the whole folder")
        if data.stat().st_size < (info.offset or 0) + (info.length or 0):
            raise ExportError(f"{path}: {data.name} is too short for weight {name}; copy or export it again")


def opened(folder: Path) -> Logits:
    """An exported folder for `verify`: as generation reads it where keys and values have 8 bits, else in one pass.

    Raises:
        ExportError: if its graph does not run here, or not on what it is asked.
    """
    with _in_words(f"{folder}: ONNX Runtime's CPU provider does not open this graph (one for CUDA in bfloat16?)"):
        graph = OnnxLogits(folder)

    def logits(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = f"{folder}: the graph does not run on these {input_ids.shape[1]} tokens"
        with _in_words(f"{tokens} (longer than its max_length, or ids beyond its vocabulary?)"):
            if not graph.rounds_cache:
                return graph(input_ids, attention_mask)
            found = graph.with_cache(input_ids, attention_mask, max(1, input_ids.shape[1] // 2))
            whole = found.shape[1] == input_ids.shape[1]  # not of a graph of last logits, whose steps alone give all
            return found if whole else graph.with_cache(input_ids, attention_mask, 1)

    return logits


@contextmanager
def _in_words(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if type(error).__module__ != onnxruntime.capi.onnxruntime_pybind11_state.__name__:
            raise
        raise ExportError(f"{what}: {' '.join(str(error).split())}") from error


class OnnxLogits:
    """Callable (input_ids, attention_mask) -> logits (B, S, V) float32 over one session, on the CPU.

    Args:
        folder: an exported folder, or its .onnx file.
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        path = graph_file(Path(folder))
        check_external_data(path)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised; printed, it would look like the end of an export
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = {value.name: value for value in self.session.get_outputs()}

    @property
    def rounds_cache(self) -> bool:
        """Whether keys and values have 8 bits: one pass over a text does not read them, its steps do."""
        return any(value.type == "tensor(int8)" for value in self.inputs.values())

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """One pass over all tokens."""
        logits, _ = self.step(input_ids, attention_mask, self.empty_cache(input_ids.shape[0]))
        return logits

    def with_cache(self, input_ids: Tensor, attention_mask: Tensor, prefix: int, buffer: int = 0) -> Tensor:
        """The same logits, computed as generation does: a prefix, then one token at a time over the cache.

        Args:
            buffer: tokens of a cache that has its full length from the start, as ONNX Runtime GenAI shares it.
        """
        cache, parts = self.empty_cache(input_ids.shape[0], buffer), []
        ends = [prefix, *range(prefix + 1, input_ids.shape[1] + 1)]
        for start, stop in zip([0, *ends], ends, strict=False):
            logits, cache = self.step(input_ids[:, start:stop], attention_mask[:, :stop], cache)
            parts.append(logits)
        return torch.cat(parts, 1)

    def empty_cache(self, batch: int, buffer: int = 0) -> dict[str, Any]:
        """Keys and values of no token, states that hold nothing."""
        cache = {}
        for name, value in self.inputs.items():
            if name.startswith("past_key_values"):
                _, *sizes = self.outputs[name.replace("past_key_values", "present")].shape
                if not name.endswith(STATES):
                    sizes[1] = buffer
                cache[name] = np.zeros([batch, *sizes], _NUMPY[value.type])
        return cache

    def step(self, input_ids: Tensor, attention_mask: Tensor, cache: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """New tokens (B, S) over a cache; the mask (B, T) covers the cache and them."""
        feed: dict[str, Any] = {"input_ids": input_ids.cpu().numpy(), **cache}
        attention_mask = attention_mask.cpu()
        if "attention_mask" in self.inputs:
            feed["attention_mask"] = attention_mask.numpy()
        if "position_ids" in self.inputs:
            feed["position_ids"] = positions(attention_mask)[:, -input_ids.shape[1] :].numpy()
        made = dict(zip(self.outputs, self.session.run(None, feed), strict=True))
        logits = torch.from_numpy(made.pop("logits")).float()
        return logits, {name.replace("present", "past_key_values"): value for name, value in made.items()}
