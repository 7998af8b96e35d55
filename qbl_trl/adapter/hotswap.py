"""Hot-swapping: one adapter's values in the place of another's, also inside a compiled model.

A compiled model wants matrices whose shapes stay. `peft.utils.hotswap.prepare_model_for_compiled_hotswap` pads those
of PEFT's own layers up to one rank; here the same is done for balanced adapters, whose real rank depends on the layer.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

from peft.utils import hotswap
from torch import Tensor, nn

from qbl_trl.adapter.balance import matched_rank
from qbl_trl.adapter.factors import by_pattern, recorded_factors
from qbl_trl.adapter.layer import BalancedLinear, adapter_layers
from qbl_trl.config import QBLoRAConfig
from qbl_trl.errors import ConfigError
from qbl_trl.peft_type import QBLORA
from qbl_trl.wrapped import unwrap

# What two adapters must share so that one can take the other's place without being placed anew; and the factors of each
# layer that both are on, which a configuration words by the layers it was placed on.
_SHARED = ["use_rslora", "lora_dropout", "alpha_pattern", "adapter", "pooling"]


def pad_ranks_(model: nn.Module, target_rank: int) -> bool:
    """Pad every low-rank balanced adapter with zeros, in place, to what nominal rank `target_rank` has on its layer.

    Returns:
        Whether there was one.

    Raises:
        ConfigError: if an adapter has a larger rank already; no layer has been changed then.
    """
    wanted: list[tuple[BalancedLinear, str, int]] = []
    for name, layer in model.named_modules():
        if not isinstance(layer, BalancedLinear):
            continue
        for adapter in layer.lora_A:
            p, e = layer.in_factor[adapter], layer.out_factor[adapter]
            rank = matched_rank(target_rank, layer.base.in_features, layer.base.out_features, p, e)
            if rank < layer.rank[adapter]:
                raise ConfigError(
                    f"{name}: adapter {adapter!r} has rank {layer.rank[adapter]}, target_rank={target_rank} would be "
                    f"{rank} here; give the largest r of all adapters that will be swapped in"
                )
            wanted.append((layer, adapter, rank))
    for layer, adapter, rank in wanted:
        missing = rank - layer.rank[adapter]
        _pad_(layer.lora_A[adapter], (0, 0, 0, missing))
        _pad_(layer.lora_B[adapter], (0, missing))
        layer.rank[adapter] = rank
    return bool(wanted)


def register() -> None:
    """Make hot-swapping know the method (once)."""
    if QBLORA not in hotswap.CONFIG_KEYS_TO_CHECK:
        hotswap.CONFIG_KEYS_TO_CHECK[QBLORA] = _SHARED
        hotswap._pad_lora_weights = _with_ours(hotswap._pad_lora_weights)
        hotswap.hotswap_adapter_from_state_dict = _checked(hotswap.hotswap_adapter_from_state_dict)


def _checked(swap: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(swap)
    def swap_checked(
        model: nn.Module, state_dict: Mapping[str, Tensor], adapter_name: str, config: Any, *args: Any, **kwargs: Any
    ) -> None:
        if isinstance(config, QBLoRAConfig):
            _check_factors(model, state_dict, adapter_name, config)
        swap(model, state_dict, adapter_name, config, *args, **kwargs)
        if isinstance(config, QBLoRAConfig):
            _scale_by_pattern(model, adapter_name, config)

    return swap_checked


def _check_factors(model: nn.Module, state: Mapping[str, Tensor], adapter: str, config: QBLoRAConfig) -> None:
    for name, layer in adapter_layers(unwrap(model)).items():
        if adapter not in layer.rank or not any(f".{name}.lora_" in f".{key}" for key in state):
            continue
        held, given = (layer.in_factor[adapter], layer.out_factor[adapter]), recorded_factors(config, name)
        if held != given:
            raise ConfigError(
                f"{name}: an adapter with (in_factor, out_factor) = {given} cannot take the place of one with {held}; "
                "load it beside that one (load_adapter), or train it with the same factors"
            )


def _scale_by_pattern(model: nn.Module, adapter: str, config: QBLoRAConfig) -> None:
    """PEFT looks for patterns of rank and alpha in names of parameters, which end behind those of layers."""
    for name, layer in adapter_layers(unwrap(model)).items():
        if adapter in layer.rank:
            r: Any = by_pattern(config.rank_pattern, name, config.r)
            alpha: Any = by_pattern(config.alpha_pattern, name, config.lora_alpha)
            layer.r[adapter], layer.lora_alpha[adapter] = r, alpha
            hotswap._update_scaling(layer, adapter, alpha / (math.sqrt(r) if config.use_rslora else r))


def _pad_(linear: nn.Linear, padding: tuple[int, ...]) -> None:
    weight = linear.weight
    linear.weight = nn.Parameter(nn.functional.pad(weight.detach(), padding), requires_grad=weight.requires_grad)
    linear.out_features, linear.in_features = linear.weight.shape


def _with_ours(pad_lora_weights: Callable[..., bool]) -> Callable[..., bool]:
    def pad(model: nn.Module, target_rank: int) -> bool:
        ours = pad_ranks_(model, target_rank)
        return pad_lora_weights(model, target_rank=target_rank) or ours

    return pad
