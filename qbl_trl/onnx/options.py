"""The options of an export on a command line: one list for `qbl-trl export` and `optimum-cli export qblora`."""

import argparse
from pathlib import Path


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


def run(args: argparse.Namespace) -> None:
    """Export, and print the report."""
    from qbl_trl.onnx.export import export_onnx

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
