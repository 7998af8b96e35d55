"""Names of tensors in a checkpoint and in the model that loads it.

They differ where transformers renames while it loads (vision-language models) and where a base model is loaded from
the checkpoint of a model with a head, or the other way round.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel, modeling_utils

from qbl_trl.module_names import name_here
from qbl_trl.quant.experts import Experts
from qbl_trl.quant.packed import BESIDE_CODES, PackedWeight


def names_in_model(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """The name in the model of every stored tensor, by its name in the files; scales go where codes go."""
    names = list(stored)
    old = hasattr(model, "_get_key_renaming_mapping")  # transformers 4
    found = _by_class_mapping(model, names) if old else _by_conversions(model, names)
    for name in names:
        layer, _, part = name.rpartition(".")
        if part in BESIDE_CODES and f"{layer}.weight" in found:
            found[name] = f"{found[f'{layer}.weight'].removesuffix('.weight')}.{part}"
    return found


def layers_in_model(model: PreTrainedModel, layers: Mapping[str, Any], stored: Iterable[str]) -> dict[str, Any]:
    """Settings of single layers by their names in the model, where another version or another head stored them."""
    modules = dict(model.named_modules())
    here = {name: name_here(name, modules) for name in layers}
    lost = [name for name, found in here.items() if found not in modules]
    if lost:
        moved = names_in_model(model, {*stored, *(f"{name}.weight" for name in lost)})
        # 4.57 names nothing of a head that this model lacks
        here |= {name: moved.get(f"{name}.weight", name).removesuffix(".weight") for name in lost}
    return {here[name]: settings for name, settings in layers.items()}


def _by_class_mapping(model: Any, names: list[str]) -> dict[str, str]:
    kind = type(model).__name__.lower()
    known = any(name in kind for name in getattr(modeling_utils, "VLMS", ()))
    prefix = model.base_model_prefix
    has_prefix = bool(prefix) and any(name.startswith(prefix) for name in names)
    expects_prefix = bool(prefix) and hasattr(model, prefix)
    mapping: dict[str, str] = model._get_key_renaming_mapping(
        names,
        model._checkpoint_conversion_mapping if known else None,
        loading_base_model_from_task_state_dict=has_prefix and not expects_prefix,
        loading_task_model_from_base_state_dict=not has_prefix and expects_prefix,
    )
    return mapping


def _by_conversions(model: Any, names: list[str]) -> dict[str, str]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    # Conversions that join or split tensors concern float experts; packed layers are only renamed.
    renamings = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
    own = {name.replace(".base_layer.", "."): tensor for name, tensor in model.state_dict().items()}
    prefix = model.base_model_prefix
    found = {}
    for name in names:
        renamed, _ = rename_source_key(name, renamings, [], prefix, own)
        if renamed not in own and name in own:
            renamed, _ = rename_source_key(name, [], [], prefix, own)
        found[name] = renamed
    return found


def without_packed(conversions: list[Any], model: nn.Module) -> list[Any]:
    """Conversions of transformers 5, but for those that join or split weights that are packed in this model.

    Float weights that the files hold as one (q, k and v, say) are split while they are loaded, and stacked where they
    are those of experts; what is packed is stored under the names that it has in the model.
    """
    layers = [name for name, module in model.named_modules() if isinstance(module, PackedWeight)]
    packed = [f"{name}.{part}" for name in layers for part in ("weight", "bias")]  # joined and split by steps apart
    packed += [f"{path}.{name}" for path, m in model.named_modules() if isinstance(m, Experts) for name in m.parts]
    return [
        step
        for step in conversions
        if not hasattr(step, "operations")
        or not any(makes(target, name) for target in step.target_patterns for name in packed)
    ]


def keep_packed_names_(model: Any) -> None:
    """Save the packed layers of a model under their own names (transformers 5 would join them again)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    used = getattr(model, "_weight_conversions", None)
    if used is None:  # as transformers chooses them for a model that it did not load
        known = get_model_conversion_mapping(model, add_legacy=False)
        used = [step for step in known if not isinstance(step, PrefixChange)]
    model._weight_conversions = without_packed(used, model)


def forget_adapter_names_(model: Any) -> None:
    """Remove the renamings of keys that transformers 5 leaves after `load_adapter`, so that `save_pretrained` reverses
    the model's own ones again."""
    used = getattr(model, "_weight_conversions", None) or ()
    if any("base_model" in pattern for step in used for pattern in step.source_patterns):
        del model._weight_conversions
        if any(isinstance(module, PackedWeight) for module in model.modules()):
            keep_packed_names_(model)


def makes(target: str, name: str) -> bool:
    """Whether a conversion to this target makes the tensor of this name."""
    return re.search(re.escape(target.replace("\\", "")) + r"(?!\w)", name) is not None
