import pytest
import torch

from qbl_trl.errors import ConfigError
from qbl_trl.quant.affine import dequantize, encode, min_max


def naive_dequantize(codes, scales, zeros, group_size):
    weight = torch.empty(codes.shape, dtype=torch.float64)
    for n in range(codes.shape[0]):
        for k in range(codes.shape[1]):
            j = k // group_size
            weight[n, k] = scales[n, j].double() * (int(codes[n, k]) - zeros[n, j].double())
    return weight


@pytest.mark.parametrize("in_features", [64, 72])  # 72: the last group is ragged
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_dequantize_equals_the_naive_loop(bits, in_features):
    affine = min_max(torch.randn(6, in_features), 32, bits, False, torch.float16)
    expected = naive_dequantize(*affine, 32)
    # scales hold 11 bits, code differences 8: the product of integers fits float32, so there is nothing to round
    torch.testing.assert_close(dequantize(*affine, 32).double(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_weight_is_within_half_a_step_of_its_code(bits, symmetric):
    weight = torch.randn(16, 64)
    affine = min_max(weight, 32, bits, symmetric, torch.float32)
    error = (dequantize(*affine, 32) - weight).abs().unflatten(-1, (2, 32))
    step = affine.scales.abs().unsqueeze(-1)
    # the zero point is rounded too, and the signed range of a symmetric group lacks one code on one side
    assert (error <= step * (1.0 + 1e-5)).all()
    assert error.mean() < 0.3 * step.mean()


def test_no_other_codes_are_closer():
    weight = torch.randn(4, 32)
    codes, scales, zeros = min_max(weight, 16, 2, False, torch.float16)
    chosen = (dequantize(codes, scales, zeros, 16) - weight).abs()
    for value in range(4):
        other = (dequantize(torch.full_like(codes, value), scales, zeros, 16) - weight).abs()
        assert (chosen <= other + 1e-6).all()


def test_zero_stays_zero():
    weight = torch.randn(4, 64)
    weight[:, ::3] = 0
    weight[2] = 0
    dense = dequantize(*min_max(weight, 32, 4, False, torch.float16), 32)
    assert (dense[weight == 0] == 0).all()


def test_codes_on_a_grid_come_back_bit_for_bit():
    codes = torch.randint(0, 16, (8, 64), dtype=torch.uint8)
    scales, zeros = torch.rand(8, 2).half() + 0.1, torch.randint(0, 16, (8, 2))
    assert torch.equal(encode(dequantize(codes, scales, zeros, 32), scales, zeros, 32, 4), codes)


def test_a_weight_that_is_not_finite_is_refused():
    weight = torch.randn(2, 32)
    weight[1, 3] = float("nan")
    with pytest.raises(ConfigError, match="NaN or infinite"):
        min_max(weight, 32, 4, False, torch.float16)
