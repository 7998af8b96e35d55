"""A configuration before a float model is quantized by it: what describes stored models is not asked of new ones.

The configuration of a packed folder, or of a merged model, states more than settings: blocks of a merged adapter, and
formats of single layers. A model that is quantized now gets neither, so its configuration must not say so.
"""

import dataclasses
import logging
from typing import Any

from torch import nn

from qbl_trl.config import GroupQuantConfig
from qbl_trl.errors import ConfigError
from qbl_trl.quant.arriving import float8_in
from qbl_trl.quant.calibration import calibration_batches
from qbl_trl.quant.head import check_embeddings
from qbl_trl.quant.targets import naming_nothing

logger = logging.getLogger(__name__)

_CHOSEN = ("bits", "group_size", "scale_dtype")


def requested(model: nn.Module, config: GroupQuantConfig) -> GroupQuantConfig:
    """The settings that a float model is quantized by: without what is only stored, with calibration that was checked.

    Raises:
        ConfigError: if single layers are to have another format, calibration data are missing or no token ids, the
            embedding cannot be packed, or weights are in float8.
    """
    config = dataclasses.replace(config)  # what was stored is written into it
    narrow = next(iter(float8_in(model)), None)
    if narrow is not None:
        raise ConfigError(
            f"{narrow} is in float8, which torch does not compute with: quantize a model in float32, bfloat16 or "
            "float16. model.to(torch.bfloat16) makes one, or, where layers keep scales beside such weights, the "
            "library they come from (model.dequantize())"
        )
    mixed = next((name for name, stored in config.layers.items() if set(stored) & set(_CHOSEN)), None)
    if mixed is not None:
        raise ConfigError(
            f"GroupQuantConfig: layers[{mixed!r}]={config.layers[mixed]} describes a layer of a stored model; all "
            f"layers of a float model get the same {', '.join(_CHOSEN)}. Make a configuration without layers, and keep "
            "single layers in float with modules_to_not_convert"
        )
    if config.in_factor is not None or config.layers:
        logger.warning(
            "GroupQuantConfig: in_factor=%s, out_factor=%s and %d entries of layers describe the adapter that a stored "
            "model has merged; this model is quantized now and has none, so they are left out",
            *(config.in_factor, config.out_factor, len(config.layers)),
        )
        plain: dict[str, Any] = {"in_factor": None, "out_factor": None, "delta_dtype": "float32"}
        config = dataclasses.replace(config, **plain, zeros=None, layers={})
    if config.algorithm == "gptq":
        if config.calibration is None:
            raise ConfigError(
                'GroupQuantConfig: algorithm="gptq" needs calibration=[token id tensors of (batch, tokens)]'
            )
        config = dataclasses.replace(config, calibration=calibration_batches(model, config.calibration))
    if config.quantize_embeddings:
        check_embeddings(model, config)
    return config


def warn_of_unknown(model: nn.Module, config: GroupQuantConfig) -> None:
    """Say which entries of modules_to_not_convert name no module of a model, whose experts are layers by now."""
    unknown = naming_nothing(model, config)
    if unknown:
        logger.warning(
            "modules_to_not_convert: %s names no module of %s, and keeps nothing in float",
            ", ".join(unknown),
            type(model).__name__,
        )
