"""The options of an export on a command line: one list for `qbl-trl export` and `optimum-cli export qblora`."""

import argparse
import importlib
import inspect
import math
from collections.abc import Iterable
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import Any

from qbl_trl.errors import ExportError

DTYPES = {"cpu": ("float32", "float16"), "cuda": ("float16", "bfloat16")}  # by provider, the default first
LOWERINGS = ("auto", "factored", "float_zero_point", "low_rank")
ATTENTIONS = ("auto", "attention", "gqa", "standard")
LEVELS = (0, 1, 2, 3, 4)
PROMPT_WEIGHTS = (None, "int8")
EMBEDDING_BITS = (None, 4, 8)
LOGITS = ("all", "last")
KV_CACHE_DTYPES = (None, "int8")
TOLERANCE = 1e-3
SHORTEST = 4  # tokens: what the parity gate reads


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything `export_onnx` can be told from a shell."""
    parser.add_argument("model", help="folder of a quantized or merged model, or of a trained adapter")
    parser.add_argument("output", type=Path, help="a new or empty folder")
    parser.add_argument(
        "--provider", default="cpu", choices=tuple(DTYPES), help="where it will run (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="of the graph (default: float32; cuda: float16)"
    )
    parser.add_argument(
        "--lowering",
        default="auto",
        choices=LOWERINGS,
        help="how an adapter is written. auto, factored: beside the integer codes; float_zero_point: inside fractional "
        "zero points (merged adapters alone); low_rank: as its two matrices (adapters that are not merged)",
    )
    parser.add_argument(
        "--attention",
        default="auto",
        choices=ATTENTIONS,
        help="auto: the first that fits; gqa: GroupQueryAttention; attention: ONNX's Attention; standard: plain "
        "operators as traced (default: %(default)s)",
    )
    parser.add_argument(
        "--accuracy-level", type=int, choices=LEVELS, help="4: 8-bit activations on CPU, faster and not exact"
    )
    parser.add_argument(
        "--prompt-accuracy-level",
        type=int,
        choices=LEVELS,
        help="where more than one token is read at once; 0 beside --accuracy-level 4: float32, weights twice in memory",
    )
    parser.add_argument(
        "--prompt-weights",
        choices=PROMPT_WEIGHTS[1:],
        help="of prompts on CPU: the fastest, for a byte more for every weight, not exact",
    )
    parser.add_argument(
        "--embedding-bits",
        type=int,
        choices=EMBEDDING_BITS[1:],
        help="of an embedding and a head that the model holds in float: smaller and faster, not exact",
    )
    parser.add_argument(
        "--kv-cache-dtype", choices=KV_CACHE_DTYPES[1:], help="of keys and values: a quarter of the memory, not exact"
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="texts that --kv-cache-dtype and --embedding-bits are measured on, with blank lines between them, or a "
        '.jsonl of strings or of objects with "text", "prompt" and "completion", or "messages" (default: what the '
        "model writes, and tokens without meaning)",
    )
    parser.add_argument(
        "--logits", default="all", choices=LOGITS, help="positions the graph answers for; generating needs the last"
    )
    parser.add_argument(
        "--tolerance",
        type=tolerance_or_none,
        default=TOLERANCE,
        help="largest logit difference, or none (default: %(default)s)",
    )
    parser.add_argument("--max-length", type=int, help="positions of the rotary tables (default: the model's own)")
    parser.add_argument("--tokenizer", help="folder or model id (default: what lies beside the model)")
    parser.add_argument("--overwrite", action="store_true", help="replace what the output folder holds")


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


def check_choices(
    *,
    provider: str = "cpu",
    dtype: Any = None,
    lowering: str = "auto",
    attention: str = "auto",
    accuracy_level: int | None = None,
    prompt_accuracy_level: int | None = None,
    prompt_weights: str | None = None,
    embedding_bits: int | None = None,
    kv_cache_dtype: str | None = None,
    calibration: Any = None,
    logits: str = "all",
    max_length: int | None = None,
    tolerance: float | None = None,
    tokenizer: Any = None,
    **others: Any,
) -> str:
    """The name of the graph's float type, if an export takes these values; other options are looked at later.

    Raises:
        ExportError: naming the option and what is allowed.
    """
    for name, given, allowed in (
        ("provider", provider, tuple(DTYPES)),
        ("lowering", lowering, LOWERINGS),
        ("attention", attention, ATTENTIONS),
        ("accuracy_level", accuracy_level, (None, *LEVELS)),
        ("prompt_accuracy_level", prompt_accuracy_level, (None, *LEVELS)),
        ("prompt_weights", prompt_weights, PROMPT_WEIGHTS),
        ("embedding_bits", embedding_bits, EMBEDDING_BITS),
        ("kv_cache_dtype", kv_cache_dtype, KV_CACHE_DTYPES),
        ("logits", logits, LOGITS),
    ):
        single = given is None or isinstance(given, (str, Integral))  # `in` would ask an array, too
        if not single or isinstance(given, bool) or given not in allowed:
            raise ExportError(f"export_onnx: {name}={given!r} is not known; allowed: {', '.join(map(str, allowed))}")
    for name, chosen in (
        ("accuracy_level", accuracy_level),
        ("prompt_accuracy_level", prompt_accuracy_level is not None),
        ("prompt_weights", prompt_weights),
    ):
        if chosen and provider != "cpu":
            raise ExportError(f"export_onnx: {name} chooses between kernels that only provider='cpu' has")
    if prompt_accuracy_level is not None and prompt_weights is not None:
        raise ExportError(
            f"export_onnx: prompt_weights={prompt_weights!r} leaves prompts no codes that prompt_accuracy_level="
            f"{prompt_accuracy_level} could multiply; set one of the two"
        )
    if prompt_accuracy_level is not None and 4 not in (accuracy_level, prompt_accuracy_level):
        raise ExportError(
            f"export_onnx: prompt_accuracy_level={prompt_accuracy_level} changes nothing without accuracy_level=4: "
            "prompts and steps are in float32 then. Set accuracy_level=4 beside it, or leave it out"
        )
    if max_length is not None and not (type(max_length) is int and max_length >= SHORTEST):
        raise ExportError(f"export_onnx: max_length={max_length!r} must be a whole number of at least {SHORTEST}")
    number = isinstance(tolerance, Real) and not isinstance(tolerance, bool)
    if tolerance is not None and not (number and 0 <= tolerance < math.inf):
        raise ExportError(f"export_onnx: tolerance={tolerance!r} must be a number of at least 0, or None")
    if not (tokenizer is None or hasattr(tokenizer, "save_pretrained") or isinstance(tokenizer, (str, PathLike))):
        raise ExportError(f"export_onnx: tokenizer takes a tokenizer, a folder or a model id, not {tokenizer!r}")
    named = DTYPES[provider][0] if dtype is None else str(dtype).removeprefix("torch.")
    if named not in DTYPES[provider]:
        raise ExportError(
            f"export_onnx: dtype={named} has no kernels on provider={provider!r}; allowed there: "
            f"{', '.join(DTYPES[provider])}"
        )
    if prompt_weights is not None and named != "float32":
        raise ExportError(
            f"export_onnx: prompt_weights={prompt_weights!r} is written in float32, not for dtype={named}"
        )
    if calibration is not None and kv_cache_dtype is None and embedding_bits is None:
        raise ExportError(
            'export_onnx: calibration is for kv_cache_dtype="int8" and embedding_bits; without them there is nothing '
            "to measure"
        )
    if kv_cache_dtype is not None and (named != "float32" or attention not in ("auto", "gqa")):
        raise ExportError(
            f'export_onnx: kv_cache_dtype={kv_cache_dtype!r} is written for provider="cpu" in float32, with '
            f'attention="auto" or "gqa"; not for {named} on {provider} with attention={attention!r}'
        )
    if kv_cache_dtype is not None and not _takes_query_lengths(provider):
        raise ExportError(f"export_onnx: kv_cache_dtype={kv_cache_dtype!r} needs ONNX Runtime 1.32 or newer")
    if calibration is not None:
        if isinstance(calibration, str | bytes) or not isinstance(calibration, Iterable):
            raise ExportError(f"export_onnx: calibration takes batches of token ids, not {calibration!r}")
        for batch in calibration if isinstance(calibration, (list, tuple)) else ():
            importlib.import_module("qbl_trl.quant.calibration").tokens_of(batch)
    return named


def _takes_query_lengths(provider: str) -> bool:
    takes: bool = importlib.import_module("qbl_trl.onnx.group_query").takes_query_lengths(provider)
    return takes


def run(args: argparse.Namespace) -> None:
    """Export, and print the report."""
    export_onnx = importlib.import_module("qbl_trl").export_onnx  # says what to install where packages are missing
    texts = importlib.import_module("qbl_trl.texts")
    calibration = args.calibration and texts.token_ids(args.tokenizer or args.model, texts.read_texts(args.calibration))
    settings = {name: getattr(args, name) for name in inspect.getfullargspec(inspect.unwrap(export_onnx)).kwonlyargs}
    print(export_onnx(args.model, args.output, **{**settings, "calibration": calibration}))
