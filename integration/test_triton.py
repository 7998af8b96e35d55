"""The Triton kernels against plain torch, in Triton's interpreter, and compiled for devices that are not there.

    pip install triton; python -m pytest integration/test_triton.py

No GPU is needed, and none is tested. The interpreter cuts float32 to bfloat16 where devices round, so bfloat16 is left
to the check that the package makes on the device itself before it uses the kernels.
"""

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="pip install triton")

CHECK = """
import itertools
import torch
from qbl_trl.quant import gpu
from qbl_trl.quant.affine import Affine, dequantize
from qbl_trl.quant.linear import GroupQuantLinear
KINDS = itertools.product((2, 4, 8), (16, 32, 256), (0, 1, 2), (torch.float32, torch.float16))
for kind in KINDS:
    assert gpu.agrees(torch.device("cpu"), *kind), kind

# and as a layer calls them: rows from the middle, columns that end inside a group, ragged zero points
for zeros in (torch.randint(0, 16, (96, 33), dtype=torch.uint8), torch.rand(96, 33)):
    affine = Affine(torch.randint(0, 16, (96, 1050), dtype=torch.uint8), torch.rand(96, 33), zeros)
    layer = GroupQuantLinear.from_affine(affine, bits=4, group_size=32)
    stored = layer.weight.data[7:50], layer.scales[7:50], layer.zeros[7:50]
    found = gpu._dequantize(*stored, 4, 32, 1050, torch.float32)
    assert torch.equal(found, layer.dequantize_rows(slice(7, 50)))

# a product is the sum of the same weights, to the rounding of its sums and of its type
CASES = (4, 32, 1050, 0), (4, 16, 96, 1), (4, 128, 3000, 2), (2, 256, 4096, 1), (8, 32, 90, 2)
for bits, size, columns, kind in CASES:
    groups, top = -(-columns // size), 1 << bits
    zeros = {0: torch.full((13, groups), top // 2, dtype=torch.uint8),
             1: torch.randint(0, top, (13, groups), dtype=torch.uint8), 2: torch.rand(13, groups) * top}[kind]
    affine = Affine(torch.randint(0, top, (13, columns), dtype=torch.uint8), torch.rand(13, groups).half(), zeros)
    layer = GroupQuantLinear.from_affine(affine, bits=bits, group_size=size, symmetric=kind == 0)
    for dtype, step in ((torch.float32, 0), (torch.float16, 2**-11)):
        x, found = torch.randn(3, columns).to(dtype), torch.full((3, 13), torch.nan, dtype=dtype)
        gpu._multiply(x, *layer.stored, bits, size, found)
        weight = dequantize(*affine, size).to(dtype).double()
        exact, whole = x.double() @ weight.T, x.double().abs() @ weight.abs().T
        assert ((found - exact).abs() <= whole * (columns / 256 + 16) * 2**-24 + exact.abs() * step).all()
"""

COMPILE = """
import itertools
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from qbl_trl.quant.triton_kernel import dequantize_kernel, multiply_kernel
DEVICES = [("cuda", 75, 32), ("cuda", 80, 32), ("cuda", 90, 32), ("cuda", 100, 32), ("hip", "gfx942", 64)]
KINDS = [*itertools.product(DEVICES, (2, 4, 8), (32,), (0, 1, 2), ("fp32", "fp16", "bf16"))]
KINDS += itertools.product(DEVICES[1:3], (2, 4, 8), (16, 64, 128, 256), (1,), ("bf16",))
for device, bits, group, kind, dtype in KINDS:
    fixed = {"BITS": bits, "GROUP": group, "ZEROS": kind}
    stored = ["*u8", "*fp16", "*fp32" if kind == 2 else "*u8"]
    for kernel, kinds, sizes, warps in (
        (dequantize_kernel, [*stored, "*" + dtype], {"BLOCK": 1024}, 4),
        (multiply_kernel, ["*" + dtype, *stored, "*" + dtype], {"ROWS": 2, "GROUPS": max(2048 // bits // group, 1)}, 1),
    ):
        constants = fixed | sizes
        names = [name for name in kernel.arg_names if name not in constants]
        kinds = kinds + ["i32"] * (len(names) - len(kinds))
        signature = dict(zip(names, kinds)) | dict.fromkeys(constants, "constexpr")
        source, options = ASTSource(kernel, signature, constants), {"num_warps": warps}
        made = triton.compile(source, target=GPUTarget(*device), options=options)
        assert made.asm["cubin" if device[0] == "cuda" else "hsaco"]
"""


def runs(script, **environment):
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_kernels_give_the_bits_of_the_plain_path():
    runs(CHECK, TRITON_INTERPRET="1")


def test_the_kernels_compile_for_devices_that_people_have(tmp_path):
    runs(COMPILE, TRITON_CACHE_DIR=str(tmp_path))
