"""What the trainer half reads off an adapted layer."""

from typing import cast

from torch import nn

from qbl_trl.adapter.layer import BalancedLinear, adapter_layers
from qbl_trl.errors import ConfigError


def active_layers(model: nn.Module) -> dict[str, BalancedLinear]:
    """Every adapted layer with an active adapter, by full name.

    Raises:
        ConfigError: if there is no balanced adapter, or none is active.
    """
    found = {name: layer for name, layer in adapter_layers(model).items() if active(layer)}
    if not found:
        raise ConfigError("no balanced adapter is active; model.set_adapter(NAME) makes one active")
    return found


def active(layer: BalancedLinear) -> list[str]:
    """Names of the adapters that take part in the forward pass."""
    return [name for name in layer.active_adapters if name in layer.rank]


def base_of(layer: BalancedLinear) -> nn.Module:
    """The frozen layer under the adapter."""
    return cast(nn.Module, layer.get_base_layer())  # type: ignore[operator]
