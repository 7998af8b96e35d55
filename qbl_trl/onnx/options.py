"""Options of an export on a command line: one list for `qbl-trl export`, `optimum-cli export qblora`, the recipe."""

import argparse
import importlib
import inspect
import math
import re
from typing import Any

from qbl_trl.arguments import named, path
from qbl_trl.onnx.asked import (
    ATTENTIONS,
    DTYPES,
    EMBEDDING_BITS,
    KV_CACHE_DTYPES,
    LEVELS,
    LOGITS,
    LOWERINGS,
    PROMPT_WEIGHTS,
    TOLERANCE,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything `export_onnx` can be told from a shell."""
    parser.add_argument("model", type=named, help="folder of a quantized or merged model, or of a trained adapter")
    parser.add_argument("output", type=path, help="a new or empty folder")
    add_settings(parser)


def add_settings(parser: argparse.ArgumentParser, between: str = "-") -> None:
    """All of it but what is exported, and where to.

    Args:
        between: the words of a flag.
    """

    def add(flag: str, help: str, **settings: Any) -> None:
        spelled = re.sub(r"--[a-z-]+", lambda found: "--" + found[0][2:].replace("-", between), help)
        parser.add_argument("--" + flag.replace("-", between), help=spelled, **settings)

    add("provider", default="cpu", choices=tuple(DTYPES), help="where it will run (default: %(default)s)")
    add("dtype", choices=("float32", "float16", "bfloat16"), help="of the graph (default: float32; cuda: float16)")
    add(
        "lowering",
        default="auto",
        choices=LOWERINGS,
        help="how an adapter is written. auto, factored: beside the integer codes; float_zero_point: inside fractional "
        "zero points (merged adapters alone); low_rank: as its two matrices (adapters that are not merged)",
    )
    add(
        "attention",
        default="auto",
        choices=ATTENTIONS,
        help="auto: the first that fits; gqa: GroupQueryAttention; attention: ONNX's Attention; standard: plain "
        "operators as traced (default: %(default)s)",
    )
    add("accuracy-level", type=int, choices=LEVELS, help="4: 8-bit activations on CPU, faster and not exact")
    add(
        "prompt-accuracy-level",
        type=int,
        choices=LEVELS,
        help="where more than one token is read at once; 0 beside --accuracy-level 4: float32, weights twice in memory",
    )
    add(
        "prompt-weights",
        choices=PROMPT_WEIGHTS[1:],
        help="of prompts on CPU: the fastest, for a byte more for every weight, not exact",
    )
    add(
        "embedding-bits",
        type=int,
        choices=EMBEDDING_BITS[1:],
        help="of an embedding and a head that the model holds in float: smaller and faster, not exact",
    )
    add("kv-cache-dtype", choices=KV_CACHE_DTYPES[1:], help="of keys and values: a quarter of the memory, not exact")
    add(
        "calibration",
        type=path,
        metavar="FILE",
        help="texts that --kv-cache-dtype and --embedding-bits are measured on, with blank lines between them, or a "
        '.jsonl of strings or of objects with "text", "prompt" and "completion", or "messages" (default: what the '
        "model writes, and tokens without meaning)",
    )
    add("logits", default="all", choices=LOGITS, help="positions the graph answers for; generating needs the last")
    add(
        "tolerance",
        type=tolerance_or_none,
        default=TOLERANCE,
        help="largest logit difference, or none (default: %(default)s)",
    )
    add("max-length", type=int, help="positions of the rotary tables (default: the model's own)")
    add("tokenizer", type=named, help="folder or model id (default: what lies beside the model)")
    add("overwrite", action="store_true", help="replace what the output folder holds")


def tolerance_or_none(text: str) -> float | None:
    """A number of at least 0, or None for "none"."""
    if text.lower() == "none":
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no tolerance; give a number of at least 0, or none")
    return value


def run(args: argparse.Namespace) -> None:
    """Export, and print the report."""
    export_onnx = importlib.import_module("qbl_trl").export_onnx  # says what to install where packages are missing
    texts = importlib.import_module("qbl_trl.texts")
    calibration = args.calibration and texts.token_ids(args.tokenizer or args.model, texts.read_texts(args.calibration))
    settings = {name: getattr(args, name) for name in inspect.getfullargspec(inspect.unwrap(export_onnx)).kwonlyargs}
    print(export_onnx(args.model, args.output, **{**settings, "calibration": calibration}))
