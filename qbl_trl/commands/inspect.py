"""qbl-trl inspect: what a packed model holds."""

import argparse
from typing import Any

from qbl_trl.arguments import named, path
from qbl_trl.commands.common import check_exists, load
from qbl_trl.folders import is_adapter

SUMMARY = "layers, bits, bytes, quantization error, fitting factors"
EXAMPLES = ("base --against MODEL",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=named, help="a quantized or merged folder, or an adapter: its base")
    parser.add_argument("--against", type=path, help="folder of the float weights, for the error of each layer")
    parser.add_argument("--all", action="store_true", help="a row for each layer; by default layers alike share one")


def run(args: argparse.Namespace) -> None:
    from qbl_trl.loading import load_adapter
    from qbl_trl.quant.kinds import Kind, by_kind
    from qbl_trl.quant.summary import float_parts, summarize

    if args.against is not None:
        check_exists(str(args.against.absolute()))
    adapter = is_adapter(args.model)
    model = load_adapter(args.model).unload() if adapter else load(args.model, whole=False)
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
