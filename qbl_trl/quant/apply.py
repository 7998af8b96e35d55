"""Packed layers in the place of float ones, and what the configuration says of them afterwards."""

import logging
from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qbl_trl.config import SCALE_DTYPES, GroupQuantConfig
from qbl_trl.errors import ConfigError
from qbl_trl.quant.algorithms import quantize
from qbl_trl.quant.head import quantize_embeddings_
from qbl_trl.quant.linear import GroupQuantLinear
from qbl_trl.quant.modules import replace
from qbl_trl.quant.packed import PackedWeight
from qbl_trl.quant.stacks import float_parts, take_out_
from qbl_trl.quant.targets import is_named

logger = logging.getLogger(__name__)

_WORTH_SAYING = 0.2  # share of the weights


def quantize_layer_(model: nn.Module, name: str, weight: Tensor, config: GroupQuantConfig) -> None:
    """Replace the float layer `name` by its quantized form; `weight` is stored as that layer stores it.

    Raises:
        ConfigError: if it cannot be quantized, as `quantize`.
    """
    old: Any = model.get_submodule(name)
    matrix = weight.T if isinstance(old, Conv1D) else weight
    try:
        affine = quantize(
            matrix,
            bits=config.bits,
            group_size=config.group_size,
            symmetric=config.symmetric,
            algorithm=config.algorithm,
            scale_dtype=SCALE_DTYPES[config.scale_dtype],
        )
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    layer = GroupQuantLinear.from_affine(
        affine, bits=config.bits, group_size=config.group_size, symmetric=config.symmetric
    )
    if old.bias is not None:
        layer.bias = old.bias
        layer.bias.requires_grad_(False)
    layer.train(old.training)
    replace(model, name, layer)


def finish_(model: nn.Module, config: GroupQuantConfig, targets: Sequence[str], fresh: Collection[str] = ()) -> None:
    """Calibrated algorithms run now; then the configuration records what was really stored.

    Args:
        fresh: those targets that hold no weight of a checkpoint, and stay as they are.
    """
    hessian = None
    if config.algorithm == "gptq":
        from qbl_trl.quant.gptq import calibrated_head_hessian, gptq_model_

        gptq_model_(model, config, [name for name in targets if name not in fresh])
        hessian = calibrated_head_hessian(model, config) if config.quantize_embeddings else None
    if config.quantize_embeddings:
        quantize_embeddings_(model, config, hessian)
    take_out_(model, float_parts(model))
    # Layers whose weight the checkpoint lacks (a fresh pooler or classification head) stay as they are.
    modules = dict(model.named_modules())
    stored = [(name, modules[name]) for name in targets if name in modules]
    kept = [name for name, layer in stored if not isinstance(layer, GroupQuantLinear)]
    if kept:
        config.modules_to_not_convert = [*(config.modules_to_not_convert or []), *kept]
    _warn_of_float_experts(model, config.modules_to_not_convert or ())
    kinds = {layer.format.zeros for _, layer in stored if isinstance(layer, GroupQuantLinear)}
    if len(kinds) == 1:
        config.zeros = kinds.pop()


def _warn_of_float_experts(model: nn.Module, keys: Collection[str]) -> None:
    """Some models keep all experts of a layer in one tensor, which is no linear layer and stays as it is.

    Args:
        keys: what stays in float because somebody said so.
    """
    stacked = {
        name: p.numel()
        for name, p in model.named_parameters()
        if p.dim() == 3 and p.is_floating_point() and not any(is_named(name, key) for key in keys)
    }
    packed = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, PackedWeight))
    share = sum(stacked.values()) / max(sum(stacked.values()) + packed, 1)
    if share > _WORTH_SAYING:
        logger.warning(
            "GroupQuantConfig: %.0f%% of the weights stay in float, because they are no linear layers: %s and %d more",
            *(100 * share, next(iter(stacked)), len(stacked) - 1),
        )
