"""What each command of `qbl-trl` does with its arguments; a package is loaded by the command that needs it."""

import argparse
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qbl_trl.allowed import SCALE_DTYPE_NAMES
from qbl_trl.errors import FULL, OTHERS_DEPLOYED, ConfigError, first_line
from qbl_trl.folders import is_adapter, refuse_graph


def quantize(args: argparse.Namespace) -> None:
    import torch

    from qbl_trl.config import GroupQuantConfig
    from qbl_trl.folders import check_apart, check_free
    from qbl_trl.quant.hf_quantizer import quantize_model_
    from qbl_trl.quant.importers import convert_checkpoint
    from qbl_trl.texts import read_texts, token_ids

    began = time.perf_counter()
    if args.convert:
        _check_replaces_no_source(args.output)
    check_free(args.output, args.overwrite)
    check_apart(args.output, args.model)
    _check_exists(args.model)
    if args.dtype not in SCALE_DTYPE_NAMES:
        raise ConfigError(f"--dtype {args.dtype} is not known; allowed: {', '.join(SCALE_DTYPE_NAMES)}")
    if not args.convert and (args.algorithm == "gptq") != (args.calibration is not None):
        raise ConfigError("--algorithm gptq and --calibration FILE, texts like those the model will read, go together")
    if args.convert:
        convert_checkpoint(args.model, args.output, overwrite=args.overwrite)
    elif Path(args.model).is_file():
        raise ConfigError(f"{args.model} is a file; `qbl-trl quantize --from` takes over what a GGUF file holds")
    else:
        _check_holds_model(args.model)
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
            model = _load(args.model, args.dtype, widened or settings)
        if widened is not None:
            model = quantize_model_(model.to(getattr(torch, args.dtype)), settings)
        _save(model, args.model, args.output, args.overwrite)
    print(_written(args.output, args.model, began))


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

    with _fetched(name):
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


def _check_exists(name: str) -> None:
    """A path that is not there is no model id."""
    path = Path(name)
    if not path.exists() and (path.is_absolute() or name.startswith(".") or len(path.parts) > 2):
        raise ConfigError(f"{name}: no such file or folder")


@contextmanager
def _fetched(name: str) -> Iterator[None]:
    """A name that is no folder is a model id, or was mistyped: what failed to be fetched is said with both in mind."""
    try:
        yield
    except OSError as error:
        if Path(name).exists() or error.errno in FULL:
            raise
        first = first_line(error) or type(error).__name__
        raise ConfigError(f"{name} is no folder here, and no model that could be fetched: {first}") from error


def _check_holds_model(name: str) -> None:
    """A folder is opened for its weights."""
    folder = Path(name)
    refuse_graph(folder)
    if is_adapter(folder):
        from qbl_trl.config import QBLoRAConfig
        from qbl_trl.loading import saved_adapter

        saved = saved_adapter(folder)
        if not isinstance(saved, QBLoRAConfig):
            method = getattr(saved.peft_type, "value", "unnamed")
            raise ConfigError(f"{name} is an adapter of another PEFT method ({method}): {OTHERS_DEPLOYED}")
        raise ConfigError(f"{name} is an adapter; `qbl-trl merge {name} MERGED` makes a model of it and its base")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(f"{name} holds no model (no config.json)")


def inspect(args: argparse.Namespace) -> None:
    from qbl_trl.loading import load_adapter
    from qbl_trl.quant.kinds import Kind, by_kind
    from qbl_trl.quant.summary import float_parts, summarize

    if args.against is not None:
        _check_exists(str(args.against.absolute()))
    adapter = is_adapter(args.model)
    model = load_adapter(args.model).unload() if adapter else _load(args.model, whole=False)
    layers = summarize(model, args.against)
    print(_listed([Kind(layer.name, (layer,)) for layer in layers] if args.all else by_kind(layers)))
    weights = sum(layer.out_features * layer.in_features for layer in layers)
    size = sum(layer.bytes_per_weight * layer.out_features * layer.in_features for layer in layers)
    merged = sum(layer.delta is not None for layer in layers)
    adapted = f"a merged adapter in {merged} of them" if merged else "no merged adapter"
    print(f"{len(layers)} layers, {weights / 1e6:.1f} M weights, {size / 1e6:.1f} MB; {adapted}")
    apart = sorted(float_parts(model).items(), key=lambda item: -item[1])
    if apart:
        held = sum(count for _, count in apart)
        largest = [name for name, count in apart if count >= held / 10][:2]
        print(f"in float beside them: {held / 1e6:.1f} MB" + f", most of it in {', '.join(largest)}" * bool(largest))


def _listed(kinds: list[Any]) -> str:
    """A row for each kind of layer, under a head; columns are as wide as what they hold."""
    rows = [("layers", "count", "N x K", "bits", "group", "B/weight", "error", "exact in_factors")]
    for kind in kinds:
        layer = kind.layers[0]
        error = "-" if kind.errors is None else " to ".join(dict.fromkeys(f"{value:.4f}" for value in kind.errors))
        factors = ", ".join([*map(str, layer.in_factors[:6]), *["..."] * (len(layer.in_factors) > 6)]) or "none"
        shape = f"{layer.out_features} x {layer.in_features}"
        size = f"{layer.bytes_per_weight:.3f}"
        rows.append(
            (kind.name, *map(str, (len(kind.layers), shape, layer.bits, layer.group_size, size, error, factors)))
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=False)), last]
        )
        for name, *cells, last in rows
    )


def merge(args: argparse.Namespace) -> None:
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
    _save(merged, str(tokenizer), args.output, args.overwrite)
    print(_written(args.output, base, began))


def to_lora(args: argparse.Namespace) -> None:
    from qbl_trl.adapter.to_lora import to_lora

    print(to_lora(args.adapter, args.output, overwrite=args.overwrite))


def convert(args: argparse.Namespace) -> None:
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
            report = write_checkpoint(_load(args.model), draft, args.to)
            save_tokenizer(args.model, draft)
    else:
        settings = {"template": args.template, "overwrite": args.overwrite}
        report = write_checkpoint(_load(args.model), args.output, args.to, **settings)
    print(f"{args.output}: {report.layers} layers; weights off by {report.largest_rounding:.1e} at most")


def export(args: argparse.Namespace) -> None:
    from qbl_trl.onnx.options import run

    run(args)


def verify(args: argparse.Namespace) -> int:
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


def report(args: argparse.Namespace) -> None:
    from qbl_trl.trl.report import write_report

    print(write_report(args.run_dir))


def _load(name: str, dtype: str = "float32", settings: Any = None, whole: bool = True) -> Any:
    import torch

    from qbl_trl.loading import open_model, open_whole
    from qbl_trl.quant.checkpoint import read_headers

    _check_exists(name)
    _check_holds_model(name)
    if Path(name).is_dir():
        read_headers(Path(name))  # names a file that is cut short
    wanted = getattr(torch, dtype)
    quantize = {} if settings is None else {"quantization_config": settings}  # an explicit None hides a stored one
    with _fetched(name):
        return (open_whole if whole else open_model)(name, dtype=wanted, **quantize)


def _save(model: Any, tokenizer_of: str, output: Path, overwrite: bool) -> None:
    """The model and the tokenizer beside it; a folder's tokenizer files are copied as they are."""
    from qbl_trl.folders import new_folder
    from qbl_trl.model_files import save_model
    from qbl_trl.tokenizers import save_tokenizer

    with new_folder(output, overwrite) as draft:
        save_model(model, draft)
        save_tokenizer(tokenizer_of, draft)


def _written(output: Path, source: str | None, began: float) -> str:
    """One line: the folder, its packed layers, bytes of weights before (if they lie in a folder) and after, seconds."""
    from qbl_trl.quant.checkpoint import read_headers

    names = read_headers(output)
    packed, merged = (sum(name.endswith(f".{part}") for name in names) for part in ("scales", "delta"))
    layers = f"{packed} packed layers" * bool(packed) + f" ({merged} with a merged adapter)" * bool(merged)
    before = _weights(Path(source)) if source else 0
    size = f"{before / 1e6:.1f} MB -> " * bool(before) + f"{_weights(output) / 1e6:.1f} MB"
    return f"{output}: " + ", ".join([*[layers] * bool(layers), size, f"{time.perf_counter() - began:.1f} s"])


def _weights(path: Path) -> int:
    """Bytes of a weights file, or of those of a folder; 0 for a model id."""
    files = (
        [path] if path.is_file() else [file for kind in ("safetensors", "bin", "pt") for file in path.glob(f"*.{kind}")]
    )
    return sum(file.stat().st_size for file in files)
