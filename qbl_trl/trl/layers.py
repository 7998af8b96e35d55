"""What the trainer half reads off an adapted layer."""

from typing import cast

from torch import nn

from qbl_trl.adapter.layer import BalancedLinear


def active(layer: BalancedLinear) -> list[str]:
    """Names of the adapters that take part in the forward pass."""
    return [name for name in layer.active_adapters if name in layer.rank]


def base_of(layer: BalancedLinear) -> nn.Module:
    """The frozen layer under the adapter."""
    return cast(nn.Module, layer.get_base_layer())  # type: ignore[operator]


__all__ = ["active", "base_of"]
