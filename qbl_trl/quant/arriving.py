"""The weights of a float model as they arrive from its files, to be quantized one by one."""

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor, nn

from qbl_trl.errors import CheckpointError
from qbl_trl.generation import BEFORE_5
from qbl_trl.quant.linear import GroupQuantLinear


def nothing_loaded_(model: nn.Module) -> None:
    """Before loading: no weight counts as loaded, not even where modules of experts were put in and out."""
    for parameter in model.parameters():
        vars(parameter).pop("_is_hf_initialized", None)


def float8_in(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of eight bits, by name: torch computes nothing with them."""
    return {name: p for name, p in model.named_parameters() if p.is_floating_point() and p.element_size() == 1}


def widen_(model: nn.Module, dtype: torch.dtype) -> None:
    """Give float8 weights the type of the model they were loaded into, as transformers 5 does while it loads."""
    for parameter in float8_in(model).values():
        parameter.data = parameter.data.to(dtype)


def arrived(model: nn.Module, name: str, weight: Tensor) -> Tensor:
    """A weight to quantize, in the type of the model where files have it in float8; of another shape it is refused.

    Told to ignore such weights, transformers 5 hands them over all the same, and 4.57 memory in the model's shape that
    nothing was loaded into: before the first weight is loaded, it has marked those that will be.

    Raises:
        CheckpointError: naming the layer.
    """
    wanted = model.get_parameter(name)
    unknown = BEFORE_5 and not getattr(wanted, "_is_hf_initialized", False)
    if unknown or weight.shape != wanted.shape:
        raise CheckpointError(
            f"{name.removesuffix('.weight')}: the file holds a weight of "
            f"{'another shape' if unknown else tuple(weight.shape)}, and config.json describes one of "
            f"{tuple(wanted.shape)}; a layer that is quantized while it loads cannot be drawn anew instead. To have it "
            "drawn (ignore_mismatched_sizes), keep it in float with modules_to_not_convert"
        )
    return weight.to(wanted.dtype) if weight.element_size() == 1 else weight


def not_arrived(
    model: nn.Module, targets: Collection[str], calibrated: bool, missing: Collection[str] | None
) -> set[str]:
    """Layers to quantize whose weight the files do not hold.

    Args:
        targets: their names; experts that are set apart after loading are no modules yet, and are passed over.
        calibrated: they are quantized once all is loaded, and not as they arrive.
        missing: names that were not in the files, where transformers says so (4.57); 5 marks those that were.
    """
    modules = dict(model.named_modules())
    if not calibrated:
        return {name for name in targets if not isinstance(modules.get(name), GroupQuantLinear)}
    weights = {name: modules[name].weight for name in targets if name in modules}
    if missing is not None:
        lost = {name for name in weights if f"{name}.weight" in missing}
    else:
        lost = {name for name, weight in weights.items() if not getattr(weight, "_is_hf_initialized", False)}
    return set(targets) if weights and len(lost) == len(weights) else lost  # nor did the experts arrive then


def nothing_arrived(
    model: nn.Module, targets: Collection[str], folder: Path | None, found: Collection[str]
) -> CheckpointError:
    """Why a checkpoint that has none of the layers to quantize is no checkpoint of this model."""
    wanted, known = f"{min(targets)}.weight", model.state_dict()
    kind = ".".join(wanted.split(".")[-2:])
    other = next((name for name in found if name.endswith(kind) and name not in known), None)
    return CheckpointError(
        f"{folder or 'the checkpoint'}: none of the {len(targets)} layers to quantize was loaded, such as {wanted}"
        + (
            f"; the files hold other names, such as {other}. Load the class that wrote them, or take off a prefix "
            "(`module.` of a distributed run)"
            if other
            else ""
        )
    )
