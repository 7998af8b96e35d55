"""Checkpoints of other quantizers, read code for code: GPTQ, AWQ, AutoRound, HQQ, compressed-tensors, MLX, Metal,
GGUF."""

from qbl_trl.quant.importers.convert import convert_checkpoint
from qbl_trl.quant.importers.modules import take_over
from qbl_trl.quant.importers.open import describe_checkpoint, holds_codes, open_reader, read_layers
from qbl_trl.quant.importers.reader import Reader

__all__ = [
    "Reader",
    "convert_checkpoint",
    "describe_checkpoint",
    "holds_codes",
    "open_reader",
    "read_layers",
    "take_over",
]
