"""How precise the weights of a float model were when they were quantized.

The same checkpoint loaded in another type has other codes, if that type rounds it: some in a hundred.
"""

import torch
from torch import Tensor

from qbl_trl.config import SCALE_DTYPES, GroupQuantConfig
from qbl_trl.errors import ConfigError

_NARROW = ("bfloat16", "float16")


class Precision:
    """The narrowest type that holds all the weights it is shown.

    Attributes:
        dtype: "bfloat16", "float16" or "float32"; of files in bfloat16 the first, in whatever type they were loaded.
    """

    def __init__(self) -> None:
        self._holding = list(_NARROW)

    @property
    def dtype(self) -> str:
        return self._holding[0] if self._holding else "float32"

    def see(self, weight: Tensor) -> None:
        """Take a weight into account."""
        types = {name: SCALE_DTYPES[name] for name in self._holding}
        self._holding = [n for n, dtype in types.items() if torch.equal(weight.to(dtype).to(weight.dtype), weight)]


def as_precise(weight: Tensor, config: GroupQuantConfig) -> Tensor:
    """A weight rounded to the type that a configuration says, in its own type.

    Raises:
        ConfigError: if that type has no place for it.
    """
    wanted = config.weights_dtype
    if wanted is None:
        return weight
    rounded = weight.to(SCALE_DTYPES[wanted])
    if wanted == "float16" and not rounded.isfinite().all() and weight.isfinite().all():
        raise ConfigError(
            'GroupQuantConfig: weights_dtype="float16" ends at 65504, and a weight is larger; use "bfloat16"'
        )
    return rounded.to(weight.dtype)
