"""Folding a block delta into zero points, and adding deltas of different blocks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qbl_trl.errors import FoldError
from qbl_trl.quant.affine import dequantize
from qbl_trl.quant.blocks import add_deltas, fold


@given(g=st.sampled_from([16, 32]), blocks=st.integers(1, 3), per_block=st.integers(1, 3), e=st.integers(1, 3))
def test_folding_equals_adding_the_delta_to_every_weight(g, blocks, per_block, e):
    p, groups, n = g * per_block, blocks * per_block, 2 * e
    codes = torch.randint(0, 16, (n, g * groups), dtype=torch.uint8)
    scales, zeros = torch.rand(n, groups) + 0.5, torch.rand(n, groups) * 15
    delta = torch.randn(2, blocks)
    weight = dequantize(codes, scales, zeros, g)
    expected = torch.empty_like(weight)
    for row in range(n):
        for column in range(g * groups):
            expected[row, column] = weight[row, column] + delta[row // e, column // p]
    folded = dequantize(codes, scales, fold(zeros, scales, delta, p, e, g), g)
    torch.testing.assert_close(folded, expected, rtol=0, atol=2e-5)  # float32 rounding of values below 30


def test_a_delta_that_varies_inside_a_group_is_refused():
    with pytest.raises(FoldError, match="in_factor=48 varies inside groups of 32"):
        fold(torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(2, 2), 48, 1, 32)


def test_shapes_that_do_not_describe_one_layer_are_refused():
    with pytest.raises(FoldError, match=r"do not describe one layer"):
        fold(torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(2, 2), 32, 1, 32)


@given(
    p=st.tuples(st.sampled_from([1, 2, 3, 4, 6]), st.sampled_from([1, 2, 3, 4, 6])),
    e=st.tuples(st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 3])),
)
def test_deltas_of_different_blocks_add_up_weight_by_weight(p, e):
    first, second = torch.randn(6 // e[0], 12 // p[0]), torch.randn(6 // e[1], 12 // p[1])
    total, factors = add_deltas(first, (p[0], e[0]), second, (p[1], e[1]))
    for n in range(6):
        for k in range(12):
            expected = first[n // e[0], k // p[0]] + second[n // e[1], k // p[1]]
            assert total[n // factors[1], k // factors[0]] == expected
