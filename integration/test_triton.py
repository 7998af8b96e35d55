"""The Triton kernel against plain torch, in Triton's interpreter: no GPU is needed, and none is tested.

    pip install triton; python -m pytest integration/test_triton.py

The interpreter cuts float32 to bfloat16 where devices round, so bfloat16 is left to the check that the package makes
on the device itself before it uses the kernel.
"""

import importlib.util
import os
import subprocess
import sys

import pytest

CHECK = """
import torch
from qbl_trl.quant import gpu
from qbl_trl.quant.affine import Affine
from qbl_trl.quant.linear import GroupQuantLinear
assert gpu.agrees(torch.device("cpu"), (torch.float32, torch.float16))

# and as a layer calls it: rows from the middle, columns that end inside a group, ragged zero points
for zeros in (torch.randint(0, 16, (96, 33), dtype=torch.uint8), torch.rand(96, 33)):
    affine = Affine(torch.randint(0, 16, (96, 1050), dtype=torch.uint8), torch.rand(96, 33), zeros)
    layer = GroupQuantLinear.from_affine(affine, bits=4, group_size=32)
    stored = layer.weight.data[7:50], layer.scales[7:50], layer.zeros[7:50]
    found = gpu._call(*stored, 4, 32, 1050, torch.float32)
    assert torch.equal(found, layer.dequantize_rows(slice(7, 50)))
"""


def test_the_kernel_gives_the_bits_of_the_plain_path():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
