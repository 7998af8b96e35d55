"""The options of an export on a command line: one list for `qbl-trl export` and `optimum-cli export qblora`."""

import argparse
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qbl_trl.errors import ConfigError

DTYPES = {"cpu": ("float32", "float16"), "cuda": ("float16", "bfloat16")}  # by provider, the default first


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything `export_onnx` can be told from a shell."""
    parser.add_argument("model", help="folder of a merged model, or of a trained adapter")
    parser.add_argument("output", type=Path, help="a new or empty folder")
    parser.add_argument("--provider", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--lowering", default="auto", choices=("auto", "factored", "float_zero_point", "low_rank"))
    parser.add_argument("--attention", default="auto", choices=("auto", "attention", "gqa", "standard"))
    parser.add_argument("--accuracy-level", type=int, choices=(0, 1, 2, 3, 4), help="4: 8-bit activations on CPU")
    parser.add_argument("--logits", default="all", choices=("all", "last"), help="positions the graph answers for")
    parser.add_argument("--overwrite", action="store_true", help="replace what the output folder holds")


def check_values(options: Mapping[str, Any]) -> None:
    """Refuse values that no export takes.

    Args:
        options: keyword arguments of `export_onnx`, defaults among them.

    Raises:
        ConfigError: naming the option and what is allowed.
    """
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    for action in parser._actions:
        if action.choices is not None and action.dest in options:
            value = options[action.dest]
            named = value if isinstance(value, int | None) else str(value).removeprefix("torch.")
            allowed = (
                DTYPES.get(options.get("provider", "cpu"), ()) if action.dest == "dtype" else tuple(action.choices)
            )
            if named not in allowed and (named is not None or action.default is not None):
                raise ConfigError(
                    f"export_onnx: {action.dest}={value!r} is not known; allowed: {', '.join(map(str, allowed))}"
                )


def run(args: argparse.Namespace) -> None:
    """Export, and print the report."""
    export_onnx = importlib.import_module("qbl_trl").export_onnx  # says what to install where packages are missing
    print(
        export_onnx(
            args.model,
            args.output,
            provider=args.provider,
            dtype=args.dtype,
            lowering=args.lowering,
            attention=args.attention,
            accuracy_level=args.accuracy_level,
            logits=args.logits,
            overwrite=args.overwrite,
        )
    )
