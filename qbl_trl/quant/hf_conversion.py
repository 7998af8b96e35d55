"""Quantization on load as an operation of transformers 5's weight loading (that module does not exist before)."""

from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps

from qbl_trl.quant.hf_quantizer import GroupQuantizer


class GroupQuantize(ConversionOps):  # type: ignore[misc]
    """Takes one float weight and puts the packed layer, or those of its experts, in place of what it belongs to."""

    def __init__(self, hf_quantizer: GroupQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        model: nn.Module | None = None,
        full_layer_name: str | None = None,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Returns nothing to set: the packed layer is already in its place."""
        (value,) = input_dict.values()
        weight = value[0] if isinstance(value, list) else value
        if model is not None and full_layer_name is not None:
            self.hf_quantizer.quantize_arrived_(model, full_layer_name, weight)
            if missing_keys is not None:
                missing_keys.discard(full_layer_name)
        return {}
