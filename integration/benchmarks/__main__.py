"""Every benchmark in turn: `python -m integration.benchmarks --quick` (or --full), also `make bench`.

Each is a module of its own and can be run alone; each writes its numbers to `results/` itself. Speeds are ratios
against a peer in the same run: keep other work off the cores.
"""

import argparse
import subprocess
import sys


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--quick", action="store_true", help="speed and memory, and the short quality plans")
    length.add_argument("--full", action="store_true", help="every quality plan: hours")
    args = parser.parse_args()
    runs = [
        ["train_step"],
        ["base"],
        ["callback_overhead"],
        ["decode"],
        ["growth"],
        ["quality", "--full" if args.full else "--quick"],
        ["render_results"],
    ]
    failed = []
    for name, *options in runs:
        print(f"\n== {name}", flush=True)
        if subprocess.run([sys.executable, "-m", f"integration.benchmarks.{name}", *options], check=False).returncode:
            failed.append(name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
