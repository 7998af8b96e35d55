"""Quantization on load as an operation of transformers 5's weight loading (that module does not exist before)."""

from typing import Any, Protocol

from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps

from qbl_trl.errors import QblError


class Quantizer(Protocol):
    """What is asked of the quantizer that a model is loaded with."""

    failure: QblError | None

    def param_needs_quantization(self, model: nn.Module, param_name: str) -> bool: ...

    def quantize_arrived_(self, model: nn.Module, name: str, weight: Tensor) -> None: ...


class GroupQuantize(ConversionOps):  # type: ignore[misc]
    """Takes one float weight and puts the packed layer, or those of its experts, in place of what it belongs to."""

    def __init__(self, hf_quantizer: Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        model: nn.Module | None = None,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Returns what is not quantized; packed layers are already in their place.

        Weights that the files hold as one arrive together, by their full names. What cannot be quantized ends the
        quantizing, and is raised once all is loaded: transformers would make a report of it that hides the reason.
        """
        quantizer, rest = self.hf_quantizer, {}
        for name, value in input_dict.items():
            if model is None or not quantizer.param_needs_quantization(model, name):
                rest[name] = value
            elif quantizer.failure is None:
                try:
                    quantizer.quantize_arrived_(model, name, value[0] if isinstance(value, list) else value)
                except QblError as failure:
                    quantizer.failure = failure
                    break
                if missing_keys is not None:
                    missing_keys.discard(name)
        return rest
