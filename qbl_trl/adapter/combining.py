"""Adapters summed into one: PEFT's `add_weighted_adapter` over the compressed matrices of balanced adapters.

Only adapters of one block shape (in_factor, out_factor, pooling) can be combined; what PEFT does with a full weight
change is done with the block matrix, which is smaller by in_factor * out_factor.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraModel
from torch import Tensor, nn

from qbl_trl.adapter.balance import matched_rank
from qbl_trl.adapter.factors import recorded_factors
from qbl_trl.adapter.layer import BalancedLinear
from qbl_trl.errors import ConfigError

_CHANGED = ("use_rslora", "quantization_aware", "in_factor_pattern", "out_factor_pattern")  # for a sum's copy
_SUMMED = ("linear", "ties", "dare_ties", "dare_linear", "magnitude_prune")


class CombiningModel(LoraModel):
    """The part of QBLoRAModel that combines adapters."""

    _summed: Sequence[str] = ()  # the parts of the sum that is being placed

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """PEFT's. The sum has a scale of one, as its matrices take for granted: by rsLoRA it would be sqrt(r)."""
        first = self.peft_config.get(adapters[0]) if adapters else None
        if first is None or adapter_name in self.peft_config:
            super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)
            return
        own = {name: getattr(first, name) for name in _CHANGED}
        first.use_rslora = False  # it is copied
        first.quantization_aware = all(
            getattr(self.peft_config.get(name), "quantization_aware", True) for name in adapters
        )
        self._summed = adapters
        try:
            super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)
        except BaseException:
            if adapter_name in self.peft_config:
                self.delete_adapter(adapter_name)
            raise
        finally:
            vars(first).update(own)
            self._summed = ()
        self._record_ranks_(adapter_name, adapters)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's; the matrices of a sum are as wide as those of its parts, not as the model under them."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        parts = [layer.lora_A for layer in model.modules() if isinstance(layer, BalancedLinear)]
        if any(part[name].weight.dtype == torch.float32 for part in parts for name in self._summed if name in part):
            self._cast_adapter_dtype(adapter_name)

    def _record_ranks_(self, adapter_name: str, adapters: Sequence[str]) -> None:
        """Say what rank each layer of a sum has, where matrices of other ranks (`rank_pattern`) were summed."""
        config, ranks = self.peft_config[adapter_name], {}
        for layer_name, layer in self.model.named_modules():
            if isinstance(layer, BalancedLinear) and adapter_name in layer.lora_A:
                held = layer.lora_A[adapter_name].weight.shape[0]
                if held != layer.rank[adapter_name]:
                    r = next(layer.r[name] for name in adapters if layer.rank.get(name) == held)
                    layer.rank[adapter_name], layer.r[adapter_name] = held, r
                    layer.lora_alpha[adapter_name] = r
                    layer.set_scale(adapter_name, 1.0)
                    ranks[f"^{re.escape(layer_name)}"] = r
        config.rank_pattern, config.alpha_pattern = ranks, dict(ranks)

    def _check_add_weighted_adapter(
        self, adapters: list[str], combination_type: str, svd_rank: int | None
    ) -> tuple[str, int, Any]:
        checked = super()._check_add_weighted_adapter(adapters, combination_type, svd_rank)
        first = self.peft_config[adapters[0]]  # whose configuration the sum will have
        placed: dict[str, tuple[int, int]] = {}  # factors of layers by name
        for layer_name, layer in self.model.named_modules():
            if isinstance(layer, BalancedLinear):
                held = [name for name in adapters if name in layer.rank]
                if not held:
                    continue
                p, e = layer.in_factor[held[0]], layer.out_factor[held[0]]
                placed[layer_name] = p, e
                shapes = {(p, e, first.pooling), *(self._block_shape(layer, name) for name in held)}
                if len(shapes) > 1:
                    raise ConfigError(
                        f"add_weighted_adapter: {', '.join(adapters)} differ in (in_factor, out_factor, pooling) at "
                        f"{layer_name}: {sorted(map(str, shapes))}; only adapters of one compressed shape can be "
                        "combined. Give them the same in_factor and out_factor when they are made"
                    )
                ranks = {layer.rank[name] for name in held}
                if checked[0] in _SUMMED and len(ranks) > 1:
                    raise ConfigError(
                        f"add_weighted_adapter: {', '.join(adapters)} have ranks {sorted(ranks)} at {layer_name}, and "
                        f'combination_type="{checked[0]}" sums matrices of one shape; "cat" and "svd" take any ranks'
                    )
        if any(self.peft_config[name].adapter == "block" for name in adapters):
            raise ConfigError(
                "add_weighted_adapter combines low-rank factors, and an adapter='block' has none; activate several at "
                "once instead, or merge one after another"
            )
        apart = {name: factors for name, factors in placed.items() if recorded_factors(first, name) != factors}
        for at, field in enumerate(("in_factor_pattern", "out_factor_pattern")):  # new ones, for the copy alone
            known = {f"^{re.escape(name)}": factors[at] for name, factors in apart.items()}
            setattr(first, field, {**getattr(first, field), **known})
        kind, rank, targets = checked
        if kind == "cat":
            rank += max(self._missing_rows(adapters, rank), default=0)
        return kind, rank, targets

    def _missing_rows(self, adapters: list[str], r: int) -> Iterator[int]:
        """By how much the matched rank of the nominal sum falls short of the sum of matched ranks (rounding)."""
        for layer in self.modules():
            if isinstance(layer, BalancedLinear):
                held = [name for name in adapters if name in layer.rank]
                if held:
                    p, e = layer.in_factor[held[0]], layer.out_factor[held[0]]
                    matched = matched_rank(r, layer.base.in_features, layer.base.out_features, p, e)
                    yield max(0, sum(layer.rank[name] for name in held) - matched)

    def _block_shape(self, layer: BalancedLinear, name: str) -> tuple[int, int, str]:
        return layer.in_factor[name], layer.out_factor[name], self.peft_config[name].pooling

    def _svd_generalized_task_arithmetic_weighted_adapter(
        self,
        combination_type: str,
        adapters: list[str],
        weights: list[float],
        new_rank: int,
        target: BalancedLinear,
        target_lora_A: Tensor,
        target_lora_B: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """The singular value decomposition of the combined block delta, in the compressed space."""
        rank = target_lora_A.shape[0]
        possible = min(rank, target_lora_B.shape[0], target_lora_A.shape[1])
        first, second = super()._svd_generalized_task_arithmetic_weighted_adapter(
            combination_type,
            adapters,
            weights,
            possible,
            _BlockView(target),
            target_lora_A,
            target_lora_B,
            *args,
            **{**kwargs, "full_matrices": False},
        )
        if possible < rank:  # the block space has fewer dimensions than the rank
            first = nn.functional.pad(first, (0, 0, 0, rank - possible))
            second = nn.functional.pad(second, (0, rank - possible))
        pooling_scale = next(scale for name, scale in target.pooling_scale.items() if name in adapters)  # all the same
        return first.to(target_lora_A.dtype), (second / pooling_scale).to(target_lora_B.dtype)


class _BlockView:
    """A layer as PEFT's weighted combination reads it, with block deltas in place of full ones."""

    fan_in_fan_out = False

    def __init__(self, layer: BalancedLinear) -> None:
        self.lora_A, self.lora_embedding_A = layer.lora_A, layer.lora_embedding_A
        self.get_delta_weight = layer.block_delta
