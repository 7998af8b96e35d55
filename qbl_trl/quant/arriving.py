"""The weights of a float model as they arrive from its files, to be quantized one by one."""

from torch import Tensor, nn

from qbl_trl.errors import CheckpointError
from qbl_trl.generation import BEFORE_5


def nothing_loaded_(model: nn.Module) -> None:
    """Before loading: no weight counts as loaded, not even where modules of experts were put in and out."""
    for parameter in model.parameters():
        vars(parameter).pop("_is_hf_initialized", None)


def check_arrived(model: nn.Module, name: str, weight: Tensor) -> None:
    """Refuse a weight of another shape than the model's.

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
