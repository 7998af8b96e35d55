"""The tokenizer beside a model: opened, and written so that transformers 4.57 and 5 both open it.

transformers 5 writes the name of a class that 4.57 does not know. What it holds is the same file, `tokenizer.json`, and
the older name is known to both.
"""

import json
import shutil
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

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
    file = Path(source, _CONFIG)
    newer = file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("tokenizer_class") == _NEWER
    return (PreTrainedTokenizerFast if newer else AutoTokenizer).from_pretrained(source)


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
    file = folder / _CONFIG
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if settings.get("tokenizer_class") == _NEWER:
        file.write_text(json.dumps({**settings, "tokenizer_class": _KNOWN}, indent=2) + "\n", encoding="utf-8")


__all__ = ["open_tokenizer", "save_tokenizer"]
