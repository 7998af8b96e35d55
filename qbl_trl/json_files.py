"""JSON objects in files: what cannot be read is said with the file's name."""

import json
from pathlib import Path
from typing import Any

from qbl_trl.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: if the file is missing or is no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content


def json_if_there(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty where there is none.

    Raises:
        CheckpointError: if the file is no JSON object.
    """
    return read_json(path) if path.is_file() else {}
