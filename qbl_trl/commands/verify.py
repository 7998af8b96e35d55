"""qbl-trl verify: how far two models are apart."""

import argparse
import sys
from pathlib import Path

from qbl_trl.arguments import named, path
from qbl_trl.errors import ConfigError
from qbl_trl.onnx.options import tolerance_or_none

SUMMARY = "compare two models on the same text"
_TEXT = (
    "The river rose in the night. By morning the lower fields stood under water, and engineers measured 4.2 metres at "
    "noon, half a metre more than in the spring of 1998."
)
EXAMPLES = ("merged onnx --text 'Once upon a time'",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", type=named, help="folder of a torch or ONNX model")
    parser.add_argument("candidate", type=named, help="folder of a torch or ONNX model")
    read = parser.add_mutually_exclusive_group()
    read.add_argument("--text", default=_TEXT, help="what both read (default: two sentences)")
    read.add_argument(
        "--text-file",
        type=path,
        metavar="FILE",
        help="texts that both read, as those of `qbl-trl export --calibration`",
    )
    parser.add_argument(
        "--tolerance",
        type=tolerance_or_none,
        default=1e-3,
        help="largest logit difference, or none (%(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    from qbl_trl.parity import ParityReport, logits_of
    from qbl_trl.texts import read_texts, token_ids
    from qbl_trl.verifying import opened
    from qbl_trl.verifying import verify as compared

    missing = next((name for name in (args.reference, args.candidate) if not Path(name).is_dir()), None)
    if missing is not None:
        raise ConfigError(f"verify: {missing}: no such folder")
    ids = token_ids(args.reference, [args.text] if args.text_file is None else read_texts(args.text_file))
    reference, candidate = logits_of(opened(args.reference)), logits_of(opened(args.candidate))
    report = ParityReport.joined([compared(reference, candidate, row) for row in ids])
    print(report)
    if args.tolerance is not None and not report.max_abs_difference <= args.tolerance:
        print(
            f"largest logit difference {report.max_abs_difference:.1e} is over {args.tolerance:.1e}. Of 8-bit "
            "activations, weights or caches, packed embeddings and half precision expect more: KL per token tells what "
            "they cost; --tolerance sets the limit, none for no limit",
            file=sys.stderr,
        )
        return 1
    return 0
