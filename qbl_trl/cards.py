"""README.md of a folder of packed weights: how to open it, and what it holds."""

import os
import re
from pathlib import Path
from typing import Any

import transformers

_CARD = """---
library_name: transformers
tags:
- qbl_trl
{base}---

# {title}

```python
import qbl_trl  # first: transformers learns the format of the weights from it
from transformers import {kind}

model = {kind}.from_pretrained("this folder"{code})
```

Linear weights are {bits}-bit codes in affine groups of {size}, quantized by {algorithm}{merged}. Without the import
transformers does not know them{warning}.
"""
_MERGED = ", with a merged adapter in one float32 shift per block of weights"
_ID = re.compile(r"\w[\w.-]*/[\w.-]+")  # of a model on the hub
_WARNING = ": transformers 5 takes such codes of 8 bits for weights, without an error"


def write_card(model: Any, folder: str | os.PathLike[str]) -> None:
    """Describe a folder that a packed model was saved in, where it does not describe itself; no other model's.

    Args:
        model: a transformers model.
    """
    config = getattr(model, "config", None)
    settings = getattr(config, "quantization_config", None)
    stated = settings if isinstance(settings, dict) else getattr(settings, "to_dict", dict)()
    file = Path(folder, "README.md")
    if stated.get("quant_method") != "group_quant" or file.exists():
        return
    kind, code = _opens(model, getattr(config, "auto_map", None) or {})
    name = str(getattr(config, "_name_or_path", "") or type(model).__name__)
    merged = any(getattr(module, "delta", None) is not None for module in model.modules())
    of_the_hub = _ID.fullmatch(name) is not None and not Path(name).parent.exists()
    text = _CARD.format(
        base=f"base_model: {name}\n" if of_the_hub else "",
        title=f"{Path(name).name}, {stated.get('bits')} bits" + ", with a merged adapter" * merged,
        kind=kind,
        code=code,
        bits=stated.get("bits"),
        size=stated.get("group_size"),
        algorithm=f'"{stated.get("algorithm")}"',
        merged=_MERGED if merged else "",
        warning=_WARNING if stated.get("bits") == 8 else "",
    )
    file.write_text(text, encoding="utf-8")


def _opens(model: Any, auto_map: dict[str, str]) -> tuple[str, str]:
    """The class of transformers that opens a folder of this model, and what code of its own needs beside the folder."""
    own = next((auto for auto, name in auto_map.items() if name.endswith(f".{type(model).__name__}")), None)
    if own is not None:
        return own, ", trust_remote_code=True"
    kinds = (kind.__name__ for kind in type(model).__mro__ if kind.__module__.startswith("transformers."))
    return next((kind for kind in kinds if hasattr(transformers, kind)), "AutoModel"), ""
