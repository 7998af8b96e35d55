"""One pass from codes to weights in the product's own dtype on a CUDA or ROCm device, where Triton is installed.

Plain torch takes seven passes over the same memory, in float32. The kernel is used only after it gave the plain
path's bits on a sample of every kind of layer; otherwise everything works as before, slower. QBL_TRL_NATIVE=0 turns
it off.
"""

import functools
import importlib.util
import logging
import os

import torch
from torch import Tensor

from qbl_trl.quant.affine import dequantize
from qbl_trl.quant.packing import pack

logger = logging.getLogger(__name__)

_BLOCK = 1024  # weights one program makes


def dequantize_rows(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, columns: int, dtype: torch.dtype
) -> Tensor | None:
    """s (q - z) computed in float32 and rounded once to `dtype`, the bits of the plain path.

    Args:
        codes: (N, G * group_size * bits / 8) packed uint8.
        scales: (N, G) float.
        zeros: (N, ceil(G * bits / 8)) packed uint8, (N, G) float, or None (every zero point is 2**(bits-1)).
        columns: K, at most G * group_size.

    Returns:
        (N, K) in `dtype`; None where the plain path has to do it.
    """
    if codes.device.type != "cuda" or torch.compiler.is_compiling() or type(codes) is not Tensor:
        return None
    if not _usable(codes.device.index or 0):
        return None
    with torch.cuda.device(codes.device):
        return _call(codes, scales, zeros, bits, group_size, columns, dtype)


def _call(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, columns: int, dtype: torch.dtype
) -> Tensor:
    from qbl_trl.quant.triton_kernel import dequantize_kernel

    codes, scales = codes.contiguous(), scales.contiguous()
    stored = codes if zeros is None else zeros.contiguous()
    kind = 0 if zeros is None else 2 if zeros.is_floating_point() else 1
    out = torch.empty(len(codes), columns, dtype=dtype, device=codes.device)
    dequantize_kernel[(len(codes), -(-columns // _BLOCK))](
        *(codes, scales, stored, out, columns, codes.shape[1], scales.shape[1], stored.shape[1]),
        BITS=bits,
        GROUP=group_size,
        ZEROS=kind,
        BLOCK=_BLOCK,
    )
    return out


@functools.cache
def _usable(device: int) -> bool:
    """Whether the kernel runs on this device and agrees; asked once per process."""
    if os.environ.get("QBL_TRL_NATIVE") == "0" or importlib.util.find_spec("triton") is None:
        return False
    try:
        with torch.cuda.device(device):
            return agrees(torch.device("cuda", device))
    except Exception as error:  # a compiler's failures have no common class, and the plain path is always there
        logger.info("packed weights are unpacked by plain torch, a few times slower: %s", error)
        return False


def agrees(
    device: torch.device, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
) -> bool:
    """Whether the kernel gives the plain path's bits, on every width of code under every kind of zero point."""
    generator = torch.Generator().manual_seed(0)
    for bits in (2, 4, 8):
        top = 1 << bits
        # Drawn on the CPU in fixed types, whatever the defaults of the moment.
        codes = torch.randint(0, top, (3, 1216), generator=generator, dtype=torch.uint8, device="cpu")
        scales = torch.rand(3, 38, generator=generator, dtype=torch.float32, device="cpu").half()
        whole = torch.randint(0, top, (3, 38), generator=generator, dtype=torch.uint8, device="cpu")
        broken = torch.rand(3, 38, generator=generator, dtype=torch.float32, device="cpu") * top
        cases = ((pack(whole, bits), whole), (broken, broken), (None, torch.full_like(whole, top >> 1)))
        for stored, zeros in cases:
            for dtype in dtypes:
                expected = dequantize(codes, scales, zeros, 32).to(dtype)[:, :1201]
                given = pack(codes, bits).to(device), scales.to(device), None if stored is None else stored.to(device)
                found = _call(*given, bits, 32, 1201, dtype)
                if not torch.equal(found.cpu(), expected):
                    logger.warning("the Triton kernel for %d-bit weights disagrees with torch on %s", bits, device)
                    return False
    return True


__all__ = ["agrees", "dequantize_rows"]
