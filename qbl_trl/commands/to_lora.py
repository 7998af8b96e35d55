"""qbl-trl to-lora: an adapter as plain LoRA files."""

import argparse

from qbl_trl.arguments import path
from qbl_trl.commands.common import NEW, OVERWRITE

SUMMARY = "the same adapter as plain LoRA files"
EXAMPLES = ("run/adapter lora",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=path, help="a saved adapter")
    parser.add_argument("output", type=path, help=NEW)
    parser.add_argument("--overwrite", action="store_true", help=OVERWRITE)


def run(args: argparse.Namespace) -> None:
    from qbl_trl.adapter.to_lora import to_lora

    print(to_lora(args.adapter, args.output, overwrite=args.overwrite))
