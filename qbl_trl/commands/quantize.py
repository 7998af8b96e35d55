"""qbl-trl quantize: a float model in 4-bit codes, or the codes of a checkpoint in another format."""

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

from qbl_trl.allowed import ALGORITHMS, ALLOWED_BITS, ALLOWED_GROUP_SIZES, SCALE_DTYPE_NAMES
from qbl_trl.arguments import named, path
from qbl_trl.commands.common import NEW, OVERWRITE, check_exists, check_holds_model, fetched, load, save, written
from qbl_trl.errors import ConfigError

SUMMARY = "quantize a float model, or convert a 4-bit checkpoint untouched"
EXAMPLES = (
    "MODEL base --algorithm hqq",
    "MODEL base --algorithm gptq --calibration texts.jsonl",
    "--from GPTQ_FOLDER base",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    foreign = "GPTQ, AWQ, AutoRound, HQQ, compressed-tensors, MLX or Metal, or a GGUF file"
    sizes = ", ".join(map(str, ALLOWED_GROUP_SIZES))
    parser.add_argument("model", type=named, help=f"model id or folder (with --from: a checkpoint of {foreign})")
    parser.add_argument("output", type=path, help=NEW)
    parser.add_argument(
        "--from",
        dest="takes_codes",
        action="store_true",
        help="convert: --from CHECKPOINT OUTPUT keeps its codes as they are",
    )
    parser.add_argument(
        "--bits", type=int, default=4, choices=ALLOWED_BITS, help="of a stored weight (default: %(default)s)"
    )
    parser.add_argument(
        "--group-size", type=int, default=32, help=f"weights that share a scale: {sizes} (default: %(default)s)"
    )
    parser.add_argument("--symmetric", action="store_true", help="no zero points")
    parser.add_argument(
        "--algorithm",
        default="rtn",
        choices=ALGORITHMS,
        help="how scales are chosen: by range, clip search, half-quadratic, or on texts (default: %(default)s)",
    )
    parser.add_argument(
        "--calibration",
        type=path,
        metavar="FILE",
        help='for "gptq": texts with blank lines between them, or a .jsonl of strings or of objects with "text", '
        '"prompt" and "completion", or "messages"',
    )
    parser.add_argument("--scale-dtype", default="float16", choices=SCALE_DTYPE_NAMES, help="(default: %(default)s)")
    parser.add_argument("--quantize-embeddings", action="store_true", help="the embedding and the output head too")
    parser.add_argument(
        "--modules-to-not-convert", nargs="+", metavar="NAME", help="layers that stay in float, beside the head"
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=SCALE_DTYPE_NAMES,
        help="of layers that are not quantized (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help=OVERWRITE)


def check(args: argparse.Namespace) -> None:
    """--from keeps what the checkpoint holds: what would ask for something else is said, not ignored.

    Raises:
        ConfigError: before anything large is loaded.
    """
    if not args.takes_codes:
        return
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    plain = vars(parser.parse_args(["MODEL", "OUTPUT"]))
    kept = ("model", "output", "takes_codes", "overwrite")
    given = [name for name, value in plain.items() if name not in kept and vars(args)[name] != value]
    if given:
        options = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ConfigError(f"--from keeps the codes as the checkpoint holds them; leave out {options}")


def run(args: argparse.Namespace) -> None:
    import torch

    from qbl_trl.config import GroupQuantConfig
    from qbl_trl.folders import check_apart, check_free
    from qbl_trl.quant.hf_quantizer import quantize_model_
    from qbl_trl.quant.importers import convert_checkpoint
    from qbl_trl.texts import read_texts, token_ids

    began = time.perf_counter()
    if args.takes_codes:
        _check_replaces_no_source(args.output)
    check_free(args.output, args.overwrite)
    check_apart(args.output, args.model)
    check_exists(args.model)
    if not args.takes_codes and (args.algorithm == "gptq") != (args.calibration is not None):
        raise ConfigError("--algorithm gptq and --calibration FILE, texts like those the model will read, go together")
    if args.takes_codes:
        convert_checkpoint(args.model, args.output, overwrite=args.overwrite)
    elif Path(args.model).is_file():
        raise ConfigError(f"{args.model} is a file; `qbl-trl quantize --from` takes over what a GGUF file holds")
    else:
        check_holds_model(args.model)
        widened = _widened(args.model)
        settings = GroupQuantConfig(
            bits=args.bits,
            group_size=args.group_size,
            symmetric=args.symmetric,
            algorithm=args.algorithm,
            scale_dtype=args.scale_dtype,
            quantize_embeddings=args.quantize_embeddings,
            modules_to_not_convert=args.modules_to_not_convert,
            calibration=args.calibration and token_ids(args.model, read_texts(args.calibration)),
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You passed `quantization_config`")  # to make wide what the folder holds
            model = load(args.model, args.dtype, widened or settings)
        if widened is not None:
            model = quantize_model_(model.to(getattr(torch, args.dtype)), settings)
        save(model, args.model, args.output, args.overwrite)
    print(written(args.output, args.model, began))


def _check_replaces_no_source(output: Path) -> None:
    """Whoever writes OUTPUT --from CHECKPOINT loses no checkpoint, --overwrite or not."""
    from qbl_trl.config import QUANT_METHOD
    from qbl_trl.json_files import json_if_there

    stored = json_if_there(output / "config.json")
    if stored and (stored.get("quantization_config") or {}).get("quant_method") != QUANT_METHOD:
        raise ConfigError(
            f"{output} holds a model that --from did not write, and stays as it is. The order is: qbl-trl quantize "
            "--from CHECKPOINT OUTPUT"
        )


def _widened(name: str) -> Any:
    """The configuration by which transformers makes narrow floats (FP8, MXFP4) wide while it loads; None for others.

    Raises:
        ConfigError: if a checkpoint holds codes.
    """
    import transformers
    from transformers.quantizers import AutoQuantizationConfig

    from qbl_trl.config import QUANT_METHOD
    from qbl_trl.quant.importers import holds_codes

    with fetched(name):
        stored = getattr(transformers.AutoConfig.from_pretrained(name), "quantization_config", None)
    if stored is None:
        return None
    method = stored.get("quant_method", "unknown method")
    if method == QUANT_METHOD:
        raise ConfigError(f"{name} is quantized already, in the format that this command writes")
    if holds_codes(stored):
        raise ConfigError(
            f"{name} is quantized already ({method}); `qbl-trl quantize --from` takes its codes over as they are, or "
            "name the float model"
        )
    try:
        config = AutoQuantizationConfig.from_dict({**stored, "dequantize": True})
    except ImportError as error:
        raise ConfigError(f"{name} is quantized already ({method}): {error}") from error
    except (ValueError, TypeError):
        config = None
    if not getattr(config, "dequantize", False):
        raise ConfigError(
            f"{name} is quantized already ({method}), and transformers {transformers.__version__} makes no float model "
            "of it while it loads; name the float model"
        )
    return config
