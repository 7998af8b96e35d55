"""The files of an exported graph."""

from pathlib import Path

import onnx_ir as ir

MODEL_FILE = "model.onnx"
GENAI_FILE = "model_genai.onnx"  # over the same weights
DATA_FILE = "model.onnx.data"
_INLINE_BYTES = 1024


def save(model: ir.Model, folder: Path) -> None:
    """Write the graph and its weights, one weight in memory at a time."""
    ir.save(model, folder / MODEL_FILE, external_data=DATA_FILE, size_threshold_bytes=_INLINE_BYTES, max_workers=1)


def graph_files(folder: Path) -> list[Path]:
    """The graphs of a folder."""
    return sorted(folder.glob("*.onnx"))


def clear(folder: Path) -> None:
    """Remove the files of a folder."""
    for left in folder.iterdir():
        left.unlink()
