"""Experts of a mixture in a GGUF file: one tensor for a layer and a projection, (experts, rows, columns).

The matrix of an expert is a slice of it, and becomes a layer of its own, under the name that the files of transformers
give it.

| architecture | model | an expert's layers |
| --- | --- | --- |
| qwen2moe, qwen3moe | Qwen2-MoE, Qwen3-MoE | mlp.experts.N: gate_proj, up_proj, down_proj |
| llama | Mixtral | block_sparse_moe.experts.N: w1, w3, w2 |
| minimax-m2 | MiniMax-M2, which transformers 5 has | the same |

Source: llama.cpp, conversion/qwen.py, llama.py and minimax.py (what is stacked), src/models/*.cpp (how it is read).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qbl_trl.errors import CheckpointError

_SIGMOID = 2  # gguf.ExpertGatingFuncType


class Mixture(NamedTuple):
    """How transformers names a mixture: the module that holds its experts, and the gate, up and down of one."""

    model_type: str
    block: str
    parts: tuple[str, str, str]

    def in_files(self, name: str) -> str:
        """The name in files of what a model of this transformers calls `name`: 5 calls every such block `mlp`."""
        return name.replace(".mlp.", f".{self.block}.")


class Place(NamedTuple):
    """Where an expert's matrix lies: the stacked tensor's name in the file, and the number of the expert."""

    tensor: str
    expert: int


_QWEN, _MIXTRAL = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")
MIXTURES = {
    "qwen2moe": Mixture("qwen2_moe", "mlp", _QWEN),
    "qwen3moe": Mixture("qwen3_moe", "mlp", _QWEN),
    "llama": Mixture("mixtral", "block_sparse_moe", _MIXTRAL),
    "minimax-m2": Mixture("minimax_m2", "block_sparse_moe", _MIXTRAL),
}
_READ = "qwen2moe, qwen3moe, llama (Mixtral) and, with transformers 5, minimax-m2"
_INSTEAD = (
    "Quantize the model of transformers here, or import a checkpoint whose experts are separate linear layers (GPTQ, "
    "AWQ or compressed-tensors)"
)


def mixture_of(path: Path, architecture: str, field: Callable[[str], Any]) -> Mixture | None:
    """What kind of mixture a file holds; None where it has no experts.

    Raises:
        CheckpointError: if it is none of those that are read.
    """
    if not field("expert_count"):
        return None
    found = MIXTURES.get(architecture)
    if found is None or found.model_type not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{path}: experts are read in files of {_READ}; this one is of {architecture}. {_INSTEAD}"
        )
    gating = field("expert_gating_func")
    if architecture == "minimax-m2" and gating not in (None, _SIGMOID):
        raise CheckpointError(f"{path}: expert_gating_func={gating}, and MiniMax-M2 weighs its experts by a sigmoid")
    return found


def places_of(
    path: Path, mixture: Mixture, layers: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Any]
) -> dict[str, Place]:
    """Where the weight of every expert's layer lies, by its full name in files of transformers.

    Args:
        layers: (rows, columns) of the model's linear layers, by their names in files.
        tensors: the tensors of the file (gguf.ReaderTensor) by name.

    Raises:
        CheckpointError: if the file lacks a stack, or holds one of other shape than the model's experts.
    """
    found: dict[str, Place] = {}
    sizes: dict[str, tuple[int, ...]] = {}
    for name, shape in layers.items():
        before, is_expert, own = name.partition(f".{mixture.block}.experts.")
        if is_expert:
            number, part = own.split(".")
            kind = ("gate", "up", "down")[mixture.parts.index(part)]
            tensor = f"blk.{before.rpartition('.')[2]}.ffn_{kind}_exps.weight"
            found[f"{name}.weight"] = Place(tensor, int(number))
            sizes[tensor] = (int(number) + 1, *shape)
    for tensor, expected in sizes.items():
        if tensor not in tensors:
            raise CheckpointError(f"{path}: no tensor {tensor}, the experts of a layer; the file is incomplete")
        shape = tuple(map(int, reversed(tensors[tensor].shape)))
        if shape != expected:
            raise CheckpointError(
                f"{path}: {tensor} is {shape}, and {expected} by the sizes that the file states (experts, rows, "
                "columns); the file is damaged"
            )
    return found


def refuse_stacks(path: Path, unknown: list[str]) -> None:
    """Raise CheckpointError for tensors of experts that have no place in the model."""
    fused = [name for name in unknown if "_exps." in name]
    if fused:
        raise CheckpointError(
            f"{path}: {fused[0]} is no part of a mixture that is read: experts as ffn_gate_exps, ffn_up_exps and "
            f"ffn_down_exps, without biases, in files of {_READ}. {_INSTEAD}"
        )


def slice_of(tensor: Any, expert: int) -> Any:
    """The matrix of one expert, as if the file (gguf.ReaderTensor) held it by itself; nothing is read."""
    data = tensor.data[expert]
    shape = tensor.shape[:-1]
    return tensor._replace(data=data, shape=shape, n_elements=int(np.prod(shape)), n_bytes=data.nbytes)
