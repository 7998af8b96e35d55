"""Hidden folders that killed processes left, told from those of living ones by a lock that ends with its process.

    .out.k3x9_q2a/lock    locked while the process that writes `out` lives; names its host

A lock is held by the operating system for the process (and for what it forked), not by a file that must be removed:
one that can be taken has no living owner. It is only trusted on the host that made it, and where locks work at all.
"""

import os
import re
import shutil
import socket
from contextlib import suppress
from pathlib import Path
from typing import IO

try:
    import fcntl
except ModuleNotFoundError:  # Windows: nothing is marked, and so nothing removed
    fcntl = None  # type: ignore[assignment]

OLD = "old"  # what a new folder replaces, while it does
_LOCK = "lock"
_MARK = f"qbl_trl writes here, on {socket.gethostname()}\n"


def mark(holder: Path) -> IO[str] | None:
    """Lock a folder that was just made for as long as the file that is returned stays open.

    None where that is impossible: the folder is then never taken for a leftover.
    """
    if fcntl is None:
        return None
    draft = holder / "locking"
    file = draft.open("x", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.write(_MARK)
        file.flush()
        draft.rename(holder / _LOCK)  # it appears locked
    except OSError:
        file.close()
        draft.unlink(missing_ok=True)
        return None
    return file


def remove_leftovers(path: Path, above: Path) -> None:
    """Remove what killed processes of this host left in `above` while they wrote `path`.

    One that was stopped between taking the old folder away and putting the new one in its place gives the old one back.
    """
    named = re.compile(re.escape(f".{path.name}.") + "[a-z0-9_]{8}")  # tempfile's eight characters
    entries = list(above.iterdir()) if fcntl is not None and above.is_dir() and os.access(above, os.R_OK) else []
    for holder in [entry for entry in entries if named.fullmatch(entry.name)]:
        with suppress(OSError), (holder / _LOCK).open("r+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while the process lives
            if file.read() != _MARK:
                continue
            give_back(holder, path)
            remove(holder)


def give_back(holder: Path, path: Path) -> None:
    """Put the folder that was to be replaced into its place again, where nothing has taken it."""
    if (holder / OLD).exists() and not path.exists():
        (holder / OLD).rename(path)


def remove(holder: Path) -> None:
    """Remove a hidden folder, its lock at last: whoever is stopped here leaves what the next one knows to be left.

    What was replaced gets another name first: no part of it is ever given back.
    """
    with suppress(OSError):
        (holder / OLD).rename(holder / "removed")
    with suppress(OSError):
        for entry in holder.iterdir():
            if entry.name != _LOCK:
                shutil.rmtree(entry, ignore_errors=True)
        if all(entry.name == _LOCK for entry in holder.iterdir()):
            shutil.rmtree(holder, ignore_errors=True)
