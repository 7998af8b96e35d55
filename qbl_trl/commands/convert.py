"""qbl-trl convert: a packed model in a format of other engines."""

import argparse

from qbl_trl.arguments import named, path
from qbl_trl.commands.common import load
from qbl_trl.errors import ConfigError

SUMMARY = "4-bit folder, merged or not -> GGUF (llama.cpp) or HQQ"
EXAMPLES = (
    "merged merged.gguf --to gguf --template BASE.gguf",
    "merged hqq --to hqq",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=named, help="a quantized or merged folder")
    parser.add_argument("output", type=path, help="a new file (gguf) or folder (hqq)")
    parser.add_argument("--to", required=True, metavar="{gguf,hqq}", help="the two formats that hold a merged adapter")
    parser.add_argument("--template", type=path, help="gguf: a GGUF file of the same model, for its metadata")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")


def run(args: argparse.Namespace) -> None:
    from qbl_trl.folders import check_apart, new_folder
    from qbl_trl.quant.writers import check_request, write_checkpoint
    from qbl_trl.tokenizers import save_tokenizer

    if args.template is not None and args.to != "gguf":
        raise ConfigError(f"--template is for --to gguf; leave it out with --to {args.to}")
    if args.template is None and args.to == "gguf":
        raise ConfigError("--to gguf needs --template, a GGUF file of the same model, for its metadata")
    check_request(args.output, args.to, args.template, args.overwrite)
    check_apart(args.output, args.model)
    if args.to == "hqq":
        with new_folder(args.output, args.overwrite) as draft:
            report = write_checkpoint(load(args.model), draft, args.to)
            save_tokenizer(args.model, draft)
    else:
        settings = {"template": args.template, "overwrite": args.overwrite}
        report = write_checkpoint(load(args.model), args.output, args.to, **settings)
    print(f"{args.output}: {report.layers} layers; weights off by {report.largest_rounding:.1e} at most")
