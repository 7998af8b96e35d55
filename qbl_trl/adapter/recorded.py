"""What an adapter was trained over: written into its configuration, and compared where it is placed again."""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import nn

from qbl_trl.config import QUANT_METHOD, QBLoRAConfig, holds_merged
from qbl_trl.errors import ConfigError
from qbl_trl.module_names import pattern_here
from qbl_trl.quant.packed import PackedWeight

_KEPT = "modules_to_not_convert"
_DTYPE = "weights_dtype"  # of weights that were quantized as they were loaded; files hold codes, and do not say
_SAME = {  # what makes the same base of the same float model, by quantization method
    QUANT_METHOD: ("bits", "group_size", "symmetric", "algorithm", "scale_dtype", "quantize_embeddings", _KEPT, _DTYPE),
    "bitsandbytes": ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "llm_int8_skip_modules"),
    "hqq": ("quant_config", "skip_modules"),
}
_MERGED = "merged_adapter"
_OF_THE_ADAPTER = ("use_rslora", "adapter", "pooling", "in_factor", "out_factor", "bias", "fan_in_fan_out")


def quantization(model: nn.Module) -> Any:
    """The configuration a model was quantized by, of whatever library; None for a float one."""
    return getattr(getattr(model, "config", None), "quantization_config", None)


def _recordable(stored: Any, model: nn.Module | None = None) -> dict[str, Any] | None:
    """The configuration of a base that can be made again from its float checkpoint, as a dictionary.

    Args:
        model: the base; of one of bitsandbytes it is known which type it was loaded in, not how precise its weights
            were: another type need not be another base, so it is recorded and not compared.
    """
    method = getattr(stored, "quant_method", None)
    name = str(getattr(method, "value", method))
    if name not in _SAME:
        return None
    precise = getattr(stored, "noted_dtype", None)
    if name == "bitsandbytes" and model is not None:
        loaded = next(filter(None, map(_loaded_in, model.parameters())), getattr(model.config, "dtype", None))
        precise = None if loaded is None else str(loaded).removeprefix("torch.")
    found = {key: value for key, value in stored.to_dict().items() if key[0] != "_"} | {"quant_method": name}
    return found | ({} if precise is None else {_DTYPE: precise})


def _loaded_in(weight: Any) -> torch.dtype | None:
    """The type that codes of bitsandbytes were made from, as 4-bit ones and `loading` note it."""
    state = getattr(weight, "quant_state", None)
    return getattr(weight if state is None else state, "made_from", getattr(state, "dtype", None))


def record_base_(config: QBLoRAConfig, model: nn.Module) -> None:
    """Write down what the adapter is placed over; one that was trained over anything else computes something else.

    Raises:
        ConfigError: if this very configuration, not one like it from a file, was completed for another base.
    """
    here = _recordable(quantization(model), model)
    if config.base_quantization is None and (here is None or not config.completed):
        config.base_quantization, config.completed = here, True
        return
    other, first, second = _differences(config.base_quantization, here)
    if config.completed and {*other} <= {_MERGED, _DTYPE}:
        # A round of adapters more, over what the last one was merged into; or files of another precision.
        config.base_quantization = here
        return
    if not other:
        return
    if config.completed:
        raise ConfigError(
            f"this QBLoRAConfig was completed for a base with {first} when it was first placed, and this one has "
            f"{second}; make a QBLoRAConfig for each base"
        )
    warnings.warn(
        f"the adapter was trained over a base with {first}, and this one has {second}: its outputs will differ from "
        "what was trained. Load the base as config.base_quantization says",
        stacklevel=2,
    )


def check_same_base(saved: QBLoRAConfig, stored: Any, where: Any) -> None:
    """Refuse another base than a saved adapter records.

    Raises:
        ConfigError: naming what differs.
    """
    other, first, second = _differences(saved.base_quantization, _recordable(stored))
    if other:
        raise ConfigError(
            f"{where} was trained over a base with {first}, and this one has {second}: load the base as its "
            "adapter_config.json says (base_quantization), or train anew"
        )


def check_same_adapter(saved: QBLoRAConfig, present: QBLoRAConfig, layers: Iterable[str], where: Any) -> None:
    """Refuse to go on with a saved adapter under settings by which its tensors mean something else, or are others.

    Args:
        layers: names of those with the adapter.

    Raises:
        ConfigError: naming the settings, with what each of the two has.
    """
    names = sorted(layers)
    told, here = (_told(config, names) for config in (saved, present))
    changed = [name for name in told if told[name] != here[name]]
    if changed:
        both = [_said(name, told[name], here[name]) for name in changed]
        then, now = (", ".join(said[side] for said in both) for side in (0, 1))
        raise ConfigError(
            f"{where} was trained with {then}, and this run has {now}: its adapter cannot go on so. Set them as they "
            "were, or train anew"
        )


def _told(config: QBLoRAConfig, layers: list[str]) -> dict[str, Any]:
    """What decides which tensors an adapter has and what they compute, however it is spelled."""
    told = {name: getattr(config, name) for name in _OF_THE_ADAPTER}
    for name, common, pattern in (
        ("r", config.r, config.rank_pattern),
        ("lora_alpha", config.lora_alpha, config.alpha_pattern),
    ):
        here = pattern_here(pattern, layers)
        told[name] = {layer: here.get(get_pattern_key(here.keys(), layer), common) for layer in layers}
    rows = config.trainable_token_indices
    told["trainable_token_indices"] = list(rows.values()) if isinstance(rows, dict) else [rows] * bool(rows)
    told["modules_to_save"] = sorted({*(config.modules_to_save or ())})
    return told


def _said(name: str, *both: Any) -> list[str]:
    """A setting that differs, as each of the two has it: of single layers, in the first that differs."""
    if not isinstance(both[0], dict):
        return [f"{name}={value!r}" for value in both]
    layer = next(layer for layer in both[0] if both[0][layer] != both[1][layer])
    return [f"{name}={values[layer]!r} ({layer})" for values in both]


def record_layers_(config: QBLoRAConfig, model: nn.Module) -> None:
    """Write down how many layers are in groups; where a file says another number, the base is another one."""
    count = sum(isinstance(layer, PackedWeight) for layer in model.modules())
    told = config.quantized_layers
    if told is None or config.completed:
        config.quantized_layers = count
    elif told != count:
        warnings.warn(
            f"the adapter was trained over a base with {told} quantized layers, and this one has {count}: its outputs "
            "will differ from what was trained. Of some mixtures, transformers 5 has quantized experts and 4.57 has "
            "not; load it with the one that it was trained with",
            stacklevel=2,
        )


def _differences(recorded: dict[str, Any] | None, here: dict[str, Any] | None) -> tuple[list[str], str, str]:
    """The settings in which a base is not the recorded one, and what each of the two has there."""
    told, held = (_identity(base or {"quant_method": None}) for base in (recorded, here))
    if _DTYPE not in held:
        told.pop(_DTYPE, None)
    other = [name for name in told if name not in held or told[name] != held[name]]
    return other, _described(told, other), _described(held, other)


def _identity(recorded: dict[str, Any]) -> dict[str, Any]:
    """What a recorded base is compared by, as far as it says."""
    method = recorded.get("quant_method", QUANT_METHOD)
    found = {"quant_method": method} | {name: recorded[name] for name in _SAME.get(method, ()) if name in recorded}
    if _KEPT in found:
        always = () if recorded.get("quantize_embeddings") else ("lm_head",)  # in float, named or not
        found[_KEPT] = sorted(set(found[_KEPT] or ()).difference(always))  # none or an empty list, in whatever order
    return found | ({_MERGED: holds_merged(recorded)} if method == QUANT_METHOD else {})


def _described(base: dict[str, Any], other: list[str]) -> str:
    """The settings of a base that another one does not have: all of them where the methods differ."""
    shown = [name for name in base if name != "quant_method" and (name in other or "quant_method" in other)]
    return " ".join(
        [base["quant_method"] or "none", *(f"{name}={base[name]}" for name in shown if base["quant_method"])]
    )
