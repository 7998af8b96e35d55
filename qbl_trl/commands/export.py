"""qbl-trl export: the ONNX graph of a model or an adapter."""

import argparse

from qbl_trl.onnx import options

SUMMARY = "model folder -> ONNX graph at 4 bits"
EXAMPLES = (
    "merged onnx",
    "merged onnx --accuracy-level 4 --prompt-accuracy-level 0 --kv-cache-dtype int8 --logits last",
    "merged onnx --accuracy-level 4 --prompt-weights int8 --kv-cache-dtype int8 --logits last",
    "merged onnx --provider cuda",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    options.run(args)
