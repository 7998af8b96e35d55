"""Other PEFT methods over packed layers: those that call their base train there (LoRA, IA3), and no merge is done.

A GroupQuantLinear is an nn.Linear, so PEFT places its own layers on it. Merging, they would add floats to the bytes
that its codes are packed in.
"""

from typing import Any

from peft.tuners.mixed import MixedModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from qbl_trl.adapter.layer import BalancedLinear
from qbl_trl.errors import MergeError
from qbl_trl.quant.packed import PackedWeight


def register() -> None:
    """Have PEFT ask before it merges (once): its one check, and its mixed model, which has none."""
    tuner: Any = BaseTuner
    mixed: Any = MixedModel
    check, unload = tuner._check_merge_allowed, mixed._unload_and_optionally_merge

    def check_merge_allowed(self: Any) -> None:
        check(self)
        refuse_merge(self.model)

    def unload_and_optionally_merge(self: Any, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            refuse_merge(self.model)
        return unload(self, merge, *args, **kwargs)

    tuner._check_merge_allowed = check_merge_allowed
    mixed._unload_and_optionally_merge = unload_and_optionally_merge


def refuse_merge(model: nn.Module) -> None:
    """Refuse to merge an adapter of another method into packed codes, before anything is merged.

    Raises:
        MergeError: naming the first layer.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer) or isinstance(layer, BalancedLinear):
            continue
        if isinstance(layer.get_base_layer(), PackedWeight):
            method = type(layer).__module__.removeprefix("peft.tuners.").partition(".")[0]
            raise MergeError(
                f"{name}: a {method} {type(layer).__name__} does not merge into packed codes. Train "
                "QBLoRAConfig(quantization_aware=True), which merges exactly, or QBLoRAConfig(in_factor=1, "
                "out_factor=1), which is LoRA: it exports with its low-rank branch, and merge(model, "
                'lossy="requantize") takes it'
            )
