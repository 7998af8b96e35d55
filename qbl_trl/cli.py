"""qbl-trl: quantize | inspect | merge | to-lora | export | convert | verify | report.

Each command is one public function of the package; `qbl-trl COMMAND --help` lists its options. An error of the
package is one line on standard error and exit status 1; nothing half-written is left.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import qbl_trl
from qbl_trl.config import ALLOWED_GROUP_SIZES, SCALE_DTYPES
from qbl_trl.errors import ConfigError, QblError
from qbl_trl.folders import refuse_graph
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
        "--from GPTQ_FOLDER base",
    )
    quantize.add_argument("model", help="model id or folder (with --from: the GPTQ, AWQ, HQQ or GGUF checkpoint)")
    quantize.add_argument("output", type=Path, help=_NEW)
    quantize.add_argument("--from", dest="convert", action="store_true", help="keep the codes the checkpoint holds")
    quantize.add_argument("--bits", type=int, default=4, choices=(2, 4, 8), help="of a code (default: %(default)s)")
    sizes = ", ".join(map(str, ALLOWED_GROUP_SIZES))
    quantize.add_argument(
        "--group-size", type=int, default=32, help=f"weights that share a scale: {sizes} (default: %(default)s)"
    )
    quantize.add_argument("--symmetric", action="store_true", help="no zero points")
    quantize.add_argument(
        "--algorithm",
        default="rtn",
        choices=("rtn", "mse", "hqq"),
        help="how scales are chosen: by range, clip search, half-quadratic (default: %(default)s)",
    )
    quantize.add_argument(
        "--scale-dtype", default="float16", choices=tuple(SCALE_DTYPES), help="(default: %(default)s)"
    )
    quantize.add_argument("--quantize-embeddings", action="store_true", help="the embedding and the output head too")
    quantize.add_argument(
        "--modules-to-not-convert", nargs="+", metavar="NAME", help="layers that stay in float, beside the head"
    )
    quantize.add_argument("--dtype", default="float32", help="of what stays in float (default: %(default)s)")
    quantize.add_argument("--overwrite", action="store_true", help="replace what the output folder holds")
    quantize.set_defaults(run=_quantize)

    inspect = add("inspect", "layers, bits, bytes, quantization error, fitting factors", "base --against MODEL")
    inspect.add_argument("model", help="a quantized or merged folder, or an adapter: its base")
    inspect.add_argument("--against", type=Path, help="folder of the float weights, for the error of each layer")
    inspect.set_defaults(run=_inspect)

    merge = add("merge", "adapter folder -> plain 4-bit model, exactly", "run/adapter merged")
    merge.add_argument("adapter", type=Path, help="a saved adapter")
    merge.add_argument("output", type=Path, help=_NEW)
    merge.add_argument("--base", help="model id or folder of the base, if not the one the adapter names")
    merge.add_argument("--lossy", choices=("requantize",), help="dequantize, add, quantize again; reports the loss")
    merge.add_argument("--overwrite", action="store_true", help="replace what the output folder holds")
    merge.set_defaults(run=_merge)

    to_lora = add("to-lora", "the same adapter as plain LoRA files", "run/adapter lora")
    to_lora.add_argument("adapter", type=Path, help="a saved adapter")
    to_lora.add_argument("output", type=Path, help=_NEW)
    to_lora.add_argument("--overwrite", action="store_true", help="replace what the output folder holds")
    to_lora.set_defaults(run=_to_lora)

    export = add(
        "export",
        "model folder -> ONNX graph at 4 bits",
        "merged onnx",
        "merged onnx --accuracy-level 4 --prompt-accuracy-level 0 --kv-cache-dtype int8 --logits last",
        "merged onnx --provider cuda",
    )
    options.add_arguments(export)
    export.set_defaults(run=options.run)

    convert = add(
        "convert",
        "4-bit folder, merged or not -> GGUF (llama.cpp) or HQQ",
        "merged merged.gguf --to gguf --template BASE.gguf",
        "merged hqq --to hqq",
    )
    convert.add_argument("model", help="a quantized or merged folder")
    convert.add_argument("output", type=Path, help="a new file (gguf) or folder (hqq)")
    convert.add_argument("--to", required=True, metavar="{gguf,hqq}", help="formats that hold a merged adapter")
    convert.add_argument("--template", type=Path, help="gguf: a GGUF file of the same model, for its metadata")
    convert.set_defaults(run=_convert)

    verify = add("verify", "compare two models on the same text", "merged onnx --text 'Once upon a time'")
    verify.add_argument("reference", help="folder of a torch or ONNX model")
    verify.add_argument("candidate", help="folder of a torch or ONNX model")
    verify.add_argument("--text", default=_TEXT, help="what both read (default: two sentences)")
    verify.add_argument(
        "--tolerance",
        type=options.tolerance_or_none,
        default=1e-3,
        help="largest logit difference, or none (%(default)s)",
    )
    verify.set_defaults(run=_verify)

    report = add("report", "one HTML page about a training run", "run")
    report.add_argument("run_dir", type=Path, help="output_dir of a run with QBLoRACallback")
    report.set_defaults(run=_report)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, or 1 after an error that was explained."""
    args = make_parser().parse_args(argv)
    try:
        return int(args.run(args) or 0)
    except Exception as error:
        if os.environ.get("QBL_TRL_TRACEBACK"):
            raise
        print(f"qbl-trl {args.command}: {_explained(error).removeprefix(f'{args.command}: ')}", file=sys.stderr)
        return 1


_FLAGS = {
    "set overwrite": "pass --overwrite",
    "Pass tolerance=None": "Pass --tolerance none",
    'merge(model, lossy="requantize")': "--lossy requantize",
}
_LONGEST = 300  # characters of another library's message


def _explained(error: Exception) -> str:
    """One of our messages as it is; another library's with its type, and how to see where it came from."""
    if isinstance(error, QblError | OSError):
        text = str(error)
        for called, flag in _FLAGS.items():
            text = text.replace(called, flag)
        return text
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first[:_LONGEST]} (QBL_TRL_TRACEBACK=1 shows where)"


def _quantize(args: argparse.Namespace) -> None:
    from qbl_trl.config import GroupQuantConfig
    from qbl_trl.folders import check_apart, check_free
    from qbl_trl.quant.importers import convert_checkpoint

    check_free(args.output, args.overwrite)
    check_apart(args.output, args.model)
    _check_exists(args.model)
    if args.convert:
        _refuse_ignored(args)
        convert_checkpoint(args.model, args.output, overwrite=args.overwrite)
    elif Path(args.model).is_file():
        raise ConfigError(f"{args.model} is a file; `qbl-trl quantize --from` takes over what a GGUF file holds")
    else:
        _check_holds_model(args.model)
        _check_float(args.model)
        settings = GroupQuantConfig(
            bits=args.bits,
            group_size=args.group_size,
            symmetric=args.symmetric,
            algorithm=args.algorithm,
            scale_dtype=args.scale_dtype,
            quantize_embeddings=args.quantize_embeddings,
            modules_to_not_convert=args.modules_to_not_convert,
        )
        _save(_load(args.model, args.dtype, settings), args.model, args.output, args.overwrite)
    print(args.output)


def _refuse_ignored(args: argparse.Namespace) -> None:
    """--from keeps what the checkpoint holds: what would ask for something else is said, not ignored."""
    plain = vars(make_parser().parse_args(["quantize", "MODEL", "OUTPUT"]))
    kept = ("model", "output", "convert", "overwrite", "run", "command")
    given = [name for name, value in plain.items() if name not in kept and vars(args)[name] != value]
    if given:
        options = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ConfigError(f"--from keeps the codes as the checkpoint holds them; leave out {options}")


def _check_float(name: str) -> None:
    from transformers import AutoConfig

    from qbl_trl.config import QUANT_METHOD

    stored = getattr(AutoConfig.from_pretrained(name), "quantization_config", None)
    if stored is not None and stored.get("quant_method") == QUANT_METHOD:
        raise ConfigError(f"{name} is quantized already, in the format that this command writes")
    if stored is not None:
        raise ConfigError(
            f"{name} is quantized already ({stored.get('quant_method', 'unknown method')}); `qbl-trl quantize --from` "
            "takes its codes over as they are, or name the float model"
        )


def _check_exists(name: str) -> None:
    """A path that is not there is no model id."""
    path = Path(name)
    if not path.exists() and (path.is_absolute() or name.startswith(".") or len(path.parts) > 2):
        raise ConfigError(f"{name}: no such file or folder")


def _check_holds_model(name: str) -> None:
    """A folder is opened for its weights."""
    folder = Path(name)
    refuse_graph(folder)
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(f"{name} is an adapter; `qbl-trl merge {name} MERGED` makes a model of it and its base")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(f"{name} holds no model (no config.json)")


def _inspect(args: argparse.Namespace) -> None:
    from qbl_trl.loading import load_adapter
    from qbl_trl.quant.summary import float_parts, summarize

    if args.against is not None:
        _check_exists(str(args.against.absolute()))
    adapter = Path(args.model, "adapter_config.json").is_file()
    model = load_adapter(args.model).unload() if adapter else _load(args.model)
    layers = summarize(model, args.against)
    print(f"{'layer':<44} {'N x K':>14} {'bits':>4} {'group':>5} {'B/weight':>8} {'error':>8}  exact in_factors")
    for layer in layers:
        shape = f"{layer.out_features} x {layer.in_features}"
        error = "-" if layer.error is None else f"{layer.error:.4f}"
        factors = ", ".join([*map(str, layer.in_factors[:6]), *["..."] * (len(layer.in_factors) > 6)]) or "none"
        print(
            f"{layer.name:<44} {shape:>14} {layer.bits:>4} {layer.group_size:>5} {layer.bytes_per_weight:>8.3f} "
            f"{error:>8}  {factors}"
        )
    weights = sum(layer.out_features * layer.in_features for layer in layers)
    size = sum(layer.bytes_per_weight * layer.out_features * layer.in_features for layer in layers)
    merged = sum(layer.delta is not None for layer in layers)
    print(f"{len(layers)} layers, {weights / 1e6:.1f} M weights, {size / 1e6:.1f} MB, {merged} with a merged adapter")
    apart = sorted(float_parts(model).items(), key=lambda item: -item[1])
    if apart:
        held = sum(count for _, count in apart)
        print(f"in float beside them: {held / 1e6:.1f} MB, most of it in {', '.join(name for name, _ in apart[:2])}")


def _merge(args: argparse.Namespace) -> None:
    from qbl_trl.folders import check_apart, check_free
    from qbl_trl.loading import load_adapter, saved_adapter
    from qbl_trl.merging import merge

    check_free(args.output, args.overwrite)
    check_apart(args.output, args.adapter, args.base, saved_adapter(args.adapter).base_model_name_or_path)
    _save(
        merge(load_adapter(args.adapter, args.base), lossy=args.lossy), str(args.adapter), args.output, args.overwrite
    )
    print(args.output)


def _to_lora(args: argparse.Namespace) -> None:
    from qbl_trl.adapter.to_lora import to_lora

    print(to_lora(args.adapter, args.output, overwrite=args.overwrite))


def _convert(args: argparse.Namespace) -> None:
    from qbl_trl.folders import new_folder
    from qbl_trl.quant.writers import check_request, write_checkpoint
    from qbl_trl.tokenizers import save_tokenizer

    check_request(args.output, args.to, args.template)
    if args.to == "hqq":
        with new_folder(args.output) as draft:
            report = write_checkpoint(_load(args.model), draft, args.to)
            save_tokenizer(args.model, draft)
    else:
        report = write_checkpoint(_load(args.model), args.output, args.to, template=args.template)
    print(f"{args.output}: {report.layers} layers; weights off by {report.largest_rounding:.1e} at most")


def _verify(args: argparse.Namespace) -> int:
    from qbl_trl.parity import verify
    from qbl_trl.tokenizers import open_tokenizer

    if not any(Path(args.reference).glob("tokenizer*")) and Path(args.reference).is_dir():
        raise ConfigError(f"{args.reference} holds no tokenizer, and --text needs one")
    tokens = open_tokenizer(args.reference)(args.text, return_tensors="pt").input_ids
    if not tokens.numel():
        raise ConfigError("verify: --text holds no token")
    report = verify(args.reference, args.candidate, tokens)
    print(report)
    if args.tolerance is not None and not report.max_abs_difference <= args.tolerance:
        print(
            f"largest logit difference {report.max_abs_difference:.1e} is over {args.tolerance:.1e}. Of 8-bit "
            "activations or caches, packed embeddings and half precision expect more: KL per token tells what they "
            "cost; --tolerance sets the limit, none for no limit",
            file=sys.stderr,
        )
        return 1
    return 0


def _report(args: argparse.Namespace) -> None:
    from qbl_trl.trl.report import write_report

    print(write_report(args.run_dir))


def _load(name: str, dtype: str = "float32", settings: Any = None) -> Any:
    import torch

    from qbl_trl.loading import open_model

    _check_exists(name)
    _check_holds_model(name)
    wanted = getattr(torch, dtype, None)
    if wanted not in (torch.float32, torch.float16, torch.bfloat16):
        raise ConfigError(f"--dtype {dtype} is not known; allowed: float32, float16, bfloat16")
    quantize = {} if settings is None else {"quantization_config": settings}  # an explicit None hides a stored one
    return open_model(name, dtype=wanted, **quantize)


def _save(model: Any, tokenizer_of: str, output: Path, overwrite: bool) -> None:
    """The model and the tokenizer beside it; a folder's tokenizer files are copied as they are."""
    from qbl_trl.folders import new_folder
    from qbl_trl.tokenizers import save_tokenizer

    with new_folder(output, overwrite) as draft:
        model.save_pretrained(draft)
        save_tokenizer(tokenizer_of, draft)


if __name__ == "__main__":
    sys.exit(main())
