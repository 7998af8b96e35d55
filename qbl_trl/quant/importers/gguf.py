"""GGUF files: matrices of linear layers in types of affine groups, which `gguf_blocks.py` lists.

transformers names the tensors and knows which architectures permute the rows of q and k: its tensor processors are
applied to row *numbers* here, so codes move with their rows and are never recomputed. Matrices of other types
(i-quants, MXFP4), embeddings and output heads are dequantized to float32, which is exact, and stay float. So do
routers of a mixture; its experts, which files stack, are read one by one.

Source: transformers, modeling_gguf_pytorch_utils.py.
"""

import inspect
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import modeling_gguf_pytorch_utils as hf_gguf
from transformers.pytorch_utils import Conv1D

from qbl_trl.config import LayerFormat
from qbl_trl.errors import CheckpointError
from qbl_trl.quant.affine import Affine
from qbl_trl.quant.importers.gguf_blocks import FORMATS, split_blocks
from qbl_trl.quant.importers.gguf_config import FACTORS, mixture_settings, portable, rope_scaling, stated_settings
from qbl_trl.quant.importers.gguf_experts import Place, mixture_of, places_of, refuse_stacks, slice_of
from qbl_trl.quant.importers.reader import Reader
from qbl_trl.quant.linear import GroupQuantLinear
from qbl_trl.quant.stacks import unstack_
from qbl_trl.quant.stored import with_dtype
from qbl_trl.quant.targets import routers


class GGUFReader(Reader):
    """Reads one GGUF file of a causal language model that transformers can name."""

    kind = "gguf"

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError as error:
            raise CheckpointError(
                f"{path}: reading GGUF needs the package gguf: pip install 'qbl-trl[gguf]'"
            ) from error
        self.path, self._gguf = path, gguf
        try:
            self._file = gguf.GGUFReader(path)
        except (ValueError, OSError, IndexError, KeyError) as error:
            raise CheckpointError(f"{path} cannot be read as GGUF: {error}") from error
        _refuse_shard(path, self._file)
        self._tensors = {tensor.name: tensor for tensor in self._file.tensors}
        self._config = self._settings(path)
        kind = hf_gguf.TENSOR_PROCESSORS.get(self.architecture, hf_gguf.TensorProcessor)
        self._processor = kind(config=self._config)
        model = self._skeleton()
        unstack_(model)
        self._model_config = model.config.to_dict() | {"architectures": [type(model).__name__]}
        layers = {self._in_files(name): shape for name, shape in _linear_layers(model).items()}
        self._experts = places_of(path, self._mixture, layers, self._tensors) if self._mixture else dict[str, Place]()
        _forget_experts_(model)  # transformers would look each of their names up in all names of the architecture
        sources = self._names(model) | {name: place.tensor for name, place in self._experts.items()}
        order = {tensor: number for number, tensor in enumerate(self._tensors)}
        self._sources = dict(sorted(sources.items(), key=lambda source: order[source[1]]))
        types = {name: self._type(f"{name}.weight") for name in layers}
        self._formats = {name: FORMATS[kind] for name, kind in types.items() if kind in FORMATS}
        self._in_float = {name: kind for name, kind in types.items() if kind is not None and kind not in FORMATS}

    def check_codes(self) -> None:
        """Raise CheckpointError if the file holds no layer whose codes can be taken over; warn if it holds few."""
        if not self._formats:
            found = ", ".join(sorted({tensor.tensor_type.name for tensor in self._tensors.values()}))
            raise CheckpointError(
                f"{self.path}: no linear layer is stored as {', '.join(FORMATS)} (found: {found}), so no codes "
                "can be taken over; quantize the float model instead"
            )
        kept, lost = (
            sum(math.prod(self._stored_shape(f"{name}.weight")) for name in names)
            for names in (self._formats, self._in_float)
        )
        if lost > kept:
            warnings.warn(
                f"{self.path}: {lost / (kept + lost):.0%} of the weights of linear layers become float32, because they "
                f"are stored as {', '.join(sorted(set(self._in_float.values())))}: no affine groups to train on, and "
                "larger than the file. Take a file in Q4_K_M, Q4_0, Q8_0 or the like, or quantize the float model",
                stacklevel=4,
            )

    def config(self) -> dict[str, Any]:
        return with_dtype(portable(self._model_config), "float32")

    def formats(self) -> dict[str, LayerFormat]:
        return dict(self._formats)

    def inside(self) -> dict[str, tuple[int, ...]]:
        weights = {f"{name}.weight": self._stored_shape(f"{name}.weight") for name in self._formats}
        biases = [f"{name}.bias" for name in self._formats if f"{name}.bias" in self._sources]
        return weights | {name: self._shape(name) for name in biases}

    def others(self) -> dict[str, tuple[int, ...]]:
        own = {f"{name}.{part}" for name in self._formats for part in ("weight", "bias")}
        return {name: self._shape(name) for name in self._sources if name not in own}

    def tensor(self, name: str) -> Tensor:
        raw = self.raw(name)
        values = self._gguf.quants.dequantize(raw.data, raw.tensor_type)
        return torch.from_numpy(np.array(self._processed(values, raw.name), dtype=np.float32, copy=True))

    def read_layer(self, name: str) -> GroupQuantLinear:
        raw = self.raw(f"{name}.weight")
        affine = split_blocks(torch.from_numpy(np.array(raw.data, copy=True)), raw.tensor_type.name)
        order = self.row_order(f"{name}.weight", int(raw.shape[1]))
        bias = self.tensor(f"{name}.bias") if f"{name}.bias" in self._sources else None
        stored = self._formats[name]
        return GroupQuantLinear.from_affine(
            Affine(*(part[order] for part in affine)),
            bits=stored.bits,
            group_size=stored.group_size,
            bias=bias,
            symmetric=stored.zeros == "none",
        )

    def sources(self) -> dict[str, str]:
        """Name in transformers -> name in the file, for every tensor that is imported; stacked experts share one."""
        return dict(self._sources)

    def raw(self, name: str) -> Any:
        """A tensor as the file holds it (gguf.ReaderTensor), or an expert's part of it, by its name in transformers."""
        place = self._experts.get(name)
        return slice_of(self._tensors[place.tensor], place.expert) if place else self._tensors[self._sources[name]]

    def whole(self, tensor: str) -> Any:
        """A tensor as the file holds it (gguf.ReaderTensor), by its name there."""
        return self._tensors[tensor]

    def rope_factors(self) -> list[Any]:
        """The rotary factors as the file holds them: no tensors of the model, whose configuration says the same."""
        return [self._tensors[name] for name in FACTORS if name in self._tensors]

    def fields(self) -> list[Any]:
        """The metadata of the file (gguf.ReaderField)."""
        return list(self._file.fields.values())

    def row_order(self, name: str, rows: int) -> Tensor:
        """(rows,) int64: which row of the file each row of the model is.

        Raises:
            CheckpointError: if the architecture stores this tensor other than with permuted rows.
        """
        order = torch.from_numpy(self._as_read(name, np.arange(rows, dtype=np.float64))).long()
        if not torch.equal(order.sort().values, torch.arange(rows)):
            raise self._not_by_rows(name)
        return order

    def as_stored(self, name: str, values: Tensor) -> Tensor:
        """Float values of the model as the file holds them: rows permuted back, and moved by what reading subtracts.

        The norms of Gemma and Nemotron are stored as w + 1, which rounds w by up to 2**-24 (w + 1).

        Raises:
            CheckpointError: if reading them back would give anything else.
        """
        shape = self._stored_shape(name)
        stored = values.reshape(shape) if len(shape) < values.ndim else values
        rows = np.arange(len(stored), dtype=np.float64)
        shift = self._as_read(name, np.zeros_like(rows))[0]
        place = np.argsort(self._as_read(name, rows))
        moved = (stored.numpy() - np.float32(shift))[place]
        again = self._processed(moved, self._sources[name])
        if again.shape != tuple(values.shape) or not np.allclose(again, values.numpy(), rtol=1e-6, atol=1e-6):
            raise self._not_by_rows(name)
        return torch.from_numpy(moved)

    def _as_read(self, name: str, column: Any) -> Any:
        """(rows,) numbers, one for each row of a tensor in the file -> what transformers reads from them."""
        source = self._sources[name]
        if self.architecture == "bloom":  # read whole, or as the bias, whose numbers are in the same order
            return self._processed(column, source.replace(".weight", ".bias"))
        return np.ascontiguousarray(self._processed(column[:, None], source).reshape(-1))

    def _not_by_rows(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: {name} is stored with more than its rows permuted or moved; it cannot be kept"
        )

    def _settings(self, path: Path) -> dict[str, Any]:
        """Settings of the model's configuration; what kind of model it is stays noted.

        Raises:
            CheckpointError: if the file states none, or those of a model that is not read.
        """
        try:
            self.architecture: str = self._file.fields["general.architecture"].contents()
            self._mixture = mixture_of(path, self.architecture, self._field)
            found: dict[str, Any] = hf_gguf.load_gguf_checkpoint(str(path), return_tensors=False)["config"]
        except CheckpointError:
            raise
        except (ValueError, OSError, IndexError, KeyError) as error:
            raise CheckpointError(f"{path} cannot be read as GGUF: {error}") from error
        found |= stated_settings(self.architecture, self._field)
        if self._mixture:
            found |= mixture_settings(self._mixture.model_type, self._field)
        factors = {
            raw.name: torch.from_numpy(np.array(raw.data, dtype=np.float64)).reshape(-1) for raw in self.rope_factors()
        }
        return found | rope_scaling(path, self._field, factors)

    def _field(self, name: str) -> Any:
        """One number or word of the architecture's metadata; None where the file has none."""
        field = self._file.fields.get(f"{self.architecture}.{name}")
        return None if field is None else field.contents()

    def _skeleton(self) -> Any:
        settings = dict(self._config)
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)

    def _names(self, model: nn.Module) -> dict[str, str]:
        """Name in transformers -> name in the file, for every tensor of the file but the experts."""
        mapping = hf_gguf.get_gguf_hf_weights_map
        newer = "processor" in inspect.signature(mapping).parameters  # transformers 5
        kind = {"model_type": self.architecture} if self._mixture else {}  # "llama" for Mixtral
        names = mapping(model, self._processor, **kind) if newer else mapping(model, **kind)
        if self._config.get("tie_word_embeddings"):
            names.pop("output.weight", None)
        elif "output.weight" in self._tensors:
            names.setdefault("output.weight", "lm_head.weight")
        stacks = {place.tensor for place in self._experts.values()}
        names = {name: self._in_files(place) for name, place in names.items()}
        unknown = sorted(set(self._tensors) - set(names) - set(FACTORS) - stacks)
        if unknown:
            refuse_stacks(self.path, unknown)
            raise CheckpointError(f"{self.path}: transformers has no place for {', '.join(unknown[:4])}")
        return {names[name]: name for name in self._tensors if name in names}

    def _in_files(self, name: str) -> str:
        return self._mixture.in_files(name) if self._mixture else name

    def _type(self, name: str) -> str | None:
        return self.raw(name).tensor_type.name if name in self._sources else None  # type: ignore[no-any-return]

    def _stored_shape(self, name: str) -> tuple[int, ...]:
        return tuple(map(int, self.raw(name).shape[::-1]))

    def _shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor as it is read (transposed, say), from numbers that take no memory; Mamba takes log(-x)."""
        numbers = np.broadcast_to(np.float16(-1), self._stored_shape(name))
        return tuple(self._processed(numbers, self._sources[name]).shape)

    def _processed(self, values: Any, source: str) -> Any:
        parameters: dict[str, Any] = {"tensors": {}}
        result = self._processor.process(values, name=source, tensor_key_mapping={}, parsed_parameters=parameters)
        return result.weights


def _refuse_shard(path: Path, file: Any) -> None:
    """A part of a split file lacks layers, and all but the first lack the metadata.

    Raises:
        CheckpointError: if the file is one.
    """
    count, number = (file.fields.get(f"split.{key}") for key in ("count", "no"))
    if count is not None and count.contents() > 1:
        which = "one" if number is None else f"number {number.contents() + 1}"
        raise CheckpointError(
            f"{path}: {which} of the {count.contents()} parts of a split file; put them together first: "
            "llama-gguf-split --merge FIRST_PART OUTPUT.gguf"
        )


def _forget_experts_(model: nn.Module) -> None:
    for name, module in list(model.named_modules()):
        if "experts" in module._modules:
            model.get_submodule(name).register_module("experts", nn.Identity())


def _linear_layers(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights that may stay packed: those of linear layers but for the head, and for routers."""
    head, chosen = model.get_output_embeddings(), set(routers(model))  # type: ignore[operator]
    return {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and name not in chosen
    }
