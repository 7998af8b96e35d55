"""Settings of a configuration that transformers 5 wrote, for a transformers 4.57 that reads it.

transformers 5 keeps those of rotary embeddings in one dictionary, `rope_parameters`, or in one for each kind of layer.
4.57 does not look there: it takes its defaults, and the model that it loads computes something else without a word.

| transformers 5 | transformers 4.57 |
| --- | --- |
| rope_theta | rope_theta (GPT-NeoX: rotary_emb_base) |
| rope_type and its settings | rope_scaling; None for "default" without any |
| partial_rotary_factor | partial_rotary_factor (GPT-NeoX: rotary_pct) |
| original_max_position_embeddings of longrope | the same, beside rope_scaling |
| those of sliding layers, where they differ | rope_local_base_freq (Gemma 3) |
| num_local_experts | num_experts (Qwen3-MoE) |

What somebody has set since under the older names is left as it is.
"""

from collections.abc import Iterator
from typing import Any

import transformers

from qbl_trl.generation import BEFORE_5

_OUTSIDE = ("rope_theta", "partial_rotary_factor")
_LENGTH = "original_max_position_embeddings"
_NEWER = ("rope_parameters", "num_local_experts")


def restore_settings_(config: Any) -> bool:
    """Give a configuration the settings under the names this transformers reads, in place; whether any was another."""
    if not BEFORE_5:
        return False
    changed = [_restore_(part, defaults) for part, defaults in _parts(config, _defaults(config))]
    return any(changed)


def _defaults(config: Any) -> Any:
    try:
        return type(config)()
    except (TypeError, ValueError):  # a class without defaults has none that nobody chose
        return config


def _parts(config: Any, defaults: Any) -> Iterator[tuple[Any, Any]]:
    """The configuration and those inside it (of text, of images, of an encoder), with what each has by default.

    Around another configuration a part may have other defaults than alone: the text model of Voxtral, say.
    """
    yield config, defaults
    for name, part in list(vars(config).items()):
        if isinstance(part, transformers.PretrainedConfig):
            inside = vars(defaults).get(name)
            yield from _parts(part, inside if type(inside) is type(part) else _defaults(part))


def _restore_(config: Any, defaults: Any) -> bool:
    if vars(config).keys().isdisjoint(_NEWER):
        return False
    alone = _defaults(config)
    other = {
        name: value
        for name, value in (_rope(config, defaults) | _experts(config, defaults)).items()
        if getattr(config, name, None) in (getattr(defaults, name, None), getattr(alone, name, None))
        and getattr(config, name, None) != value
    }
    for name, value in other.items():
        setattr(config, name, value)
    return bool(other)


def _experts(config: Any, defaults: Any) -> dict[str, Any]:
    if not hasattr(defaults, "num_experts") or hasattr(defaults, "num_local_experts"):
        return {}
    stored = vars(config).pop("num_local_experts", None)
    return {} if stored is None else {"num_experts": stored}


def _rope(config: Any, defaults: Any) -> dict[str, Any]:
    stored = vars(config).pop("rope_parameters", None)  # what is saved from here has the older names alone
    if not isinstance(stored, dict) or not stored:
        return {}
    kinds = {name: kind for name, kind in stored.items() if isinstance(kind, dict)}
    whole = kinds.get("full_attention") or next(iter(kinds.values()), stored)
    longrope = whole.get("rope_type") == "longrope"
    outside = (*_OUTSIDE, *(_known(defaults, _LENGTH) if longrope else ()))
    scaling = {name: value for name, value in whole.items() if name not in outside}
    if longrope:
        scaling["type"] = scaling.pop("rope_type")  # the only spelling that Phi-3's configuration takes
    named = {"rope_scaling": None if scaling in ({}, {"rope_type": "default"}) else scaling}
    if "rope_theta" in whole:
        named |= dict.fromkeys(("rope_theta", *_known(config, "rotary_emb_base")), whole["rope_theta"])
    if "partial_rotary_factor" in whole:
        names = _known(config, "partial_rotary_factor", "rotary_pct")
        named |= dict.fromkeys(names, whole["partial_rotary_factor"])
    if _LENGTH in whole and longrope:
        named[_LENGTH] = whole[_LENGTH]
    if "rope_theta" in kinds.get("sliding_attention", {}):
        named |= dict.fromkeys(_known(config, "rope_local_base_freq"), kinds["sliding_attention"]["rope_theta"])
    return named


def _known(config: Any, *names: str) -> tuple[str, ...]:
    return tuple(name for name in names if hasattr(config, name))
