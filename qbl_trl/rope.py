"""Rotary settings of a configuration that transformers 5 wrote, for a transformers 4.57 that reads it.

transformers 5 keeps them in one dictionary, `rope_parameters`, or in one for each kind of layer. 4.57 does not look
there: it takes its defaults, and the model that it loads computes something else without a word.

| transformers 5 | transformers 4.57 |
| --- | --- |
| rope_theta | rope_theta (GPT-NeoX: rotary_emb_base) |
| rope_type and its settings | rope_scaling; None for "default" |
| partial_rotary_factor | partial_rotary_factor (GPT-NeoX: rotary_pct) |
| those of sliding layers, where they differ | rope_local_base_freq (Gemma 3) |
"""

from typing import Any

import transformers

_NAMES = {
    "rope_theta": ("rope_theta", "rotary_emb_base"),
    "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct"),
    "original_max_position_embeddings": ("original_max_position_embeddings",),
}


def restore_rope_(config: Any) -> bool:
    """Give a configuration the settings under the names this transformers reads, in place; whether any was another."""
    if int(transformers.__version__.split(".")[0]) >= 5:
        return False
    parts = {id(part): part for part in (config, config.get_text_config())}.values()
    changed = [_restore_(part) for part in parts]
    return any(changed)


def _restore_(config: Any) -> bool:
    stored = getattr(config, "rope_parameters", None)
    if not isinstance(stored, dict) or not stored:
        return False
    kinds = {name: kind for name, kind in stored.items() if isinstance(kind, dict)}
    whole = kinds.get("full_attention") or next(iter(kinds.values()), stored)
    sliding = kinds.get("sliding_attention", {})
    wanted = {
        name: whole[setting]
        for setting, names in _NAMES.items()
        for name in names
        if setting in whole and (hasattr(config, name) or setting == "rope_theta" == name)
    }
    scaling = {name: value for name, value in whole.items() if name not in ("rope_theta", "partial_rotary_factor")}
    wanted["rope_scaling"] = None if whole.get("rope_type", "default") == "default" else scaling
    if hasattr(config, "rope_local_base_freq") and "rope_theta" in sliding:
        wanted["rope_local_base_freq"] = sliding["rope_theta"]
    other = {name: value for name, value in wanted.items() if getattr(config, name, None) != value}
    for name, value in other.items():
        setattr(config, name, value)
    return bool(other)


__all__ = ["restore_rope_"]
