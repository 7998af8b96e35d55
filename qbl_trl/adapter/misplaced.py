"""What an adapter is meant for and this model has no layer for: PEFT places and loads the rest without a word."""

import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from qbl_trl.adapter.layer import BalancedLinear
from qbl_trl.config import QBLoRAConfig
from qbl_trl.errors import ConfigError
from qbl_trl.generation import BEFORE_5
from qbl_trl.module_names import name_here
from qbl_trl.quant.packed import BESIDE_CODES
from qbl_trl.quant.stacks import layer_names, names_in_files, stacks_of

_PREFIX = "base_model.model."  # of names in a PeftModel, and in files
_WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")  # of sharded, compiled modules


def stacked_experts(model: nn.Module) -> str | None:
    """What is said of experts that no adapter can act on; None if the model has none."""
    stacked = stacks_of(model)
    if not stacked:
        return None
    elsewhere = "" if BEFORE_5 else ", as transformers 4.57 has them in most mixtures"
    return (
        f"no adapter acts on the experts of this model ({stacked[0]} and {len(stacked) - 1} more): they are no linear "
        f"layers, but slices of one tensor. Load the model with a GroupQuantConfig: it makes layers of them{elsewhere}"
    )


def targeted_in_vain(config: QBLoRAConfig, model: nn.Module) -> str | None:
    """The same, if target_modules means these experts: "all-linear", or the names that they would have as layers."""
    targets = config.target_modules
    meant = targets == "all-linear" or (
        targets is not None and any(check_target_module_exists(config, name) for name in _as_layers(model))
    )
    return stacked_experts(model) if meant else None


def check_every_layer_is_here(model: nn.Module, adapter_name: str, names: Iterable[str]) -> None:
    """Refuse tensors of an adapter that no layer of the model takes: PEFT drops them without a word.

    Args:
        model: with the adapter in place.
        names: of tensors as files have them, those of the adapter and others (whole modules, tokens, biases).

    Raises:
        ConfigError: naming one.
    """
    own = {
        f"{_WRAPPERS.sub('', layer_name)}.{kind}.weight"
        for layer_name, layer in model.named_modules()
        if isinstance(layer, BalancedLinear)
        for kind in layer.adapter_layer_names
        if adapter_name in getattr(layer, kind)
    }
    own |= {_PREFIX + name for name in own}
    ends = tuple(f".{kind}.weight" for kind in BalancedLinear.adapter_layer_names)
    lost = [name for name in names if name.endswith(ends) and _WRAPPERS.sub("", name) not in own]
    _refuse_lost(model, adapter_name, lost)


def without_codes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an adapter's file holds, but for a packed base: PEFT saves an adapted head whole, and codes are no weights.

    A float head stays, which may have been given rows for new tokens.
    """
    ends = [f".base_layer.{part}" for part in ("weight", *BESIDE_CODES)]
    heads = [
        n.removesuffix(ends[0]) for n, held in tensors.items() if n.endswith(ends[0]) and not held.is_floating_point()
    ]
    codes = {head + end for head in heads for end in ends}
    return {name: tensor for name, tensor in tensors.items() if name not in codes}


def layers_with(model: nn.Module, adapter_name: str) -> set[str]:
    """Names of the layers with an adapter, as files have them."""
    return {
        _WRAPPERS.sub("", name).removeprefix(_PREFIX)
        for name, layer in model.named_modules()
        if isinstance(layer, BalancedLinear) and adapter_name in layer.rank
    }


def layers_left_out(layers: set[str], names: Iterable[str]) -> list[str]:
    """The other way round: those of some layers that none of a file's tensors is for."""
    held = {_WRAPPERS.sub("", name).removeprefix(_PREFIX).partition(".lora_")[0] for name in names}
    return sorted(layers - {name_here(name, layers) for name in held})


def check_loaded(model: Any, already: Container[str], report: Any) -> None:
    """The same, once transformers 5 has loaded an adapter by itself and reports what it did not expect.

    Args:
        model: with the adapter, which is taken out again if it is refused.
        already: names of the adapters that it had before.

    Raises:
        ConfigError: naming one.
    """
    parts = tuple(f".{kind}." for kind in BalancedLinear.adapter_layer_names)
    lost = sorted(name for name in report.unexpected_keys if any(part in name for part in parts))
    for adapter_name in [name for name in model.peft_config if name not in already]:
        if lost and isinstance(model.peft_config[adapter_name], QBLoRAConfig):
            model.delete_adapter(adapter_name)
            _refuse_lost(model, adapter_name, lost)


def _refuse_lost(model: nn.Module, adapter_name: str, lost: Sequence[str]) -> None:
    if lost:
        experts = stacked_experts(model) if any(".experts." in name for name in lost) else None
        advice = experts or "load the base that it was trained over, or leave these tensors out"
        raise ConfigError(
            f"adapter {adapter_name!r}: {len(lost)} tensors for layers that have no adapter ({lost[0]}, ...): "
            f"adapter_config.json and the file, or the adapter and this base, do not belong together; {advice}"
        )


def _as_layers(model: nn.Module) -> Iterator[str]:
    """Full names that the parts of stacked experts would have as layers, by whatever name files have them."""
    stacked = stacks_of(model)
    told = names_in_files(model) if stacked and not BEFORE_5 else []
    parts = {part for _, names in told for part in names}
    for path in stacked:
        yield from layer_names(model, path, parts)
