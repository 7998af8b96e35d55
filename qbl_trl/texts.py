"""Texts of a person as token ids: those of `qbl-trl verify --text-file` and `qbl-trl export --calibration`.

FILE.jsonl     one text per line: a JSON string, or an object as TRL's datasets hold them
               {"text": ...}    {"prompt": ..., "completion": ...}    {"messages": [...]}, by the chat template
another file   plain text, with blank lines between texts
"""

import json
import re
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from qbl_trl.errors import ConfigError
from qbl_trl.tokenizers import holds_tokenizer, open_tokenizer, tokenizer_source

Text = str | list[Any]  # characters, or the messages of a chat


def read_texts(file: str | PathLike[str]) -> list[Text]:
    """The texts of a file.

    Raises:
        ConfigError: if there is no such file, it holds no text, or a line of a .jsonl file is none; naming the line.
    """
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    try:
        content = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text in UTF-8") from error
    if path.suffix == ".jsonl":
        texts = [_text(line, f"{path}, line {at}") for at, line in enumerate(content.split("\n"), 1) if line.strip()]
    else:
        texts = [part.strip("\n") for part in re.split(r"\n\s*\n", content) if part.strip()]
    if not texts:
        raise ConfigError(f"{path} holds no text")
    return texts


def token_ids(source: str | PathLike[str], texts: list[Text]) -> list[Tensor]:
    """Token ids (1, tokens) of each text.

    Args:
        source: a folder with a tokenizer, or a model id.

    Raises:
        ConfigError: if the folder holds no tokenizer, or a text no token.
    """
    source = tokenizer_source(source)
    if Path(source).is_dir() and not holds_tokenizer(source):
        raise ConfigError(f"{source} holds no tokenizer, and texts need one")
    tokenizer = open_tokenizer(source)
    chats = [text for text in texts if not isinstance(text, str)]
    if chats and not getattr(tokenizer, "chat_template", None):
        raise ConfigError(f"the tokenizer of {source} has no chat template for messages; give texts")
    plain = [
        (text, True) if isinstance(text, str) else (tokenizer.apply_chat_template(text, tokenize=False), False)
        for text in texts
    ]  # a template writes the special tokens itself
    ids: list[Tensor] = [tokenizer(text, return_tensors="pt", add_special_tokens=own).input_ids for text, own in plain]
    empty = next((text for text, row in zip(texts, ids, strict=True) if not row.numel()), None)
    if empty is not None:
        raise ConfigError(f"a text holds no token: {empty!r}")
    return ids


def _text(line: str, where: str) -> Text:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    if isinstance(row, str):
        return row
    fields = row if isinstance(row, dict) else {}
    if isinstance(fields.get("text"), str):
        return str(fields["text"])
    parts = [fields.get("prompt"), fields.get("completion")]
    if all(isinstance(part, str) for part in parts):
        return "".join(map(str, parts))
    messages = fields.get("messages")
    if not messages and all(isinstance(part, list | None) for part in parts):
        messages = [message for part in parts for message in part or ()]
    if isinstance(messages, list) and messages:
        return messages
    raise ConfigError(
        f'{where}: no text; a line is a JSON string, or an object with "text", "prompt" and "completion", or "messages"'
    )
