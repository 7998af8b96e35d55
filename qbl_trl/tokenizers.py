"""The tokenizer beside a model: opened, and written so that transformers 4.57 and 5 both open it.

transformers 5 writes the name of a class that 4.57 does not know, and special tokens under another name. What they
stand for is the same file, `tokenizer.json`, and the older names are known to both.
"""

import json
import shutil
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qbl_trl.generation import BEFORE_5

_NEWER, _KNOWN = "TokenizersBackend", "PreTrainedTokenizerFast"
_CONFIG = "tokenizer_config.json"
_FILES = (
    *("tokenizer.json", _CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.json"),
)


def open_tokenizer(source: str | PathLike[str]) -> Any:
    """The tokenizer of a folder or a model id.

    Raises:
        ValueError, OSError: as `AutoTokenizer` does, if there is none.
    """
    stored = _settings(Path(source, _CONFIG))
    settings = _known_to_both(stored)
    changed = {name: value for name, value in settings.items() if stored.get(name) != value} if BEFORE_5 else {}
    newer = changed.pop("tokenizer_class", None)
    return (PreTrainedTokenizerFast if newer else AutoTokenizer).from_pretrained(source, **changed)


def save_tokenizer(source: Any, folder: Path) -> None:
    """Write a tokenizer, or what belongs to one in a folder, beside a model.

    Args:
        source: a tokenizer or processor, a folder whose files (there may be none) are copied, or a model id.
        folder: where to.
    """
    if hasattr(source, "save_pretrained"):
        source.save_pretrained(folder)
    elif Path(source).is_dir():
        for name in _FILES:
            if Path(source, name).is_file():
                shutil.copyfile(Path(source, name), folder / name)
    else:
        open_tokenizer(source).save_pretrained(folder)
    stored = _settings(folder / _CONFIG)
    settings = _known_to_both(stored)
    if settings != stored:
        (folder / _CONFIG).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _settings(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def _known_to_both(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a tokenizer, in the words that both generations know."""
    known = dict(settings)
    if known.get("tokenizer_class") == _NEWER:
        known["tokenizer_class"] = _KNOWN
    if isinstance(known.get("extra_special_tokens"), list):  # a dictionary of named ones in 4.57
        known["additional_special_tokens"] = known.pop("extra_special_tokens")
        known["extra_special_tokens"] = {}
    return known


__all__ = ["open_tokenizer", "save_tokenizer"]
