"""initialize_from_error_: start an adapter at what quantization took away (LoftQ's idea, in the balanced space).

    E = W_float - W_base                                  the error of the base, (N, K)
    D = block mean of E over e x p                        the nearest block matrix in the Frobenius norm
    gain * B A = the best approximation of D of rank R    truncated singular value decomposition

so that W_base + dW is the nearest weight to W_float the adapter can express. One step, not LoftQ's alternation: the
base is not quantized again. For p = e = 1 this is LoftQ's first iteration.

Source: LoftQ, arXiv:2310.08659, section 3.2 (p = e = 1).
"""

import os
from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qbl_trl.adapter.bases import float_weight
from qbl_trl.adapter.layer import BalancedLinear, adapter_layers
from qbl_trl.errors import ConfigError
from qbl_trl.quant.float_weights import FloatWeights
from qbl_trl.wrapped import unwrap


def initialize_from_error_(
    peft_model: nn.Module, float_source: nn.Module | str | os.PathLike[str], adapter_name: str = "default"
) -> dict[str, float]:
    """Set A and B (or D) of one adapter to the quantization error of its base, in place.

    The adapted model then no longer starts as its base, but nearer to the float model. Weights of a folder are read
    one at a time, where it holds them so.

    Args:
        peft_model: a model with balanced adapters over a quantized base; nothing merged.
        float_source: the float model, or a folder with its safetensors files.
        adapter_name: the adapter to set.

    Returns:
        By full layer name, the weight error that is left over the error before: ||E - dW|| / ||E||, at most 1.

    Raises:
        ConfigError: if the adapter, a float weight or its shape is missing, adapters are merged, or have no scale.

    Source: LoftQ, arXiv:2310.08659.
    """
    layers = {n: layer for n, layer in adapter_layers(unwrap(peft_model)).items() if adapter_name in layer.rank}
    if not layers:
        raise ConfigError(f"initialize_from_error_: there is no balanced adapter {adapter_name!r}")
    read = _reader(float_source, unwrap(peft_model))
    return {name: _initialize_layer_(name, layer, adapter_name, read(name)) for name, layer in layers.items()}


def nearest_factors(error: Tensor, in_factor: int, out_factor: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The block matrix nearest to `error`, and its best factors.

    Args:
        error: (N, K) float.

    Returns:
        D (N / e, K / p), B (N / e, R) and A (R, K / p); B A is the best approximation of D of rank R. The singular
        values are shared evenly between B and A.
    """
    block = error.unflatten(0, (-1, out_factor)).unflatten(-1, (-1, in_factor)).mean(dim=(1, 3))
    left, values, right = torch.linalg.svd(block, full_matrices=False)
    kept = min(rank, len(values))
    roots = values[:kept].sqrt()
    up, down = left[:, :kept] * roots, roots.unsqueeze(1) * right[:kept]
    missing = rank - kept
    return block, nn.functional.pad(up, (0, missing)), nn.functional.pad(down, (0, 0, 0, missing))


@torch.no_grad()
def _initialize_layer_(name: str, layer: BalancedLinear, adapter: str, weight: Tensor) -> float:
    if layer.merged:
        raise ConfigError(f"{name}: adapters are merged here; call unmerge_adapter() first")
    base = float_weight(layer.get_base_layer())
    if layer.base.transposed:
        base = base.T
    if weight.shape != base.shape:
        raise ConfigError(
            f"{name}: the float weight is {tuple(weight.shape)}, the base layer {tuple(base.shape)}; "
            "give the checkpoint this base was quantized from"
        )
    error = weight.to(base.device, torch.float32) - base
    p, e, gain = layer.in_factor[adapter], layer.out_factor[adapter], layer.gain(adapter)
    block, up, down = nearest_factors(error, p, e, layer.rank[adapter])
    if gain == 0:
        raise ConfigError(f"{name}: lora_alpha or the adapter's scale is 0, and nothing it holds would be felt")
    if adapter in layer.lora_block:
        layer.lora_block[adapter].weight.copy_(block / gain)  # type: ignore[operator]
    else:
        # Both factors take the root of the gain: B stays as large against A as the singular values made it.
        root = abs(gain) ** 0.5
        layer.lora_A[adapter].weight.copy_(down / root)  # type: ignore[operator]
        layer.lora_B[adapter].weight.copy_(up / (gain / root))  # type: ignore[operator]
    delta = layer.get_delta_weight(adapter)
    left = error - (delta.T if layer.base.transposed else delta)
    return float(left.norm() / error.norm().clamp_min(1e-30))


def _reader(source: nn.Module | str | os.PathLike[str], model: nn.Module) -> Callable[[str], Tensor]:
    """A function from layer name to float weight, (outputs, inputs)."""
    if isinstance(source, nn.Module):
        held = {name: tensor.detach() for name, tensor in unwrap(source).state_dict().items()}
        turned = [f"{name}.weight" for name, layer in unwrap(source).named_modules() if isinstance(layer, Conv1D)]
        held |= {name: held[name].T for name in turned}
        return lambda name: held[f"{name}.weight"] if f"{name}.weight" in held else _lacks(name)
    floats = FloatWeights(source, model)
    if not floats:
        raise ConfigError(f"{source} holds no safetensors file; give a float model or its saved folder")
    return lambda name: weight if (weight := floats.read(name)) is not None else _lacks(name)


def _lacks(name: str) -> NoReturn:
    raise ConfigError(
        f"{name}: the float source has no {name}.weight; give the float checkpoint of the same architecture"
    )
