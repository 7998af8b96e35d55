"""The kernel of `qbl_trl.quant.gpu`: s (q - z), one program for a block of columns of one row. Imports triton."""
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def dequantize_kernel(
    codes,  # (N, row_bytes) uint8, packed along K, the first code in the lowest bits
    scales,  # (N, groups) float
    zeros,  # (N, zero_columns): packed uint8, or float; not read where ZEROS is 0
    out,  # (N, columns) float
    columns,
    row_bytes,
    groups,
    zero_columns,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,  # 0: all in the middle, 1: packed codes, 2: floats
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = k < columns
    mask = (1 << BITS) - 1
    byte = tl.load(codes + row * row_bytes + k * BITS // 8, mask=inside, other=0).to(tl.int32)
    q = ((byte >> (k * BITS % 8)) & mask).to(tl.float32)
    j = k // GROUP
    s = tl.load(scales + row * groups + j, mask=inside, other=0).to(tl.float32)
    if ZEROS == 0:
        z = tl.full((BLOCK,), 1 << (BITS - 1), tl.float32)
    elif ZEROS == 1:
        packed = tl.load(zeros + row * zero_columns + j * BITS // 8, mask=inside, other=0).to(tl.int32)
        z = ((packed >> (j * BITS % 8)) & mask).to(tl.float32)
    else:
        z = tl.load(zeros + row * zero_columns + j, mask=inside, other=0).to(tl.float32)
    tl.store(out + row * columns + k, ((q - z) * s).to(out.dtype.element_ty), mask=inside)
