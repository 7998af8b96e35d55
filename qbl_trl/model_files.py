"""Saving models whose generation settings transformers reads with a warning and refuses to write."""

import copy
import logging
import os
from typing import Any

from qbl_trl.errors import ConfigError

logger = logging.getLogger(__name__)


def save_model(model: Any, folder: str | os.PathLike[str]) -> None:
    """`model.save_pretrained(folder)`, with generation settings that may be saved.

    Raises:
        ConfigError: as `valid_generation`.
    """
    settings = getattr(model, "generation_config", None)
    valid = valid_generation(settings)
    if valid is not settings:
        logger.warning("generation settings sample (temperature, top_p, ...) without do_sample; saved with do_sample")
        model.generation_config = valid
    try:
        model.save_pretrained(folder)
    finally:
        if valid is not settings:
            model.generation_config = settings


def valid_generation(settings: Any) -> Any:
    """Generation settings (a GenerationConfig, or None) as they may be saved.

    Files of older models hold a temperature or top_p without do_sample: they meant to sample.

    Returns:
        The same object, or a copy with do_sample.

    Raises:
        ConfigError: if they are invalid for another reason.
    """
    if settings is None or _error(settings) is None:
        return settings
    sampling = copy.deepcopy(settings)
    sampling.do_sample = True
    if (error := _error(sampling)) is not None:
        raise ConfigError(
            f"the model's generation settings cannot be saved: {error} Set them right (model.generation_config), or "
            "remove generation_config.json"
        )
    return sampling


def _error(settings: Any) -> str | None:
    try:
        settings.validate(strict=True)
    except ValueError as error:
        return " ".join(str(error).split())
    return None
