"""The tokenizer or processor beside a model: opened, and written so that transformers 4.57 and 5 both open it.

transformers 5 writes the name of a class that 4.57 does not know, and special tokens under another name. What they
stand for is the same file, `tokenizer.json`, and the older names are known to both. What prepares images, videos and
sound is one file in 5 and one for each kind in 4.57; both read the latter.
"""

import errno
import json
import logging
import shutil
from collections.abc import Container, Iterable
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import cached_file

from qbl_trl.errors import FULL
from qbl_trl.generation import BEFORE_5
from qbl_trl.json_files import json_if_there

logger = logging.getLogger(__name__)

OF_THE_DISK = (*FULL, errno.EIO)
_NEWER, _KNOWN = "TokenizersBackend", "PreTrainedTokenizerFast"
_CONFIG = "tokenizer_config.json"
# Vocabularies of all kinds that transformers has classes for, and those of models with code of their own.
_TOKENIZERS = (
    *(_CONFIG, "tokenizer.json", "tekken.json", "vocab*", "*_vocab.json", "dict.txt"),
    *("*.model", "*.spm", "*.tiktoken", "*.tokenizer"),
)
_BESIDE = (
    *("special_tokens_map.json", "added_tokens.json", "merges.txt", "bpe.codes", "emoji.json", "byte_maps.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
)
_PROCESSOR = "processor_config.json"
_PARTS = {  # of a processor, and the files that they have of their own; an image processor's settings come last
    "feature_extractor": "preprocessor_config.json",
    "image_processor": "preprocessor_config.json",
    "video_processor": "video_preprocessor_config.json",
}
_NAMED = ("processor_class",)  # repeated in each of these files
_PROCESSOR_FILES = (_PROCESSOR, *dict.fromkeys(_PARTS.values()))
TOKENIZER_FILES = (*_TOKENIZERS, *_BESIDE, *_PROCESSOR_FILES)


def open_tokenizer(source: str | PathLike[str]) -> Any:
    """The tokenizer of a folder or a model id.

    Raises:
        ValueError, OSError: as `AutoTokenizer` does, if there is none.
    """
    stored = json_if_there(Path(source, _CONFIG))
    settings = _known_to_both(stored)
    changed = {name: value for name, value in settings.items() if stored.get(name) != value} if BEFORE_5 else {}
    newer = changed.pop("tokenizer_class", None)
    return (PreTrainedTokenizerFast if newer else AutoTokenizer).from_pretrained(source, **changed)


def holds_tokenizer(folder: str | PathLike[str]) -> bool:
    """Whether a tokenizer lies in a folder, and not only what belongs to one."""
    return any(file.is_file() for pattern in _TOKENIZERS for file in Path(folder).glob(pattern))


def tokenizer_source(source: str | PathLike[str], base: str | PathLike[str] | None = None) -> str | PathLike[str]:
    """Where the tokenizer of a folder or model id lies: there, or beside the base of an adapter that has none.

    Args:
        base: of the adapter, if not the one that its folder names.
    """
    if not Path(source).is_dir() or holds_tokenizer(source):
        return source
    return base or json_if_there(Path(source, "adapter_config.json")).get("base_model_name_or_path") or source


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
            if getattr(error, "errno", None) in OF_THE_DISK:
                raise
            logger.warning("the folder is written without a tokenizer: that of %s does not open (%s)", base, error)
        return
    elif Path(source).is_dir():
        if not holds_tokenizer(source):
            logger.warning("the folder is written without a tokenizer: %s holds none", source)
        own_code = "auto_map" in json_if_there(Path(source, _CONFIG))
        copy_files(Path(source), folder, TOKENIZER_FILES + ("*.py",) * own_code)
    else:
        open_tokenizer(source).save_pretrained(folder)
        for name in (*_PROCESSOR_FILES, "chat_template.json", "chat_template.jinja"):
            found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
            if found is not None:
                shutil.copyfile(found, folder / name)
    stored = json_if_there(folder / _CONFIG)
    settings = _known_to_both(stored)
    if settings.get("extra_special_tokens") == {}:
        del settings["extra_special_tokens"]
    if settings != stored:
        _write(folder / _CONFIG, settings)
    _set_parts_apart(folder)


def copy_files(source: Path, folder: Path, patterns: Iterable[str], apart_from: Container[str] = ()) -> None:
    """Copy the files of a folder that fit a pattern, those of a folder inside it into one of the same name.

    Args:
        patterns: as `Path.glob` takes them.
        apart_from: names of files that stay.
    """
    for file in (file for pattern in patterns for file in source.glob(pattern)):
        if file.is_file() and file.name not in apart_from:
            copy = folder / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)


def _write(file: Path, settings: dict[str, Any]) -> None:
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _set_parts_apart(folder: Path) -> None:
    """Give the parts of a processor files of their own."""
    stored = json_if_there(folder / _PROCESSOR)
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
