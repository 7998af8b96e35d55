"""Where the layers of a model are placed: what `device_map="auto"` counts, and what no map may ask for.

A map is made while the weights are still float in name: counted so, a model that fits at 4 bits would be spread over
devices that it does not need.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate.utils import CustomDtype

from qbl_trl.config import SCALE_DTYPES, GroupQuantConfig
from qbl_trl.errors import ConfigError

_COUNTED = {2: CustomDtype.INT2, 4: CustomDtype.INT4, 8: torch.int8}


def bytes_per_weight(config: GroupQuantConfig) -> float:
    """Of a layer that is quantized now: its code, and its share of a scale and of a zero point."""
    scale = SCALE_DTYPES[config.scale_dtype].itemsize
    zero = 0 if config.symmetric else scale if config.algorithm == "hqq" else config.bits / 8
    return config.bits / 8 + (scale + zero) / config.group_size


def counted_types(names: Iterable[str], config: GroupQuantConfig) -> dict[str, Any]:
    """By the name of each weight, what accelerate counts for its code."""
    return dict.fromkeys(names, _COUNTED[config.bits])


def room_for_codes(room: Mapping[Any, Any], config: GroupQuantConfig) -> dict[Any, Any]:
    """The part of the memory of each device that is left for codes, where nothing but codes is counted."""
    share = config.bits / 8 / bytes_per_weight(config)
    return {device: int(size * share) for device, size in room.items()}


def refuse_disk(device_map: Any) -> None:
    """Offloaded to disk, a layer would stay in float, or lose its scales.

    Raises:
        ConfigError: naming a module.
    """
    places = device_map.items() if isinstance(device_map, dict) else ()
    found = next((name for name, place in places if str(place) == "disk"), None)
    if found is not None:
        raise ConfigError(
            f"device_map puts {found or 'the whole model'!r} on disk, where group-quantized layers cannot be kept; "
            "give the devices more room (max_memory, device_map) or take fewer bits"
        )
