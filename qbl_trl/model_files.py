"""Saving models whose generation settings transformers reads with a warning and refuses to write."""

import copy
import logging
import os
from numbers import Real
from typing import Any

from qbl_trl.cards import write_card
from qbl_trl.errors import ConfigError

logger = logging.getLogger(__name__)

_NUMBERS = ("temperature", "top_k", "top_p", "repetition_penalty", "min_length")  # that an export tells GenAI
_OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")


def save_model(model: Any, folder: str | os.PathLike[str]) -> None:
    """`model.save_pretrained(folder)`, with generation settings that may be saved (the model's own for all that), and a
    README.md that says how to open packed weights.

    Raises:
        ConfigError: as `valid_generation`.
    """
    settings = generation_settings(model)
    valid = valid_generation(settings)
    if valid is not settings:
        model.generation_config = valid
    try:
        model.save_pretrained(folder)
        write_card(model, folder)
    finally:
        if valid is not settings:
            model.generation_config = settings


def generation_settings(model: Any) -> Any:
    """The GenerationConfig that is saved with a model; None where it generates nothing."""
    generates: Any = getattr(model, "can_generate", lambda: False)
    return getattr(model, "generation_config", None) if generates() else None


def valid_generation(settings: Any) -> Any:
    """Generation settings (a GenerationConfig, or None) as they may be saved.

    Files of older models hold a temperature or top_p without do_sample. Greedy generation reads neither, so they are
    left out, with a warning.

    Returns:
        The same object, or a copy.

    Raises:
        ConfigError: if they are invalid for another reason.
    """
    if settings is None or _error(settings) is None:
        return settings
    valid = _without_sampling(settings)
    logger.warning("the generation settings hold a temperature, top_p, ... without do_sample: saved without them")
    return valid


def check_generation(settings: Any) -> None:
    """Refuse settings that cannot be saved.

    Raises:
        ConfigError: as `valid_generation`.
    """
    if settings is not None and _error(settings) is not None:
        _without_sampling(settings)
    for name in _NUMBERS:
        if not isinstance(getattr(settings, name, None), Real | None):
            raise ConfigError(
                f"the model's generation settings hold {name}={getattr(settings, name)!r}, which is no number; set it "
                "right (model.generation_config), or remove generation_config.json"
            )


def _without_sampling(settings: Any) -> Any:
    greedy, usual = copy.deepcopy(settings), type(settings)()
    if not greedy.do_sample:
        for name in _OF_SAMPLING:
            setattr(greedy, name, getattr(usual, name, None))
    if (error := _error(greedy)) is not None:
        raise ConfigError(
            f"the model's generation settings cannot be saved: {error} Set them right (model.generation_config), or "
            "remove generation_config.json"
        )
    return greedy


def _error(settings: Any) -> str | None:
    try:
        settings.validate(strict=True)
    except ValueError as error:
        return " ".join(str(error).split())
    return None
