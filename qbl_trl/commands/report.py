"""qbl-trl report: a page about a training run."""

import argparse

from qbl_trl.arguments import path

SUMMARY = "one HTML page about a training run"
EXAMPLES = ("run",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=path, help="output_dir of a run with QBLoRACallback")


def run(args: argparse.Namespace) -> None:
    from qbl_trl.trl.report import write_report

    print(write_report(args.run_dir))
