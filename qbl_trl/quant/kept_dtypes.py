"""Packed tensors keep the types they are stored in while transformers 4.57 loads them."""

from typing import Any

from torch import nn

from qbl_trl.quant.packed import BESIDE_CODES, PackedWeight


def keep_stored_dtypes() -> None:
    """transformers 4.57 casts every float tensor of a quantized checkpoint to the model's dtype while loading it.

    Scales, zeros and deltas are part of the packed format: cast to bfloat16 they are other weights. There is no hook
    around that cast, so the one function that chooses the dtype is wrapped. transformers 5 needs nothing.
    """
    from transformers import modeling_utils

    original: Any = modeling_utils._infer_parameter_dtype
    if getattr(original, "keeps_group_quant", False):
        return

    def infer(model: nn.Module, param_name: str, *args: Any, **kwargs: Any) -> Any:
        layer, _, part = param_name.rpartition(".")
        if part in BESIDE_CODES and isinstance(model.get_submodule(layer), PackedWeight):
            return True, None
        return original(model, param_name, *args, **kwargs)

    infer.keeps_group_quant = True  # type: ignore[attr-defined]
    modeling_utils._infer_parameter_dtype = infer
