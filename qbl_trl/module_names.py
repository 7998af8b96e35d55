"""Names of modules in adapters and in settings of single layers: as the transformers that wrote them had them.

Some of mixtures, of towers that see and of models that hear have another name in transformers 5.
"""

import re
from collections.abc import Container
from typing import Any

_MOVED = (  # 4.57 and 5
    (".block_sparse_moe.", ".mlp."),  # Mixtral, PhiMoE, MiniMax
    ("vision_tower.vision_model.", "vision_tower."),  # LLaVA, Gemma 3, PaliGemma, ...
    ("audio_tower.", "model.audio_tower."),  # Qwen2-Audio, Voxtral
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head", "lm_head"),
)


def name_here(name: str, modules: Container[str]) -> str:
    """The name of a module in this model, where another version of transformers told it (itself if unknown)."""
    if name in modules:
        return name
    moved = (name.replace(*pair) for before, now in _MOVED for pair in ((before, now), (now, before)))
    return next((other for other in moved if other in modules), name)


def pattern_here(pattern: dict[str, Any], modules: Container[str]) -> dict[str, Any]:
    """Settings of single layers by their names in this model; regular expressions of another kind are left alone."""
    found = {}
    for key, value in pattern.items():
        name = re.sub(r"\\(.)", r"\1", key.removeprefix("^"))  # as they are written down when an adapter is placed
        here = name_here(name, modules)
        found[key if here == name else f"^{re.escape(here)}"] = value
    return found
