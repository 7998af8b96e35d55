"""Whether a checkpoint is the model that will be loaded from it: every tensor of the model is there, in its shape.

Some libraries split or join layers before they quantize them (a fused gate and up projection, say). Their codes can be
read one by one, and the folder could still not be loaded. What a file lacks, transformers would fill with random
numbers.
"""

import copy
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from qbl_trl.errors import CheckpointError
from qbl_trl.older_names import restore_settings_
from qbl_trl.quant.renaming import makes, names_in_model
from qbl_trl.quant.stacks import stacked_tensors, unstack_

logger = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]
_SHOWN = 8
_STRANGERS = "the two do not belong together"


def check_places(source: Path, config: dict[str, Any], packed: Shapes, others: Shapes) -> None:
    """Compare names and shapes with those of the model that config.json describes, without a weight in memory.

    Tensors that the model never asks for may be there (transformers ignores them). Those that transformers fills by
    itself may be missing: tied weights, what it converts from other tensors of the checkpoint, what the class says
    need not be stored. Experts that the running version of transformers holds in one tensor are left to the loader,
    which says so.

    Args:
        packed: shapes of the weights, (N, K), and biases that the quantized layers stand for.
        others: shapes of the remaining tensors.

    Raises:
        CheckpointError: if a quantized layer is none of the model's while one of the model's has no weight, or a part
            of an expert is none of the model's; if a tensor has another shape than the model's; if one of the model's
            is missing; if no class is named and none goes by the model_type.
    """
    model = _empty_model(source, config)
    if model is None:
        logger.info("%s: config.json names no model of transformers; tensors are not compared with it", source)
        return
    stored = {**packed, **others}
    places = names_in_model(model, stored)
    model.tie_weights()
    state, kind = model.state_dict(keep_vars=True), type(model).__name__
    if not config.get("architectures"):
        kind += " (what its model_type is opened as)"
    linear = _linear_layers(model)
    homeless = [name for name in packed if name.endswith(".weight") and places.get(name) not in state]
    split = [name.removesuffix(".weight") for name in homeless if ".experts." not in name]
    empty = [name for name in linear if f"{name}.weight" not in places.values() and ".experts." not in name]
    if split and empty:
        raise CheckpointError(
            f"{source}: {split[0]} is no layer of {kind}, and its {empty[0]} has no weight: layers were split or "
            "joined before they were quantized, so the converted folder could not be loaded. Quantize the model with a "
            "library that keeps its layers, or here"
        )
    stacked = [".experts", *stacked_tensors(model)] if any(".experts." in name for name in homeless) else []
    made = _converted(model, places.values()) + stacked
    compared = {name: tensor for name, tensor in state.items() if not any(makes(target, name) for target in made)}
    shapes = {name: tuple(tensor.shape) for name, tensor in compared.items()}
    turned = {f"{name}.weight" for name, layer in linear.items() if isinstance(layer, Conv1D)}
    wrong = [
        (name, shape, expected)
        for name, shape in stored.items()
        if (place := places.get(name)) in shapes
        and shape != (expected := shapes[place][:: -1 if name in packed and place in turned else 1])
    ]
    if wrong:
        moved = all(len(shape) > 2 and sorted(shape) == sorted(expected) for _, shape, expected in wrong)
        why = "the order of axes is another, which is not read (MLX stores convolutions so)" if moved else _STRANGERS
        listed = _listed([f"{name} is {shape}, not {expected}" for name, shape, expected in wrong], "; ")
        raise CheckpointError(f"{source}: {listed}, as {kind} with this config.json has it; {why}")
    unasked = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    filled = {id(state[place]) for place in places.values() if place in state}  # tied weights are one tensor
    missing = [
        name
        for name, tensor in compared.items()
        if id(tensor) not in filled and not any(pattern.search(name) for pattern in unasked)
    ]
    if missing:
        raise CheckpointError(
            f"{source}: no tensor for {_listed(missing, ', ')}, which {kind} with this config.json has; the "
            "checkpoint is incomplete"
        )
    lost, biases = _parts_of_experts(model, packed, others)
    if lost and not any(".experts.0." in name for name in model.state_dict()):
        raise CheckpointError(
            f"{source}: the experts of a {kind} are not separated here, and {lost[0]} is packed by itself"
        )
    if lost:
        raise CheckpointError(
            f"{source}: {lost[0]} is no part of an expert of {kind}: experts were split or joined before they were "
            "quantized, so the converted folder could not be loaded. Quantize the model here"
        )
    if biases:
        raise CheckpointError(f"{source}: no tensor for {_listed(biases, ', ')}; the checkpoint is incomplete")


def _empty_model(source: Path, config: dict[str, Any]) -> PreTrainedModel | None:
    """The model of a config.json on no device; None where its class is not part of transformers."""
    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING or "auto_map" in config:
        return None
    named = (config.get("architectures") or [None])[0] or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if named is None:
        raise CheckpointError(
            f"{source}: config.json names no architectures, and a {model_type} is no causal language model; add the "
            'class that it was saved from, as "architectures": ["..."]'
        )
    kind = getattr(transformers, named, None)
    if kind is None:
        return None
    settings = CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(config))
    restore_settings_(settings)
    with init_empty_weights():
        return kind(settings)  # type: ignore[no-any-return]


def _parts_of_experts(model: PreTrainedModel, packed: Shapes, others: Shapes) -> tuple[list[str], list[str]]:
    """Packed parts of experts that are none of the model's, and biases of its experts that are not there.

    The model's experts are separated for it.
    """
    if not any(".experts." in name for name in packed):
        return [], []
    unstack_(model)
    around, state, places = dict(model.named_modules()), model.state_dict(), names_in_model(model, [*packed, *others])
    lost = [
        name
        for name in packed
        if ".experts." in places[name]
        and f"{places[name].partition('.experts.')[0]}.experts" in around
        and places[name] not in state
    ]
    filled = set(places.values())
    biases = [name for name in state if name.endswith("_bias") and ".experts." in name and name not in filled]
    return lost, biases


def _linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    head = model.get_output_embeddings()
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head}


def _converted(model: Any, names: Iterable[str]) -> list[str]:
    """What transformers 5 makes of these tensors by joining or splitting them, as patterns of names."""
    if hasattr(model, "_get_key_renaming_mapping"):  # transformers 4
        return []
    from transformers.conversion_mapping import get_model_conversion_mapping

    steps = [step for step in get_model_conversion_mapping(model) if hasattr(step, "operations")]
    used = [step for step in steps if any(step.rename_source_key(name)[1] is not None for name in names)]
    return [target for step in used for target in step.target_patterns]


def _listed(names: list[str], between: str) -> str:
    more = len(names) - _SHOWN
    return between.join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
