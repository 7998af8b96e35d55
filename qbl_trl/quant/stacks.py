"""Stacked experts in a model: separated, put back, and named as the files name them; see `experts`."""

import re
from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qbl_trl.errors import ConfigError
from qbl_trl.generation import BEFORE_5
from qbl_trl.quant.experts import DenseWeightExperts, Experts, GptOssExperts, Llama4Experts, Parts
from qbl_trl.quant.modules import replace
from qbl_trl.quant.parallel_experts import AttentionExperts, DbrxExperts, ParallelExperts
from qbl_trl.quant.renaming import makes

_INTERFACE = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate", "num_experts")
_OTHERS: dict[str, type[Experts]] = {
    "DbrxExperts": DbrxExperts,
    "GraniteMoeHybridMoE": ParallelExperts,
    "GraniteMoeMoE": ParallelExperts,
    "GraniteMoeSharedMoE": ParallelExperts,
    "JetMoeMoA": AttentionExperts,
    "JetMoeMoE": ParallelExperts,
    "Llama4TextExperts": Llama4Experts,
    "Qwen3VLMoeTextExperts": DenseWeightExperts,
    "GptOssExperts": GptOssExperts,
}
# transformers 5 computes those of one module as one grouped product, which no tracer writes.
_UNTRACEABLE = (ParallelExperts, AttentionExperts) if BEFORE_5 else (Experts,)
_DRAWS_ITS_STACK = "Qwen3OmniMoeThinkerTextSparseMoeBlock"


def stacks_of(model: nn.Module) -> list[str]:
    """Full names of the modules that hold stacked experts."""
    return [path for path, module in model.named_modules() if _kind(module) is not None]


def stacked_tensors(model: nn.Module) -> list[str]:
    """Full names of the tensors that hold stacked experts."""
    kinds = [(path, module, _kind(module)) for path, module in model.named_modules()]
    return [f"{path}.{name}" for path, module, kind in kinds if kind is not None for name in kind.tensors(module)]


def unstack_(model: nn.Module, untraceable: bool = False) -> dict[str, nn.Module]:
    """Separate all experts of a model; returns the modules that held them stacked, by their names.

    Args:
        untraceable: those alone that no trace follows while they are stacked.
    """
    stacked = {path: model.get_submodule(path) for path in stacks_of(model)}
    if untraceable:
        stacked = {
            path: module for path, module in stacked.items() if issubclass(_kind(module) or nn.Module, _UNTRACEABLE)
        }
    named = names_in_files(model) if stacked and not BEFORE_5 else []
    for path, module in stacked.items():
        experts = _separable(module)
        for name, parts in _parts_of(experts, module, path, named).items():
            experts.fill(name, module.get_parameter(name).data, parts)
        _put(model, path, experts)
    return stacked


def _put(model: nn.Module, path: str, experts: Experts) -> None:
    """Put experts into the place of a stack; a block that would draw the stacked tensors anew does not."""
    replace(model, path, experts)
    holder = model.get_submodule(path.rpartition(".")[0])
    if type(holder).__name__ == _DRAWS_ITS_STACK:
        holder._is_hf_initialized = True  # type: ignore[assignment]


def slices_of(model: nn.Module) -> dict[str, Tensor]:
    """The float weights of experts that a model holds stacked, (rows, columns) each, by their names in the files."""
    held = [(path, module) for path, module in model.named_modules() if isinstance(module, Experts) or _kind(module)]
    named = names_in_files(model) if held and not BEFORE_5 else []
    found: dict[str, Tensor] = {}
    for path, module in held:
        experts = module if isinstance(module, Experts) else _separable(module)
        for name, parts in _parts_of(experts, module, path, named).items():
            weight = experts._parameters.get(name)
            if weight is None:  # it was separated
                continue
            for index, matrix in enumerate(experts.matrices(name, weight.data)):
                pieces = zip(parts, matrix.chunk(len(parts)), strict=True)
                found |= {f"{path}.{index}.{part}.weight": rows for part, rows in pieces}
    return found


def _parts_of(experts: Experts, stacked: nn.Module, path: str, named: list[tuple[str, Parts]]) -> dict[str, Parts]:
    """Names of the layers of an expert, by the names of the stacked tensors they are parts of."""
    found: dict[str, Parts] = {}
    for name, usual in experts.tensors(stacked).items():
        told = next((parts for target, parts in named if makes(target, f"{path}.{name}")), usual)
        found[name] = told if len(told) == len(usual) else usual
    return found


def keep_unstacked(
    model: nn.Module, stacked: dict[str, nn.Module], layers: Iterable[str], held: Container[str] | None = None
) -> dict[str, Parts]:
    """Put back the stacked tensors that need not be separated.

    Those need it of which one of `layers` is a part, and the tensors of that name in other blocks: transformers splits
    all tensors of one name while it saves and loads, or none.

    Args:
        stacked: what `unstack_` returned.
        held: layers that the files hold in float. Tensors that they hold stacked, although others of that name are
            separated, stay stacked. None: there are no files.

    Returns:
        The parts of the tensors that stay separated, by the tensors' full names.
    """
    wanted, separated = set(layers), list[tuple[str, str, Parts, list[str]]]()
    for path in stacked:
        experts: Any = model.get_submodule(path)
        for name, parts in getattr(experts, "parts", {}).items():
            separated.append((path, name, parts, [f"{path}.{layer}" for layer in experts.layers(name)]))
    names = {name for _, name, _, own in separated if not wanted.isdisjoint(own)}
    kept: dict[str, Parts] = {}
    for path, name, parts, own in separated:
        alone = held is not None and wanted.isdisjoint(own) and not any(layer in held for layer in own)
        if name in names and not alone:
            kept[f"{path}.{name}"] = parts
    for path, old in stacked.items():
        apart: dict[str, Parts] = getattr(model.get_submodule(path), "parts", {})
        if all(f"{path}.{name}" in kept for name in apart):
            continue  # it is as it should be
        after = _separable(old)
        for name, parts in apart.items():
            if f"{path}.{name}" in kept:
                after.fill(name, old.get_parameter(name).data, parts)
        replace(model, path, after if after.parts else old)
    return kept


def separate_(model: nn.Module, name: str, weight: Tensor, parts: Parts) -> list[str]:
    """Make linear layers of a stacked tensor that arrives while loading; returns their full names.

    Args:
        name: of the tensor; weight: (experts, rows, columns), or columns before rows as its module has them.
        parts: what `keep_unstacked` returned for this tensor.
    """
    path = _stack_of(model, name)
    experts = model.get_submodule(path)
    if not isinstance(experts, Experts):
        experts = _separable(experts)
        _put(model, path, experts)
    return [f"{path}.{layer}" for layer in experts.fill(name.removeprefix(f"{path}."), weight, parts)]


def take_out_(model: nn.Module, layers: Iterable[str]) -> None:
    """Give float layers memory of their own: slices keep all of a tensor, and where it is transposed do not save."""
    for name in layers:
        layer: Any = model.get_submodule(name)
        layer.weight.data = layer.weight.data.clone(memory_format=torch.contiguous_format)


def float_parts(model: nn.Module) -> list[str]:
    """Full names of the separated layers of experts that are in float."""
    return [
        f"{path}.{layer}"
        for path, experts in model.named_modules()
        if isinstance(experts, Experts)
        for name in experts.parts
        for layer in experts.layers(name)
        if type(experts.get_submodule(layer)) is nn.Linear
    ]


def check_stackable(model: nn.Module) -> None:
    """Refuse to stack experts whose layers hold adapters: a stack has no place for them.

    Raises:
        ConfigError: naming the first layer.
    """
    for path, experts in model.named_modules():
        if isinstance(experts, Experts):
            adapted = next((name for name, part in experts.named_modules() if hasattr(part, "base_layer")), None)
            if adapted is not None:
                raise ConfigError(
                    f"dequantize: {path}.{adapted} has an adapter, and the class of this model holds the experts of a "
                    "layer in one tensor; merge the adapter first (qbl_trl.merge), or unload it"
                )


def stack_again_(model: nn.Module) -> None:
    """Stack experts again whose layers are float by now, so that the model saves as transformers saves it."""
    for path in [path for path, module in model.named_modules() if isinstance(module, Experts)]:
        replace(model, path, model.get_submodule(path).stacked())  # type: ignore[operator]


def layer_names(model: nn.Module, path: str, told: Iterable[str]) -> list[str]:
    """Full names that the parts of experts stacked in one module would have as layers: usual ones, and those told."""
    module = model.get_submodule(path)
    kind = _kind(module) or Experts
    tensors = kind.tensors(module)
    parts = {*told, *tensors, *(part for names in tensors.values() for part in names)}
    experts = ".".join([path, kind.place]).rstrip(".")
    return [f"{experts}.{index}.{part}" for index in range(kind.count(module)) for part in sorted(parts)]


def _stack_of(model: nn.Module, tensor: str) -> str:
    """The module of stacked experts, separated in part or not yet, that a tensor belongs to."""
    path = tensor.rpartition(".")[0]
    while not isinstance(model.get_submodule(path), Experts) and _kind(model.get_submodule(path)) is None:
        path = path.rpartition(".")[0]
    return path


def _kind(module: Any) -> type[Experts] | None:
    if isinstance(module, Experts):
        return None
    if all(hasattr(module, name) for name in _INTERFACE):
        return Experts
    kind = _OTHERS.get(type(module).__name__) if type(module).__module__.startswith("transformers.") else None
    return kind if kind is not None and kind.tensors(module).keys() <= dict(module.named_parameters()).keys() else None


def _separable(module: Any) -> Experts:
    return (_kind(module) or Experts)(module)


def names_in_files(model: Any) -> list[tuple[str, Parts]]:
    """What transformers 5 joins while it loads: the target of a conversion, and the files' names of its parts."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    found = []
    for step in get_model_conversion_mapping(model):
        if isinstance(step, WeightConverter):
            parts = [re.search(r"\*\.(\w+)\.weight$", source) for source in step._original_source_patterns]
            if all(parts) and all(isinstance(op, MergeModulelist | Concatenate) for op in step.operations):
                found.append((step.target_patterns[0], tuple(part[1] for part in parts if part)))
    return found
