"""Packing of small integer codes into bytes, in the layout of ONNX Runtime's MatMulNBits.

Along one row, codes of `bits` bits are laid out little-endian inside each byte: with 4 bits, code 2i is the low
nibble of byte i and code 2i + 1 its high nibble. Groups need no padding of their own because every allowed group
size fills whole bytes; a ragged last group is padded with zero codes up to the group size, as the operator wants.

This module leaves out other vendors' layouts: each importer translates its own into this one.
"""

import sys

import torch
from torch import Tensor

from qbl_trl.allowed import ALLOWED_BITS
from qbl_trl.errors import ConfigError


def check_bits(bits: int) -> None:
    """Raise ConfigError unless `bits` is a width this package packs."""
    if bits not in ALLOWED_BITS:
        raise ConfigError(f"bits={bits!r} is not supported; allowed: {', '.join(map(str, ALLOWED_BITS))}")


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes along the last dimension.

    Args:
        codes: (..., K) integers in [0, 2**bits).
        bits: 2, 4 or 8.

    Returns:
        (..., ceil(K * bits / 8)) uint8; missing codes of the last byte are zero.

    Raises:
        ConfigError: if a code does not fit into `bits`.
    """
    check_bits(bits)
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 1 << bits):
        raise ConfigError(f"pack: codes span [{int(codes.min())}, {int(codes.max())}], allowed: [0, {(1 << bits) - 1}]")
    codes = codes.to(torch.uint8)
    per_byte = 8 // bits
    if per_byte == 1:
        return codes.contiguous()
    missing = -codes.shape[-1] % per_byte
    if missing:
        codes = torch.nn.functional.pad(codes, (0, missing))
    lanes = codes.unflatten(-1, (-1, per_byte))
    packed = lanes[..., 0].clone(memory_format=torch.contiguous_format)
    for lane in range(1, per_byte):
        packed |= lanes[..., lane] << (bits * lane)
    return packed


def unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    """Invert `pack`.

    Args:
        packed: (..., bytes) uint8.
        bits: 2, 4 or 8.
        length: K, the number of codes to return; at most bytes * 8 / bits.

    Returns:
        (..., K) uint8.
    """
    if bits == 8:
        codes = packed
    elif bits == 4 and sys.byteorder == "little":
        # One 16-bit lane per byte: ....hhhhllll -> 0000hhhh 0000llll, read back as two bytes, low nibble first.
        wide = packed.to(torch.int16)
        codes = torch.bitwise_left_shift(wide, 4).bitwise_or_(wide).bitwise_and_(0x0F0F).view(torch.uint8)
    else:
        mask = (1 << bits) - 1
        codes = torch.stack([(packed >> shift) & mask for shift in range(0, 8, bits)], dim=-1).flatten(-2)
    return codes[..., :length] if codes.shape[-1] != length else codes
