"""qbl-trl merge: the model that an adapter folder and its base make."""

import argparse
import time

from qbl_trl.arguments import named, path
from qbl_trl.commands.common import NEW, OVERWRITE, save, written

SUMMARY = "adapter folder -> plain 4-bit model, exactly"
EXAMPLES = ("run/adapter merged",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=path, help="a saved adapter")
    parser.add_argument("output", type=path, help=NEW)
    parser.add_argument("--base", type=named, help="model id or folder of the base, if not the one the adapter names")
    parser.add_argument("--lossy", choices=("requantize",), help="dequantize, add, quantize again; reports the loss")
    parser.add_argument("--overwrite", action="store_true", help=OVERWRITE)


def run(args: argparse.Namespace) -> None:
    from qbl_trl.folders import check_apart, check_free
    from qbl_trl.loading import load_adapter, saved_adapter
    from qbl_trl.merging import merge
    from qbl_trl.tokenizers import tokenizer_source

    began = time.perf_counter()
    check_free(args.output, args.overwrite)
    base = args.base or saved_adapter(args.adapter).base_model_name_or_path
    check_apart(args.output, args.adapter, args.base, saved_adapter(args.adapter).base_model_name_or_path)
    merged = merge(load_adapter(args.adapter, args.base), lossy=args.lossy)
    tokenizer = tokenizer_source(args.adapter, args.base) if args.base else args.adapter
    save(merged, str(tokenizer), args.output, args.overwrite)
    print(written(args.output, base, began))
