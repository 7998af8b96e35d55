"""The kernels of `qbl_trl.quant.gpu`: s (q - z) written out, or summed with a token at once. Imports triton."""
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def zero_points(row, j, inside, scales, BITS: tl.constexpr, ZEROS: tl.constexpr):
    """Float32, one for each scale: all in the middle (0), packed codes (1) or floats (2) of groups j of `row`."""
    if ZEROS == 0:
        z = tl.zeros_like(scales) + (1 << (BITS - 1))
    elif ZEROS == 1:
        packed = tl.load(row + j * BITS // 8, mask=inside, other=0).to(tl.int32)
        z = ((packed >> (j * BITS % 8)) & ((1 << BITS) - 1)).to(tl.float32)
    else:
        z = tl.load(row + j, mask=inside, other=0).to(tl.float32)
    return z


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
    ZEROS: tl.constexpr,  # see `zero_points`
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
    z = zero_points(zeros + row * zero_columns, j, inside, s, BITS, ZEROS)
    tl.store(out + row * columns + k, ((q - z) * s).to(out.dtype.element_ty), mask=inside)


@triton.jit
def multiply_kernel(
    x,  # (T, columns) float
    codes,  # (N, row_bytes) uint8, packed along K, the first code in the lowest bits
    scales,  # (N, groups) float
    zeros,  # (N, zero_columns): packed uint8, or float; not read where ZEROS is 0
    out,  # (T, N) float
    rows,
    columns,
    row_bytes,
    groups,
    zero_columns,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,  # see `zero_points`
    ROWS: tl.constexpr,  # outputs of one program
    GROUPS: tl.constexpr,  # groups of each that are read at once
):
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1).to(tl.int64)
    asked = (n < rows)[:, None]
    per_byte: tl.constexpr = 8 // BITS
    width: tl.constexpr = GROUP // per_byte  # bytes of a group
    mask: tl.constexpr = (1 << BITS) - 1
    sums = tl.zeros((ROWS, GROUPS, width), tl.float32)
    for first in range(0, groups, GROUPS):
        j = first + tl.arange(0, GROUPS)
        inside = j < groups
        known = asked & inside[None, :]
        s = tl.load(scales + n[:, None] * groups + j[None, :], mask=known, other=0).to(tl.float32)
        z = zero_points(zeros + n[:, None] * zero_columns, j[None, :], known, s, BITS, ZEROS)
        byte = j[:, None] * width + tl.arange(0, width)[None, :]
        read = n[:, None, None] * row_bytes + byte[None, :, :]
        stored = tl.load(codes + read, mask=known[:, :, None], other=0).to(tl.int32)
        for i in tl.static_range(per_byte):
            q = ((stored >> (BITS * i)) & mask).to(tl.float32)
            weight = ((q - z[:, :, None]) * s[:, :, None]).to(x.dtype.element_ty)
            k = byte * per_byte + i
            value = tl.load(x + token * columns + k, mask=inside[:, None] & (k < columns), other=0)
            sums += weight.to(tl.float32) * value.to(tl.float32)[None, :, :]
    found = tl.sum(tl.sum(sums, 2), 1)
    tl.store(out + token * rows + n, found.to(out.dtype.element_ty), mask=n < rows)
