"""Readers of safetensors folders whose layers share one shape of storage: a few tensors behind a module's name.

An output head or a router of experts that was quantized too is dequantized to float32, which is exact: both stay float
in this package (heads unless embeddings are quantized with them), and routers are no linear layers in transformers 5.
"""

import re
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qbl_trl.allowed import ALLOWED_BITS
from qbl_trl.config import LayerFormat
from qbl_trl.errors import CheckpointError, ConfigError
from qbl_trl.json_files import read_json
from qbl_trl.quant.importers.reader import Reader, dtype_name, stored_bits, stored_group_size
from qbl_trl.quant.importers.shards import Shards
from qbl_trl.quant.linear import GroupQuantLinear

_HEADS = ("lm_head", "embed_out")
_PLAIN = re.compile(r"[\w.]+")  # the name of a layer, no expression
_ROUTER = re.compile(r"(.*\.)(?:gate|shared_expert_gate|router(?:\..*)?)")
CODES_ARE_KEPT = "Load it with the library that wrote it and quantize the dequantized weights again (lossy)"


class FolderReader(Reader):
    """A folder whose quantized layers are recognised by one tensor each.

    Attributes:
        marker: suffix of the tensor that every quantized layer has.
        parts: suffixes of all tensors that the format may keep for a layer, marker included, bias excluded.
        scales: suffix of the tensor of scales.
        words: what codes may be packed into.
    """

    marker: str
    parts: tuple[str, ...]
    scales: str
    words: tuple[torch.dtype, ...] = (torch.int32,)

    def __init__(self, folder: Path, quantization: Mapping[str, Any], shards: Shards | None = None) -> None:
        self.folder, self.quantization = folder, quantization
        self.shards = shards or Shards(folder)
        self._formats: dict[str, LayerFormat] = {}
        self._shapes: dict[str, tuple[int, int]] = {}
        self._own_sizes: dict[str, int] = {}
        self._own_bits: dict[str, int] = {}
        self._unpacked: set[str] = set()
        self.check()
        self._check_group_size()
        for tensor in self.shards.names():
            if tensor.endswith(f".{self.marker}"):
                name = tensor.removesuffix(f".{self.marker}")
                self._formats[name] = self._format(name)
        self._unpacked = {name for name in self._formats if self.is_float(name)} | self._routers()
        if not self.formats():
            raise CheckpointError(f"{folder}: says {self.kind}, but no tensor is called *.{self.marker}")
        self._check_tensors()

    @abstractmethod
    def check(self) -> None:
        """Raise CheckpointError for settings of the format that cannot be read without changing codes."""

    @abstractmethod
    def geometry(self, name: str) -> tuple[int, int, int, int]:
        """bits, out_features, in_features and number of groups of one layer, from shapes."""

    @property
    @abstractmethod
    def stated_group_size(self) -> int:
        """The configured group size; zero or less for one group per row."""

    def own(self, name: str) -> dict[str, Any]:
        """What the configuration says of one layer alone."""
        return {}

    def extra(self, name: str) -> dict[str, Any]:
        """What AutoRound's `extra_config` says of one layer, by its name or a regular expression.

        Raises:
            CheckpointError: if it names no layers.
        """
        stated, patterns = self._extra
        return stated.get(name) or next((own for pattern, own in patterns if pattern.fullmatch(name)), {})

    @cached_property
    def _extra(self) -> tuple[dict[str, dict[str, Any]], list[tuple[re.Pattern, dict[str, Any]]]]:
        stated, patterns = by_pattern(self.folder, self.quantization, "extra_config"), []
        for key, own in stated.items():
            if not _PLAIN.fullmatch(key):
                with suppress(re.error):
                    patterns.append((re.compile(key), own))
        return stated, patterns

    def group_size_of(self, name: str) -> int:
        """The group size that the file states for one layer."""
        return int(self.own(name).get("group_size") or self.stated_group_size)

    def is_float(self, name: str) -> bool:
        """Whether a packed matrix becomes a float one."""
        return _is_head(name)

    def zeros_kind(self, name: str) -> str:
        """How the layer's zero points are stored; "packed" unless the format says otherwise."""
        return "packed"

    def formats(self) -> dict[str, LayerFormat]:
        return {name: stored for name, stored in self._formats.items() if name not in self._unpacked}

    def config(self) -> dict[str, Any]:
        config = read_json(self.folder / "config.json")
        for part in (config, config.get("text_config") or {}):
            part.pop("quantization_config", None)
        if any(map(_is_head, self._formats)):  # its codes are its own, so it is not the embedding
            for part in (config, config.get("text_config") or {}):
                if part.get("tie_word_embeddings"):
                    part["tie_word_embeddings"] = False
        return config

    def layer(self, name: str) -> GroupQuantLinear:
        try:
            return super().layer(name)
        except (ConfigError, RuntimeError, IndexError) as error:
            raise self.misshapen(name, f" ({error})") from error

    def inside(self) -> dict[str, tuple[int, ...]]:
        biases = [name for name in map("{}.bias".format, self.formats()) if name in self.shards]
        return {f"{name}.weight": self._shapes[name] for name in self.formats()} | {
            name: self.shards.shape(name) for name in biases
        }

    def others(self) -> dict[str, tuple[int, ...]]:
        own = {f"{name}.{part}" for name in self._formats for part in self.parts}
        own |= {f"{name}.bias" for name in self.formats()}
        unpacked = {f"{name}.weight": self._shapes[name] for name in self._unpacked}
        return {name: self.shards.shape(name) for name in self.shards.names() if name not in own} | unpacked

    def tensor(self, name: str) -> Tensor:
        module = name.removesuffix(".weight")
        return self.layer(module).dequantize() if module in self._formats else self.shards.get(name)

    def part(self, name: str, suffix: str) -> Tensor:
        """One tensor of a layer."""
        return self.shards.get(f"{name}.{suffix}")

    def bias(self, name: str) -> Tensor | None:
        """The layer's bias, or None."""
        return self.part(name, "bias") if f"{name}.bias" in self.shards else None

    def sizes(self, name: str) -> tuple[int, int, int]:
        """The file's bits, its group size and the stored one."""
        return self._own_bits[name], self._own_sizes[name], self._formats[name].group_size

    def misshapen(self, name: str, why: str = "") -> CheckpointError:
        """The error for a layer whose tensors do not fit each other."""
        shapes = [f"{p} {self.shards.shape(f'{name}.{p}')}" for p in self.parts if f"{name}.{p}" in self.shards]
        return CheckpointError(f"{self.folder}: {name} is no {self.kind} layer by its shapes: {', '.join(shapes)}{why}")

    def _check_group_size(self) -> None:
        try:
            self.stated_group_size  # noqa: B018
        except (TypeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{self.folder}: its group_size is no whole number; the file is damaged") from error

    def _check_tensors(self) -> None:
        """What a layer holds beside its codes belongs to its function: rotations, scales of activations."""
        for tensor in self.shards.names():
            dtype = self.shards.dtype(tensor)
            if dtype is not None and dtype.is_floating_point and dtype.itemsize == 1:
                raise CheckpointError(
                    f"{self.folder}: {tensor} is in float8, which means nothing without scales that are not read here. "
                    f"{CODES_ARE_KEPT}"
                )
            name, _, part = tensor.rpartition(".")
            left = part == "weight" and _is_head(name)  # a float head beside its codes, which count
            if name in self._formats and part not in (*self.parts, "bias") and not left:
                raise CheckpointError(
                    f"{self.folder}: {name} holds a tensor {part!r} that is no part of {self.kind}; without it the "
                    f"layer computes something else. {CODES_ARE_KEPT}"
                )

    def _routers(self) -> set[str]:
        """Packed layers that choose or weigh the experts beside them."""
        beside = {name.partition("experts.")[0] for name in self.shards.names() if ".experts." in name}
        return {name for name in self._formats if (found := _ROUTER.fullmatch(name)) and found[1] in beside}

    def _format(self, name: str) -> LayerFormat:
        words = self.shards.dtype(f"{name}.{self.marker}")
        if words not in self.words:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.words)
            raise CheckpointError(
                f"{self.folder}: {name}.{self.marker} holds {words}; {self.kind} packs into {allowed}"
            )
        try:
            bits, out_features, in_features, groups = self.geometry(name)
        except CheckpointError:
            raise
        except (ValueError, IndexError, ZeroDivisionError):
            raise self.misshapen(name) from None
        if bits not in range(1, max(ALLOWED_BITS) + 1):
            raise CheckpointError(
                f"{self.folder}: {name} has {bits}-bit codes; this package stores up to {max(ALLOWED_BITS)} bits. "
                f"{CODES_ARE_KEPT}"
            )
        self._own_bits[name] = bits
        where = f"{self.folder}: {name}"
        self._shapes[name] = (out_features, in_features)
        self._own_sizes[name], size = stored_group_size(where, in_features, groups, self.group_size_of(name))
        scale_dtype = dtype_name(f"{where}.{self.scales}", self.shards.dtype(f"{name}.{self.scales}"))
        return LayerFormat(stored_bits(bits), size, self.zeros_kind(name), scale_dtype)


def refuse_activations(folder: Path, quantized: bool) -> None:
    """A model whose activations are quantized computes something else than its weights say.

    Raises:
        CheckpointError: if they are.
    """
    if quantized:
        raise CheckpointError(
            f"{folder}: activations are quantized too, this package quantizes weights. {CODES_ARE_KEPT}"
        )


def refuse_rotations(folder: Path, **settings: Any) -> None:
    """A model that rotates its activations while it runs computes something else than its weights say.

    Raises:
        CheckpointError: naming the setting that says so.
    """
    for name, given in settings.items():
        if given:
            raise CheckpointError(
                f"{folder}: {name} rotates activations while the model runs, which is not done here. {CODES_ARE_KEPT}"
            )


def refuse_run_time(folder: Path, settings: Mapping[str, Any]) -> None:
    """What AutoRound and GPTQModel can have a model do beside its weights, in any of their packings.

    Raises:
        CheckpointError: if it rotates or quantizes activations, or quantizes the cache.
    """
    rotations = ("rotation_config", "spinquant_config", "rotation")  # the last is GPTQModel's
    refuse_rotations(folder, **{name: settings.get(name) for name in rotations})
    refuse_activations(folder, bool(settings.get("static_kv_dtype") or settings.get("activation")))


def by_pattern(folder: Path, settings: Mapping[str, Any], key: str) -> dict[str, dict[str, Any]]:
    """What a configuration says of single layers under a key: names or regular expressions -> settings.

    Raises:
        CheckpointError: if it is anything else.
    """
    stated = settings.get(key) or {}
    if not isinstance(stated, dict) or not all(isinstance(own or {}, dict) for own in stated.values()):
        raise CheckpointError(
            f"{folder}: {key} of quantization_config does not name layers with their settings; the file is damaged"
        )
    return {pattern: own or {} for pattern, own in stated.items()}


def matches(folder: Path, key: str, pattern: str, name: str) -> bool:
    """Whether the name of a layer begins with a regular expression that is stated under a key.

    Raises:
        CheckpointError: if it is no regular expression.
    """
    try:
        return re.match(pattern, name) is not None
    except re.error as error:
        raise CheckpointError(f"{folder}: {key} holds {pattern!r}, no regular expression ({error})") from error


def _is_head(name: str) -> bool:
    return name.rpartition(".")[2] in _HEADS
