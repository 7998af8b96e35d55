"""qbl-trl: quantize | inspect | merge | to-lora | export | convert | verify | report.

Each command is one public function of the package; `qbl-trl COMMAND --help` lists its options. An error of the
package is one line on standard error and exit status 1; nothing half-written is left. What a command needs is loaded
after its arguments were read.
"""

import argparse
import importlib
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import qbl_trl
from qbl_trl.allowed import ALGORITHMS, ALLOWED_BITS, ALLOWED_GROUP_SIZES, SCALE_DTYPE_NAMES
from qbl_trl.errors import FLAGS, SHOWN, ConfigError, QblError, first_line, said
from qbl_trl.onnx import options

_NEW = "a new or empty folder"
_TEXT = (
    "The river rose in the night. By morning the lower fields stood under water, and engineers measured 4.2 metres at "
    "noon, half a metre more than in the spring of 1998."
)


def make_parser() -> argparse.ArgumentParser:
    """The command line, without running anything."""
    parser = argparse.ArgumentParser(prog="qbl-trl", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--version", action="version", version=f"qbl-trl {qbl_trl.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, summary: str, *examples: str) -> argparse.ArgumentParser:
        text = "\n".join(["examples:", *(f"  qbl-trl {name} {example}" for example in examples)])
        raw = argparse.RawDescriptionHelpFormatter
        return commands.add_parser(name, help=summary, description=summary, epilog=text, formatter_class=raw)

    quantize = add(
        "quantize",
        "quantize a float model, or convert a 4-bit checkpoint untouched",
        "MODEL base --algorithm hqq",
        "MODEL base --algorithm gptq --calibration texts.jsonl",
        "--from GPTQ_FOLDER base",
    )
    foreign = "GPTQ, AWQ, AutoRound, HQQ, compressed-tensors, MLX or Metal, or a GGUF file"
    quantize.add_argument("model", help=f"model id or folder (with --from: a checkpoint of {foreign})")
    quantize.add_argument("output", type=Path, help=_NEW)
    quantize.add_argument(
        "--from",
        dest="convert",
        action="store_true",
        help="convert: --from CHECKPOINT OUTPUT keeps its codes as they are",
    )
    quantize.add_argument(
        "--bits", type=int, default=4, choices=ALLOWED_BITS, help="of a stored weight (default: %(default)s)"
    )
    sizes = ", ".join(map(str, ALLOWED_GROUP_SIZES))
    quantize.add_argument(
        "--group-size", type=int, default=32, help=f"weights that share a scale: {sizes} (default: %(default)s)"
    )
    quantize.add_argument("--symmetric", action="store_true", help="no zero points")
    quantize.add_argument(
        "--algorithm",
        default="rtn",
        choices=ALGORITHMS,
        help="how scales are chosen: by range, clip search, half-quadratic, or on texts (default: %(default)s)",
    )
    quantize.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help='for "gptq": texts with blank lines between them, or a .jsonl of strings or of objects with "text", '
        '"prompt" and "completion", or "messages"',
    )
    quantize.add_argument("--scale-dtype", default="float16", choices=SCALE_DTYPE_NAMES, help="(default: %(default)s)")
    quantize.add_argument("--quantize-embeddings", action="store_true", help="the embedding and the output head too")
    quantize.add_argument(
        "--modules-to-not-convert", nargs="+", metavar="NAME", help="layers that stay in float, beside the head"
    )
    quantize.add_argument(
        "--dtype",
        default="float32",
        help="of layers that are not quantized: float32, float16 or bfloat16 (default: %(default)s)",
    )
    quantize.add_argument("--overwrite", action="store_true", help="replace what the output folder holds")

    inspect = add("inspect", "layers, bits, bytes, quantization error, fitting factors", "base --against MODEL")
    inspect.add_argument("model", help="a quantized or merged folder, or an adapter: its base")
    inspect.add_argument("--against", type=Path, help="folder of the float weights, for the error of each layer")
    inspect.add_argument("--all", action="store_true", help="a row for each layer; by default layers alike share one")

    merge = add("merge", "adapter folder -> plain 4-bit model, exactly", "run/adapter merged")
    merge.add_argument("adapter", type=Path, help="a saved adapter")
    merge.add_argument("output", type=Path, help=_NEW)
    merge.add_argument("--base", help="model id or folder of the base, if not the one the adapter names")
    merge.add_argument("--lossy", choices=("requantize",), help="dequantize, add, quantize again; reports the loss")
    merge.add_argument("--overwrite", action="store_true", help="replace what the output folder holds")

    to_lora = add("to-lora", "the same adapter as plain LoRA files", "run/adapter lora")
    to_lora.add_argument("adapter", type=Path, help="a saved adapter")
    to_lora.add_argument("output", type=Path, help=_NEW)
    to_lora.add_argument("--overwrite", action="store_true", help="replace what the output folder holds")

    export = add(
        "export",
        "model folder -> ONNX graph at 4 bits",
        "merged onnx",
        "merged onnx --accuracy-level 4 --prompt-accuracy-level 0 --kv-cache-dtype int8 --logits last",
        "merged onnx --accuracy-level 4 --prompt-weights int8 --kv-cache-dtype int8 --logits last",
        "merged onnx --provider cuda",
    )
    options.add_arguments(export)

    convert = add(
        "convert",
        "4-bit folder, merged or not -> GGUF (llama.cpp) or HQQ",
        "merged merged.gguf --to gguf --template BASE.gguf",
        "merged hqq --to hqq",
    )
    convert.add_argument("model", help="a quantized or merged folder")
    convert.add_argument("output", type=Path, help="a new file (gguf) or folder (hqq)")
    convert.add_argument("--to", required=True, metavar="{gguf,hqq}", help="the two formats that hold a merged adapter")
    convert.add_argument("--template", type=Path, help="gguf: a GGUF file of the same model, for its metadata")
    convert.add_argument("--overwrite", action="store_true", help="replace the output if it exists")

    verify = add("verify", "compare two models on the same text", "merged onnx --text 'Once upon a time'")
    verify.add_argument("reference", help="folder of a torch or ONNX model")
    verify.add_argument("candidate", help="folder of a torch or ONNX model")
    read = verify.add_mutually_exclusive_group()
    read.add_argument("--text", default=_TEXT, help="what both read (default: two sentences)")
    read.add_argument(
        "--text-file",
        type=Path,
        metavar="FILE",
        help="texts that both read, as those of `qbl-trl export --calibration`",
    )
    verify.add_argument(
        "--tolerance",
        type=options.tolerance_or_none,
        default=1e-3,
        help="largest logit difference, or none (%(default)s)",
    )

    report = add("report", "one HTML page about a training run", "run")
    report.add_argument("run_dir", type=Path, help="output_dir of a run with QBLoRACallback")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, 1 after an error that was explained, or 130 after Ctrl-C."""
    args = make_parser().parse_args([_dashed(argument) for argument in (sys.argv[1:] if argv is None else argv)])
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # as it is imported it warns of a kernel not installed
    try:
        if args.command == "quantize" and args.convert:
            _refuse_ignored(args)
        qbl_trl.register()
        run = getattr(importlib.import_module("qbl_trl.commands"), args.command.replace("-", "_"))
        return int(run(args) or 0)
    except KeyboardInterrupt:
        print(f"qbl-trl {args.command}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get(SHOWN):
            raise
        print(f"qbl-trl {args.command}: {_explained(error, args)}", file=sys.stderr)
        return 1


def _dashed(argument: str) -> str:
    """--kv_cache_dtype, as recipes and trainers spell their flags, is --kv-cache-dtype here."""
    name, *value = argument.split("=", 1)
    return "=".join([name.replace("_", "-"), *value]) if name.startswith("--") else argument


_LONGEST = 300  # characters of another library's message
_FUNCTIONS = (
    "GroupQuantConfig",
    "QBLoRAConfig",
    "convert_checkpoint",
    "export_onnx",
    "quantize",
    "verify",
    "write_checkpoint",
)
_OTHER_NAMES = {"format": "to"}  # of an argument of a function, here


def _explained(error: Exception, args: argparse.Namespace) -> str:
    """One of our messages in the words of a command line; another library's with its type, and how to see where it came
    from."""
    if not isinstance(error, QblError | OSError):
        return f"{type(error).__name__}: {first_line(error)[:_LONGEST]} ({SHOWN}=1 shows where)"
    text = said(error, {**FLAGS, 'merge(model, lossy="requantize")': "--lossy requantize"})
    text = re.sub(rf"^({'|'.join([args.command, *_FUNCTIONS])}): ", "", text)
    names = {**{name: name for name in vars(args)}, **_OTHER_NAMES}

    def as_flag(found: re.Match[str]) -> str:
        if re.search(r"\w\([^()]*$", text[: found.start()]) or found["name"] not in names:  # inside a call
            return found[0]
        flag = "--" + names[found["name"]].replace("_", "-")
        if found["value"] in ("True", "False"):
            return flag if found["value"] == "True" else f"no {flag}"
        return f"{flag} {found['value'].lower() if found['value'] == 'None' else found['value']}"

    text = re.sub(r'\b(?P<name>[a-z_0-9]+)=(?P<quote>["\']?)(?P<value>[\w.+-]*\w)(?P=quote)', as_flag, text)
    return text.replace("set no --", "leave out --")


def _refuse_ignored(args: argparse.Namespace) -> None:
    """--from keeps what the checkpoint holds: what would ask for something else is said, not ignored."""
    plain = vars(make_parser().parse_args(["quantize", "MODEL", "OUTPUT"]))
    kept = ("model", "output", "convert", "overwrite", "command")
    given = [name for name, value in plain.items() if name not in kept and vars(args)[name] != value]
    if given:
        options = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ConfigError(f"--from keeps the codes as the checkpoint holds them; leave out {options}")


if __name__ == "__main__":
    sys.exit(main())
