"""Other PEFT methods over packed layers: those that call their base train there (LoRA, IA3), and no merge is done.

A GroupQuantLinear is an nn.Linear, so PEFT places its own layers on it. Merging, they would add floats to the bytes
that its codes are packed in. Methods that read the weight would take those bytes for it, at 8 bits without a word.
"""

from typing import Any

from peft.tuners.mixed import MixedModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from qbl_trl.adapter.layer import BalancedLinear
from qbl_trl.errors import ConfigError, MergeError
from qbl_trl.quant.packed import PackedWeight

# What PEFT 0.21 computes from the values of a layer's weight, or starts in its dtype ...
_READ_WEIGHTS = frozenset(
    [
        *("DELORA", "FROD", "GLORA", "HIRA", "HRA", "LN_TUNING", "OSF"),
        *("PEANUT", "PSOFT", "SHIRA", "SUPERTUNING", "TINYLORA", "UNILORA"),
    ]
)
_READ_WEIGHTS_IN_LORA = ("use_dora", "use_bdlora", "kasa_config")
_STARTS_OF_LORA = ("pissa", "corda", "olora", "mica", "loftq", "orthogonal")  # beginnings of init_lora_weights
# ... and from its shape alone, which is that of the layer where a code fills a byte.
_READ_SHAPES = frozenset({"DEFT", "LOHA", "LOKR"})


def register() -> None:
    """Have PEFT ask before it places and merges: its checks, and its mixed model, which has none for merging."""
    tuner: Any = BaseTuner
    mixed: Any = MixedModel
    place, check = tuner._check_target_module_compatiblity, tuner._check_merge_allowed
    unload = mixed._unload_and_optionally_merge

    def check_target(self: Any, peft_config: Any, model: nn.Module, target_name: str) -> None:
        place(self, peft_config, model, target_name)
        if vars(self).get("_asked_for") is not peft_config:  # PEFT asks of every target, and this looks at every layer
            refuse_placement(self, peft_config, model)
            vars(self)["_asked_for"] = peft_config

    def check_merge_allowed(self: Any) -> None:
        check(self)
        refuse_merge(self.model)

    def unload_and_optionally_merge(self: Any, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            refuse_merge(self.model)
        return unload(self, merge, *args, **kwargs)

    tuner._check_target_module_compatiblity = check_target
    tuner._check_merge_allowed = check_merge_allowed
    mixed._unload_and_optionally_merge = unload_and_optionally_merge


def refuse_placement(tuner: Any, config: Any, model: nn.Module) -> None:
    """Refuse a method that reads the weights of its layers where one of them is packed, before anything is placed.

    Raises:
        ConfigError: naming the first such layer.
    """
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    variant = next((name for name in _READ_WEIGHTS_IN_LORA if kind == "LORA" and getattr(config, name)), None)
    start = getattr(config, "init_lora_weights", None) if kind == "LORA" else None
    if str(start).lower().startswith(_STARTS_OF_LORA):
        variant = f"init_lora_weights={start!r}"
    if variant is None and kind not in _READ_WEIGHTS | _READ_SHAPES:
        return
    for name, layer in model.named_modules():
        if not isinstance(layer, PackedWeight) or (kind in _READ_SHAPES and layer.bits == 8):
            continue
        if tuner._check_target_module_exists(config, name.removesuffix(".base_layer")):
            raise ConfigError(
                f"{name}: {kind if variant is None else f'{kind} with {variant}'} reads the weight of its layer, "
                "which is packed codes here. Train QBLoRAConfig over packed layers, or LoraConfig with "
                'init_lora_weights=True or "gaussian", or keep this one in float with '
                "GroupQuantConfig(modules_to_not_convert=[...])"
            )


def holds_other_adapters(layer: nn.Module) -> bool:
    """Whether a layer holds an adapter of another PEFT method; one whose adapters were all deleted is its base."""
    other = isinstance(layer, BaseTunerLayer) and not isinstance(layer, BalancedLinear)
    return other and bool(layer._all_available_adapter_names())  # type: ignore[no-untyped-call, operator]


def refuse_merge(model: nn.Module) -> None:
    """Refuse to merge an adapter of another method into packed codes, before anything is merged.

    Raises:
        MergeError: naming the first layer.
    """
    for name, layer in model.named_modules():
        if holds_other_adapters(layer) and isinstance(layer.get_base_layer(), PackedWeight):
            method = type(layer).__module__.removeprefix("peft.tuners.").partition(".")[0]
            raise MergeError(
                f"{name}: a {method} {type(layer).__name__} does not merge into packed codes. Train "
                "QBLoRAConfig(quantization_aware=True), which merges exactly, or QBLoRAConfig(in_factor=1, "
                'out_factor=1), which is LoRA, and which merge(model, lossy="requantize") takes; export_onnx takes '
                "a plain LoRA as it is, exactly"
            )
