"""Merging one adapted layer into its base and out again, as PEFT asks a layer to.

float base:     W <- W + dW
4-bit groups:   delta <- delta + D, codes and scales untouched (exact where in_factor is a multiple of the group)
HQQ, GPTQ, AWQ: the same, over a GroupQuantLinear that takes their codes over and takes their place
anything else:  refused, with the reason and what to do
"""

import warnings

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from qbl_trl.adapter.bases import BNB4, Base, describe
from qbl_trl.errors import CheckpointError, MergeError
from qbl_trl.quant.blocks import add_deltas
from qbl_trl.quant.head import share_tensors_
from qbl_trl.quant.importers.modules import take_over
from qbl_trl.quant.linear import GroupQuantLinear


def _plus(weight: Tensor, change: Tensor) -> Tensor:
    """Added in float32 at least, and rounded once to the type of the weight."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) + change.to(wide)).to(weight.dtype)


class MergesIntoBase(LoraLayer):
    """The merging half of BalancedLinear.

    Attributes:
        base: what the base layer is.
        in_factor, out_factor, rank: by adapter name.
        apart_from: the embedding that a tied head was set apart from to be merged; in a tuple, for it is no part of it.
    """

    base: Base
    in_factor: dict[str, int]
    out_factor: dict[str, int]
    rank: dict[str, int]
    apart_from: tuple[nn.Module, ...]
    _before_merge: list[tuple[Tensor | None, int | None, int | None]]

    def block_delta(self, adapter_name: str) -> Tensor:
        """D, (N / e, K / p) float32."""
        raise NotImplementedError

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the base weight: added in float, kept as a block delta over 4-bit groups.

        Raises:
            MergeError: if the base cannot take the change exactly, or the result is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.rank]
        self.rest_on(self.check_merge(names, safe_merge))
        for name in names:
            layer = self.get_base_layer()
            if isinstance(layer, GroupQuantLinear):
                self._merge_into_groups(layer, name)
            else:
                merged = _plus(layer.weight.data, self.get_delta_weight(name))  # type: ignore[arg-type]
                if safe_merge and not torch.isfinite(merged).all():
                    raise MergeError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
                layer.weight.data = merged  # type: ignore[union-attr]
            self.merged_adapters.append(name)

    def check_merge(self, adapter_names: list[str], safe_merge: bool = False) -> nn.Module:
        """Refuse what `merge` would refuse, before anything is changed; adapters of other layers are no matter.

        Returns:
            The base that would be merged into.

        Raises:
            MergeError: if the base cannot take the change exactly, or (safe_merge) the change is not finite.
        """
        names = [name for name in adapter_names if name in self.rank]
        layer = self._taken_over() if names else self.get_base_layer()
        for name in names:
            p = self.in_factor[name]
            if isinstance(layer, GroupQuantLinear) and p % layer.group_size:
                raise MergeError(
                    f"in_factor={p} is no multiple of the base's quantization group of {layer.group_size}: the "
                    "adapter's change varies inside a group and does not fold into its zero point. Export the model "
                    "with its adapter instead (exact, the low-rank branch is kept), train with "
                    'quantization_aware=True, or merge(model, lossy="requantize"), which reports its loss'
                )
            if (kind := describe(layer).kind) not in ("float", "group_quant"):
                exact = "Export the model with its adapter instead (exact), or " if kind == BNB4 else ""
                raise MergeError(
                    f'a {kind} weight cannot take an adapter without loss. {exact}merge(model, lossy="requantize") '
                    "dequantizes, adds and quantizes again, and reports the loss"
                )
            if safe_merge and not torch.isfinite(self.block_delta(name)).all():
                raise MergeError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        return layer

    def merges_exactly(self) -> bool:
        """Whether merging the active adapters changes nothing but the place where they are stored."""
        group, active = self.base.group_size, [name for name in self.active_adapters if name in self.rank]
        return self.base.mergeable and (group is None or all(self.in_factor[name] % group == 0 for name in active))

    def take_over_base(self) -> None:
        """A base that holds codes of another library becomes a GroupQuantLinear of the same codes; others stay.

        Raises:
            MergeError: if its codes cannot be read.
        """
        self.rest_on(self._taken_over())

    def rest_on(self, layer: nn.Module) -> None:
        """Take a layer of the same function for the base."""
        if layer is not self.get_base_layer():
            self.base_layer = layer
        self.base = describe(layer)
        self.fan_in_fan_out = self.base.transposed

    def _taken_over(self) -> nn.Module:
        """The base as it will be merged into; this layer stays as it is."""
        if not self.base.holds_codes:
            return self.get_base_layer()
        try:
            return take_over(self.get_base_layer(), self.base.kind, "base_layer")
        except CheckpointError as error:
            raise MergeError(f'{error}. Or merge(model, lossy="requantize"), which reports its loss') from error

    def _merge_into_groups(self, layer: GroupQuantLinear, name: str) -> None:
        delta, factors = self.block_delta(name).detach(), (self.in_factor[name], self.out_factor[name])
        stored = layer.format
        self._before_merge.append((layer.delta, stored.in_factor, stored.out_factor))
        if layer.delta is not None:
            delta, factors = add_deltas(
                layer.delta.float(), (stored.in_factor or 1, stored.out_factor or 1), delta, factors
            )
        layer.set_delta(delta.to(layer.weight.device), *factors)

    def unmerge(self) -> None:
        """Take every merged adapter out again; groups and tied heads come back bit for bit.

        What was added to a float weight is subtracted and rounded again: weights of 16 bits differ in their last place.
        """
        if not self.merged:
            warnings.warn("nothing is merged into this layer, so there is nothing to take out", stacklevel=2)
        layer = self.get_base_layer()
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if isinstance(layer, GroupQuantLinear):
                layer.set_delta(*self._before_merge.pop())
            else:
                layer.weight.data = _plus(layer.weight.data, -self.get_delta_weight(name))  # type: ignore[arg-type, union-attr]
        for table in self.apart_from:
            share_tensors_(table, layer)
        self.apart_from = ()
