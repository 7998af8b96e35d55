"""Output folders that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qbl_trl.errors import ConfigError, QblError


def check_free(folder: str | os.PathLike[str], overwrite: bool = False, error: type[QblError] = ConfigError) -> Path:
    """The folder as a Path, if something may be written there.

    Raises:
        ConfigError (or the `error` given): if it is a file, holds files and `overwrite` is false, or nothing can be
            written where it would lie.
    """
    path = Path(folder)
    if path.is_file():
        raise error(f"{path} is a file; name a folder to write into")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise error(f"{path} is not empty; choose another folder, or set overwrite to replace all of it")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=above):
            pass
    except OSError as reason:
        raise error(f"{path}: nothing can be written into {above} ({reason.strerror or reason})") from reason
    return path


def check_apart(
    folder: str | os.PathLike[str], *inputs: str | os.PathLike[str] | None, error: type[QblError] = ConfigError
) -> None:
    """Refuse an output that would take the place of what it is made from.

    Raises:
        ConfigError (or the `error` given): naming both.
    """
    path = Path(folder).resolve()
    for given in inputs:
        if given is not None and Path(given).exists() and Path(given).resolve().is_relative_to(path):
            raise error(f"{folder} would replace {given}, which it is made from; choose another folder")


@contextmanager
def new_folder(
    folder: str | os.PathLike[str], overwrite: bool = False, error: type[QblError] = ConfigError
) -> Iterator[Path]:
    """Write into a hidden sibling, which takes the folder's name when the block ends without an error.

    An old folder is replaced only then; after an error nothing is left behind. A killed process leaves the hidden
    sibling, never a half-written folder under the wanted name.

    Raises:
        ConfigError (or the `error` given): before anything is written, as `check_free`.
    """
    path = check_free(folder, overwrite, error)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        draft.chmod(0o755)
        yield draft
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            path.rename(old / path.name)
            draft.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            draft.rename(path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
