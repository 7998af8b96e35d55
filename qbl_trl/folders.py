"""Output folders and files that appear whole or not at all."""

import errno
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from qbl_trl.errors import FULL, ConfigError, QblError
from qbl_trl.leftovers import OLD, give_back, mark, remove, remove_leftovers

_FILLED = (errno.ENOTEMPTY, errno.EEXIST)
_RACED = (errno.ENOENT, *_FILLED)  # another process took a folder away, or put one there


def check_free(folder: str | os.PathLike[str], overwrite: bool = False, error: type[QblError] = ConfigError) -> Path:
    """The folder as a Path, if something may be written there. What killed processes left beside it is removed.

    A leading ~ is the user's home, as in a shell.

    Raises:
        ConfigError (or the `error` given): if it is no path, is a file, holds files and `overwrite` is false, or
            nothing can be written where it would lie.
    """
    if not isinstance(folder, str | os.PathLike):
        raise error(f"{folder!r} is no path of a folder to write into")
    path = Path(os.path.expanduser(folder))
    try:
        there = path.exists()
    except (OSError, ValueError) as reason:  # too long, or with a zero in it
        raise error(f"{str(path)[:80]} ... cannot be a folder ({getattr(reason, 'strerror', reason)})") from reason
    if there and not path.is_dir():  # a file, a device, a pipe
        raise error(f"{path} is {'a file' if path.is_file() else 'no folder'}; name a folder to write into")
    stays, real = _stays(path), path.resolve()
    above = real if stays else next(parent for parent in real.parents if parent.exists())
    remove_leftovers(real, above)
    filled = path.is_dir() and any(path.iterdir())
    if filled and not overwrite:
        raise error(f"{path} is not empty; choose another folder, or set overwrite to replace all of it")
    if filled and stays:
        raise error(
            f"{path} cannot be replaced (it is a mount, the current folder, or its parent folder cannot be written "
            "to); choose a folder inside it"
        )
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
    path = Path(os.path.expanduser(folder)).resolve()
    for given in inputs:
        if given is not None and Path(given).exists() and Path(given).resolve().is_relative_to(path):
            raise error(f"{folder} would replace {given}, which it is made from; choose another folder")


@contextmanager
def new_folder(
    folder: str | os.PathLike[str], overwrite: bool = False, error: type[QblError] = ConfigError
) -> Iterator[Path]:
    """Write into a hidden sibling, which takes the folder's name when the block ends without an error.

    An old folder is replaced only then; after an error nothing is left behind. A killed process leaves the hidden
    sibling, never a half-written folder under the wanted name; whoever writes there next removes it. What lies behind a
    link is filled. An empty folder that cannot be replaced (a mount, the current folder) is filled from a hidden folder
    in it, and so is one whose parent cannot be written to.

    Raises:
        ConfigError (or the `error` given): before anything is written, as `check_free`; or if the disk is full.
    """
    path = check_free(folder, overwrite, error).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    inside = _stays(path)
    holder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path if inside else path.parent))
    draft, old, lock = holder / "new", holder / OLD, None
    try:
        lock = mark(holder)
        draft.mkdir()  # with the permissions that folders have here; those of `holder` are its own
        yield draft
        if inside and not overwrite and any(other != holder for other in path.iterdir()):
            raise OSError(errno.ENOTEMPTY, "filled meanwhile")
        if inside:
            for file in sorted(draft.iterdir()):
                file.rename(path / file.name)
        else:
            _put(draft, path, old, overwrite)
    except (OSError, SafetensorError) as reason:
        number = _number(reason)
        if not overwrite and number in _FILLED:
            raise error(f"{folder} was filled meanwhile, and stays as it is; choose another folder") from reason
        if number not in FULL:
            raise
        raise error(f"{folder}: {os.strerror(number)}; nothing was written") from reason
    finally:
        try:
            give_back(holder, path)  # stopped, by Ctrl-C too, between taking it away and putting the new one
            remove(holder)
        finally:
            if lock is not None:
                lock.close()


@contextmanager
def new_file(file: Path) -> Iterator[Path]:
    """Write into a hidden sibling, which takes the file's name when the block ends without an error.

    Raises:
        ConfigError: if the disk is full.
    """
    draft = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        yield draft
        os.replace(draft, file)
    except OSError as reason:
        if (number := _number(reason)) not in FULL:
            raise
        raise ConfigError(f"{file}: {os.strerror(number)}; it was not written") from reason
    finally:
        draft.unlink(missing_ok=True)


def _number(reason: Exception) -> int | None:
    """What the operating system says went wrong; safetensors has it in its words alone, and NumPy counts."""
    if isinstance(reason, OSError) and reason.errno is not None:
        return reason.errno
    if re.fullmatch(r"\d+ requested and \d+ written", str(reason)):
        return errno.ENOSPC
    said = re.search(r"\(os error (\d+)\)", str(reason))
    return int(said[1]) if said else None


def _put(draft: Path, path: Path, old: Path, overwrite: bool) -> None:
    """Give a folder its name, and what has that name another one, for as long as this takes.

    Others that put a whole folder there in the same moment come before this one, or after it. Without `overwrite`
    nothing but an empty folder makes room. Whoever is stopped in between has both folders, and must give one back.
    """
    for tries_left in (2, 1, 0):
        try:
            if path.is_dir() and overwrite:
                shutil.rmtree(old, ignore_errors=True)  # something whole stands at `path`
                path.rename(old)
            elif path.is_dir():
                path.rmdir()
            draft.rename(path)
            return
        except OSError as reason:
            if tries_left and reason.errno in _RACED and not (reason.errno in _FILLED and not overwrite):
                continue
            raise


def is_adapter(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds an adapter, as PEFT writes it."""
    return Path(folder, "adapter_config.json").is_file()


def refuse_graph(folder: Path, error: type[QblError] = ConfigError) -> None:
    """Refuse an exported folder where a model is wanted.

    Raises:
        ConfigError (or the `error` given): if it holds an ONNX graph.
    """
    if any(folder.glob("*.onnx")):
        raise error(f"{folder} holds an ONNX graph; name the folder of the model that it was exported from")


def folder_bytes(folder: Path) -> int:
    """Size of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _stays(path: Path) -> bool:
    """Whether a folder cannot change its name: something is mounted there, or processes are in it."""
    try:
        here = Path.cwd()
    except FileNotFoundError:  # it was removed
        here = Path("/")
    real = path.resolve()
    held = real.is_mount() or real == here or real in here.parents
    return real.is_dir() and (held or not os.access(real.parent, os.W_OK | os.X_OK) or _is_anothers(real))


def _is_anothers(folder: Path) -> bool:
    """Whether a folder is another user's in one where all may write, but give no names to what is not theirs (/tmp)."""
    above, user = folder.parent.stat(), getattr(os, "geteuid", lambda: 0)()
    return bool(above.st_mode & stat.S_ISVTX) and user not in (0, above.st_uid, folder.stat().st_uid)
