"""The tokenizer or processor beside a model: opened, and written so that transformers 4.57 and 5 both open it.

transformers 5 writes the name of a class that 4.57 does not know, and special tokens under another name. What they
stand for is the same file, `tokenizer.json`, and the older names are known to both. What prepares images, videos and
sound is one file in 5 and one for each kind in 4.57; both read the latter.
"""

import json
import logging
import shutil
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import cached_file

from qbl_trl.generation import BEFORE_5

logger = logging.getLogger(__name__)

_NEWER, _KNOWN = "TokenizersBackend", "PreTrainedTokenizerFast"
_CONFIG = "tokenizer_config.json"
_TOKENIZERS = (_CONFIG, "tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "tekken.json")
_FILES = (
    *_TOKENIZERS,
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "merges.txt", "chat_template.json"),
)
_PROCESSOR = "processor_config.json"
_PARTS = {  # of a processor, and the files that they have of their own; an image processor's settings come last
    "feature_extractor": "preprocessor_config.json",
    "image_processor": "preprocessor_config.json",
    "video_processor": "video_preprocessor_config.json",
}
_NAMED = ("processor_class",)  # repeated in each of these files
_PROCESSOR_FILES = (_PROCESSOR, *dict.fromkeys(_PARTS.values()))


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


def holds_tokenizer(folder: str | PathLike[str]) -> bool:
    """Whether a tokenizer lies in a folder, and not only what belongs to one."""
    return any(Path(folder, name).is_file() for name in _TOKENIZERS)


def tokenizer_source(source: str | PathLike[str], base: str | PathLike[str] | None = None) -> str | PathLike[str]:
    """Where the tokenizer of a folder or model id lies: there, or beside the base of an adapter that has none.

    Args:
        base: of the adapter, if not the one that its folder names.
    """
    if not Path(source).is_dir() or holds_tokenizer(source):
        return source
    return base or _settings(Path(source, "adapter_config.json")).get("base_model_name_or_path") or source


def save_tokenizer(source: Any, folder: Path) -> None:
    """Write a tokenizer or processor, or what belongs to one in a folder, beside a model.

    Args:
        source: a tokenizer or processor, a folder (or an adapter's over one) whose files are copied, or a model id.
        folder: where to.
    """
    if hasattr(source, "save_pretrained"):
        source.save_pretrained(folder)
    elif (base := tokenizer_source(source)) != source:  # nobody asked for it by name
        try:
            save_tokenizer(base, folder)
        except Exception as error:
            logger.warning("the folder is written without a tokenizer: that of %s does not open (%s)", base, error)
        return
    elif Path(source).is_dir():
        if not holds_tokenizer(source):
            logger.warning("the folder is written without a tokenizer: %s holds none", source)
        for name in (*_FILES, *_PROCESSOR_FILES):
            if Path(source, name).is_file():
                shutil.copyfile(Path(source, name), folder / name)
    else:
        open_tokenizer(source).save_pretrained(folder)
        for name in (*_PROCESSOR_FILES, "chat_template.json", "chat_template.jinja"):
            found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
            if found is not None:
                shutil.copyfile(found, folder / name)
    stored = _settings(folder / _CONFIG)
    settings = _known_to_both(stored)
    if settings.get("extra_special_tokens") == {}:
        del settings["extra_special_tokens"]
    if settings != stored:
        _write(folder / _CONFIG, settings)
    _set_parts_apart(folder)


def _settings(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def _write(file: Path, settings: dict[str, Any]) -> None:
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _set_parts_apart(folder: Path) -> None:
    """Give the parts of a processor files of their own."""
    stored = _settings(folder / _PROCESSOR)
    whole = {name: value for name, value in stored.items() if name not in _PARTS or not isinstance(value, dict)}
    if whole == stored:
        return
    files: dict[str, dict[str, Any]] = {}
    for name, file in _PARTS.items():
        if name in stored and name not in whole:
            files.setdefault(file, {}).update(stored[name], **{key: whole[key] for key in _NAMED if key in whole})
    for name, settings in {**files, _PROCESSOR: whole}.items():
        _write(folder / name, settings)


def _known_to_both(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a tokenizer, in the words that both generations know."""
    known = dict(settings)
    if known.get("tokenizer_class") == _NEWER:
        known["tokenizer_class"] = _KNOWN
    named = known.get("model_specific_special_tokens") or _named_tokens(known)
    if isinstance(known.get("extra_special_tokens"), list):  # a dictionary of named ones in 4.57
        known["additional_special_tokens"] = known.pop("extra_special_tokens")
        known["extra_special_tokens"] = named
    elif settings.get("tokenizer_class") == _NEWER and named:
        known.setdefault("extra_special_tokens", named)
    return known


def _named_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """Tokens that a model names beyond the usual ones: image_token, say."""
    names = (name for name, value in settings.items() if name.endswith("_token") and isinstance(value, str))
    return {name: settings[name] for name in names if name not in PreTrainedTokenizerFast.SPECIAL_TOKENS_ATTRIBUTES}


__all__ = ["holds_tokenizer", "open_tokenizer", "save_tokenizer", "tokenizer_source"]
