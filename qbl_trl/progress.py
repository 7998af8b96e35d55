"""For what takes longer than a few seconds: lines, and bars, on a terminal only and silenced with transformers' own."""

import sys
from typing import Any

from tqdm import tqdm
from transformers.utils import logging


def progress(total: int, what: str, unit: str, delay: float = 0.0) -> Any:
    """A tqdm bar, as a context manager.

    Args:
        total: number of units.
        what: what is being done, such as "quantizing".
        delay: seconds before anything is shown.
    """
    return logging.tqdm(total=total, desc=what, unit=unit, disable=None, leave=False, delay=delay)


def step(bar: Any, what: str) -> None:
    """One unit is done; `what` comes next."""
    bar.update()
    bar.set_description(what)


def say(line: str) -> None:
    """One line on standard output at once, above the bars of a terminal."""
    tqdm.write(line)
    sys.stdout.flush()
