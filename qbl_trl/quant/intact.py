"""Whether packed layers are as they were made: their tensors here, and of the types that their format says."""

from torch import Tensor, nn

from qbl_trl.config import SCALE_DTYPES
from qbl_trl.errors import ConfigError
from qbl_trl.quant.packed import PackedWeight


def is_offloaded(layer: nn.Module) -> bool:
    """Whether a tensor of a layer is on no device: accelerate brings it for the layer's forward pass alone."""
    return any(tensor.is_meta for tensor in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)))


def check_present(model: nn.Module, what: str) -> None:
    """Refuse a model of which a packed layer is offloaded; one that is nowhere as a whole has no weights to lose.

    Raises:
        ConfigError: naming the layer.
    """
    absent = next((name for name, m in model.named_modules() if isinstance(m, PackedWeight) and is_offloaded(m)), None)
    if absent is not None and not all(parameter.is_meta for parameter in model.parameters()):
        raise ConfigError(f"{what}: {absent} is on no device (meta); load the model whole, without offloading")


def check_types(model: nn.Module) -> None:
    """Refuse scales, zero points and deltas that were cast: the layer computes something else, and nothing loads them.

    Raises:
        ConfigError: naming the layer and its tensor.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, PackedWeight):
            for part, found, said in _types(layer):
                if found is not None and said in SCALE_DTYPES and found.dtype != SCALE_DTYPES[said]:
                    raise ConfigError(
                        f"save_pretrained: {part} of {name} are {found.dtype}, and were {said}: something has cast "
                        "them (load_checkpoint_and_dispatch with a dtype does). Load the model with from_pretrained, "
                        "which casts what is in float alone"
                    )


def _types(layer: PackedWeight) -> list[tuple[str, Tensor | None, str]]:
    stored = layer.format
    return [
        ("scales", layer.scales, stored.scale_dtype),
        ("zeros", layer.zeros, stored.zeros),
        ("delta", layer.delta, stored.delta_dtype),
    ]
