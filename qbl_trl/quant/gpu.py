"""Codes to weights in the product's own dtype, or to a product with a few tokens, in one pass on a CUDA or ROCm device,
where Triton is installed.

Plain torch takes seven passes over the same memory, in float32, and a generating model pays them for every token. The
kernels are used only after they gave the plain path's bits on a sample of every kind of layer; otherwise everything
works as before, slower. QBL_TRL_NATIVE=0 turns them off.
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
_MOST_TOKENS = 4  # each reads the codes again; above, writing the weights out for a matrix product is faster
_ROWS, _BYTES = 2, 256  # outputs of one program, which is one warp, and the bytes of each that it reads at once
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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
    if not _fits(codes, zeros, bits, group_size, dtype):
        return None
    with torch.cuda.device(codes.device):
        return _dequantize(codes, scales, zeros, bits, group_size, columns, dtype)


def multiply(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, out: Tensor
) -> bool:
    """x W^T for a few tokens, without W in memory; its weights are those of `dequantize_rows`, summed in float32.

    Args:
        x: (T, K) float.
        codes, scales, zeros: as for `dequantize_rows`.
        out: (T, N) in the dtype of x, contiguous; where the product goes.

    Returns:
        Whether it was done. It is not where a matrix product is faster or has to do it; `out` is then untouched.
    """
    if not 0 < len(x) <= _MOST_TOKENS or x.device != codes.device or x.dtype != out.dtype or not out.is_contiguous():
        return False
    if not _fits(codes, zeros, bits, group_size, x.dtype):
        return False
    with torch.cuda.device(codes.device):
        _multiply(x, codes, scales, zeros, bits, group_size, out)
    return True


def _fits(codes: Tensor, zeros: Tensor | None, bits: int, group_size: int, dtype: torch.dtype) -> bool:
    if codes.device.type != "cuda" or torch.compiler.is_compiling() or type(codes) is not Tensor:
        return False
    return dtype in _DTYPES and _usable(codes.device.index or 0, bits, group_size, _kind(zeros), dtype)


def _dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, columns: int, dtype: torch.dtype
) -> Tensor:
    from qbl_trl.quant.triton_kernel import dequantize_kernel

    stored = _stored(codes, scales, zeros)
    out = torch.empty(len(codes), columns, dtype=dtype, device=codes.device)
    dequantize_kernel[(len(codes), -(-columns // _BLOCK))](
        *(*stored, out, columns, *(tensor.shape[1] for tensor in stored)),
        BITS=bits,
        GROUP=group_size,
        ZEROS=_kind(zeros),
        BLOCK=_BLOCK,
    )
    return out


def _multiply(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, out: Tensor
) -> None:
    from qbl_trl.quant.triton_kernel import multiply_kernel

    stored = _stored(codes, scales, zeros)
    multiply_kernel[(-(-len(codes) // _ROWS), len(x))](
        *(x.contiguous(), *stored, out, len(codes), x.shape[1], *(tensor.shape[1] for tensor in stored)),
        BITS=bits,
        GROUP=group_size,
        ZEROS=_kind(zeros),
        ROWS=_ROWS,
        GROUPS=max(_BYTES * 8 // bits // group_size, 1),
        num_warps=1,
    )


def _stored(codes: Tensor, scales: Tensor, zeros: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """What a kernel reads, contiguous; codes stand in for zero points that are not stored."""
    codes = codes.contiguous()
    return codes, scales.contiguous(), codes if zeros is None else zeros.contiguous()


def _kind(zeros: Tensor | None) -> int:
    """Of zero points, as the kernels tell them apart: in the middle, packed codes, floats."""
    return 0 if zeros is None else 2 if zeros.is_floating_point() else 1


@functools.cache
def _usable(device: int, bits: int, group_size: int, kind: int, dtype: torch.dtype) -> bool:
    """Whether the kernels run on this device and agree; asked once per process for what its layers are."""
    if os.environ.get("QBL_TRL_NATIVE") == "0" or importlib.util.find_spec("triton") is None:
        return False
    try:
        with torch.cuda.device(device):
            same = agrees(torch.device("cuda", device), bits, group_size, kind, dtype)
    except Exception as error:  # a compiler's failures have no common class, and the plain path is always there
        logger.info("packed weights are unpacked by plain torch, a few times slower: %s", error)
        return False
    if not same:
        logger.warning(
            "the Triton kernels for %d-bit weights in %s disagree with torch on cuda:%d", bits, dtype, device
        )
    return same


def agrees(device: torch.device, bits: int, group_size: int, kind: int, dtype: torch.dtype) -> bool:
    """Whether the kernels give the plain path's bits on a sample.

    Products are asked for on whole numbers and scales that are powers of two: no order of summation rounds them.
    """
    generator = torch.Generator().manual_seed(0)
    top, columns = 1 << bits, 1201  # the last group is ragged
    groups = -(-columns // group_size)
    # Drawn on the CPU in fixed types, whatever the defaults of the moment.
    codes = torch.randint(0, top, (5, groups * group_size), generator=generator, dtype=torch.uint8, device="cpu")
    scales = torch.rand(5, groups, generator=generator, dtype=torch.float32, device="cpu").half()
    powers = torch.exp2(torch.randint(-8, -3, (5, groups), generator=generator, device="cpu").float())
    x = torch.randint(-9, 9, (2, columns), generator=generator, device="cpu")
    whole = torch.randint(0, top, (5, groups), generator=generator, dtype=torch.uint8, device="cpu")
    whole = torch.full_like(whole, top >> 1) if kind == 0 else whole
    zeros = torch.rand(5, groups, generator=generator, dtype=torch.float32, device="cpu") * top if kind == 2 else whole

    def held(points: Tensor) -> Tensor | None:
        return None if kind == 0 else (pack(points, bits) if kind == 1 else points.float()).to(device)

    packed = pack(codes, bits).to(device)
    weight = _dequantize(packed, scales.to(device), held(zeros), bits, group_size, columns, dtype)
    product = torch.empty(2, 5, dtype=dtype, device=device)
    _multiply(x.to(device, dtype), packed, powers.to(device), held(whole), bits, group_size, product)
    sums = x.float() @ dequantize(codes, powers, whole, group_size)[:, :columns].T
    same = torch.equal(weight.cpu(), dequantize(codes, scales, zeros, group_size).to(dtype)[:, :columns])
    return same and torch.equal(product.cpu(), sums.to(dtype))
