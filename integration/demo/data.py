"""Fetch and convert the model and the data of the demonstrations; needs the network once.

python -m integration.demo.data --cache ~/.cache/qbl_trl
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from integration.demo.packages import DemoDataError, default_cache
from integration.demo.smollm2 import smollm2
from integration.demo.stories import reuters_r8


def main(arguments: Sequence[str] | None = None) -> None:
    """Fill the cache and say where things are."""
    parser = argparse.ArgumentParser(description="Fetch and convert the model and the data of the demonstrations.")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="cache folder (default: %(default)s)")
    cache = parser.parse_args(arguments).cache.expanduser()
    try:
        model, (train, test) = smollm2(cache), reuters_r8(cache)
    except DemoDataError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"SmolLM2-135M-Instruct: {model}\nReuters R8: {len(train)} training stories, {len(test)} test stories")


if __name__ == "__main__":
    main()
