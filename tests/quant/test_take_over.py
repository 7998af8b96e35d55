"""A loaded layer of another library becomes ours with the same codes, or is refused because it computes otherwise.

The layers here are stand-ins: the tensors of the format, and the product with what they stand for. The libraries'
own are in tests/adapter/test_bases.py and integration/test_importers.py.
"""

import pytest
import torch
from torch import nn

from qbl_trl.errors import CheckpointError
from qbl_trl.quant.affine import dequantize
from qbl_trl.quant.importers import take_over
from tests.quant.foreign import GROUP, awq_tensors, gptq_tensors, hqq_tensors, random_affine

K, N = 128, 64


class Kernel(nn.Module):
    """A layer of another library: its tensors as buffers, its product in float16 or float32."""

    def __init__(self, tensors, affine, *, zero_format=1):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", torch.randn(N).to(affine.scales.dtype))
        self.compute_dtype = affine.scales.dtype
        if "group_size" not in tensors:  # HQQ says it there
            self.bits, self.group_size, self.sym = 4, GROUP, False
        self.qzero_format = lambda: zero_format
        self.product = dequantize(*affine, GROUP)

    def forward(self, x):
        return x @ self.product.T.to(x.dtype) + self.bias


def hqq():
    affine = random_affine(N, K, 4, 0, zeros="float", dtype=torch.float32)
    return affine, hqq_tensors(affine, 4)


def gptq(v1=True):
    affine = random_affine(N, K, 4, 0)
    return affine, gptq_tensors(affine, 4, v1=v1)


def awq():
    affine = random_affine(N, K, 4, 0)
    return affine, awq_tensors(affine)


@pytest.mark.parametrize(
    ("kind", "made", "zero_format"),
    [("hqq", hqq(), 1), ("awq", awq(), 1), ("gptq", gptq(v1=True), 1), ("gptq", gptq(v1=False), 2)],
)
def test_codes_scales_zeros_and_bias_are_the_layers_own(kind, made, zero_format):
    affine, tensors = made
    layer = Kernel(tensors, affine, zero_format=zero_format)
    ours = take_over(layer, kind, "model.q_proj")
    assert torch.equal(ours.affine().codes, affine.codes)
    assert torch.equal(ours.scales, affine.scales)
    assert torch.equal(ours.zero_points().float(), affine.zeros.float())
    assert torch.equal(ours.bias, layer.bias)


def test_a_kernel_that_keeps_another_layout_is_refused_by_what_it_computes():
    affine, tensors = gptq()
    layer = Kernel(tensors | {"qweight": tensors["qweight"].flip(0)}, affine)
    with pytest.raises(CheckpointError, match=r"model\.q_proj: read code for code.*quantize --from"):
        take_over(layer, "gptq", "model.q_proj")


def test_a_kernel_that_dropped_its_tensors_is_refused_by_name():
    affine, tensors = gptq()
    layer = Kernel({"scales": tensors["scales"]}, affine)
    with pytest.raises(CheckpointError, match=r"model\.q_proj: the codes of this gptq layer cannot be taken over"):
        take_over(layer, "gptq", "model.q_proj")


def test_scattered_groups_are_refused():
    affine, _ = gptq()
    layer = Kernel(gptq_tensors(affine, 4, act_order=True), affine)
    with pytest.raises(CheckpointError, match="desc_act=true"):
        take_over(layer, "gptq", "model.q_proj")
