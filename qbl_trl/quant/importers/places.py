"""Whether the layers of a checkpoint have a place in the model that will load them.

Some libraries split or join layers before they quantize them (a fused gate and up projection, say). Their codes can be
read one by one, and the folder could still not be loaded.
"""

import copy
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from qbl_trl.errors import CheckpointError
from qbl_trl.quant.renaming import names_in_model

logger = logging.getLogger(__name__)


def check_places(source: Path, config: dict[str, Any], packed: Iterable[str], others: Iterable[str]) -> None:
    """Compare names with those of the model that config.json describes, without a weight in memory.

    Layers that the model never asks for may be there (transformers ignores them); experts that the running version
    of transformers holds in one tensor are left to the loader, which says so.

    Args:
        packed: names of quantized layers.
        others: names of the remaining tensors.

    Raises:
        CheckpointError: if a quantized layer is none of the model's while one of the model's has no weight.
    """
    model = _empty_model(config)
    if model is None:
        logger.info("%s: config.json names no model of transformers; names of layers are not compared with it", source)
        return
    weights = [f"{name}.weight" for name in packed if ".experts." not in name]
    places = names_in_model(model, [*weights, *others])
    state, head = model.state_dict(), model.get_output_embeddings()
    homeless = [name for name in weights if places[name] not in state]
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    empty = [name for name in linear if f"{name}.weight" not in places.values() and ".experts." not in name]
    if homeless and empty:
        raise CheckpointError(
            f"{source}: {homeless[0].removesuffix('.weight')} is no layer of {type(model).__name__}, and its "
            f"{empty[0]} has no weight: layers were split or joined before they were quantized, so the converted "
            "folder could not be loaded. Quantize the model with a library that keeps its layers, or here"
        )


def _empty_model(config: dict[str, Any]) -> PreTrainedModel | None:
    """The model of a config.json on no device; None where its class is not part of transformers."""
    kinds, model_type = config.get("architectures") or [""], config.get("model_type")
    kind = getattr(transformers, kinds[0], None) if kinds[0] else None
    if kind is None or model_type not in CONFIG_MAPPING or "auto_map" in config:
        return None
    settings = CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(config))
    with init_empty_weights():
        return kind(settings)  # type: ignore[no-any-return]
