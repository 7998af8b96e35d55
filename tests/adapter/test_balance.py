"""Ranks and scales: what compression saves is spent on rank, exactly as `balance.py` says."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qbl_trl.adapter.balance import fitting_factors, largest_useful_r, matched_rank, pool_scale
from qbl_trl.errors import ConfigError

# hidden size, MLP size, key and value size
MODELS = {
    "SmolLM2-135M": (576, 1536, 192),
    "Qwen2.5-0.5B": (896, 4864, 128),
    "TinyLlama-1.1B": (2048, 5632, 256),
    "Llama-3.2-1B": (2048, 8192, 512),
    "SmolLM2-1.7B": (2048, 8192, 2048),
    "Llama-2-7B": (4096, 11008, 4096),
    "Llama-3-8B": (4096, 14336, 1024),
    "K=4096 N=11008": (4096, 11008, 1024),
}


def block_shapes(hidden: int, mlp: int, kv: int) -> list[tuple[int, int]]:
    return [(hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden), (hidden, mlp), (hidden, mlp), (mlp, hidden)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("r", [16, 64])
@pytest.mark.parametrize(("p", "e"), [(2, 2), (4, 8), (32, 1), (32, 2), (32, 4)])
def test_a_decoder_layer_has_the_parameters_of_lora_within_one_percent(name, r, p, e):
    shapes = block_shapes(*MODELS[name])
    lora = sum(r * (k + n) for k, n in shapes)
    ours = sum(matched_rank(r, k, n, p, e) * (k // p + n // e) for k, n in shapes)
    assert abs(ours / lora - 1) <= 0.01


@given(
    r=st.integers(1, 128), p=st.sampled_from([1, 2, 4, 32]), e=st.sampled_from([1, 2, 4]),
    columns=st.integers(1, 64), rows=st.integers(1, 64),
)  # fmt: skip
def test_no_other_rank_is_nearer_to_loras_parameters(r, p, e, columns, rows):
    k, n = columns * p, rows * e
    rank, unit = matched_rank(r, k, n, p, e), columns + rows
    assert abs(rank * unit - r * (k + n)) <= unit / 2


@given(r=st.integers(1, 64), c=st.sampled_from([1, 2, 4]), columns=st.integers(1, 32), rows=st.integers(1, 32))
def test_equal_factors_multiply_the_rank(r, c, columns, rows):
    assert matched_rank(r, columns * c, rows * c, c, c) == c * r


@given(
    p=st.sampled_from([1, 2, 4, 32]), e=st.sampled_from([1, 2, 4]), columns=st.integers(1, 64), rows=st.integers(1, 64)
)
def test_the_largest_useful_r_buys_full_rank_and_no_more(p, e, columns, rows):
    k, n = columns * p, rows * e
    most = largest_useful_r(k, n, p, e)
    assert most * (k + n) == pytest.approx(min(columns, rows) * (columns + rows))
    if most >= 1:
        assert matched_rank(int(most), k, n, p, e) <= min(columns, rows) <= matched_rank(int(most) + 1, k, n, p, e)


def test_rms_pooling_keeps_the_variance_of_uncorrelated_inputs_whatever_the_factor():
    x = torch.randn(20000, 64, dtype=torch.float64)
    for p in (2, 8, 32):
        pooled = x.unflatten(-1, (-1, p)).sum(-1) * pool_scale("rms", p)
        assert float(pooled.var()) == pytest.approx(1, abs=0.03)  # sampling error of 20000 * 64 / p values


def test_mean_and_sum_are_the_published_scale_and_none():
    assert pool_scale("mean", 8) == 1 / 8
    assert pool_scale("rms", 8) == 1 / math.sqrt(8)
    assert pool_scale("sum", 8) == 1


def test_an_unknown_pooling_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"pooling='max' is not known; allowed: mean, rms, sum"):
        pool_scale("max", 2)


@given(features=st.integers(1, 400), unit=st.integers(1, 40))
def test_fitting_factors_are_exactly_the_divisors_that_are_multiples(features, unit):
    naive = [f for f in range(1, features + 1) if features % f == 0 and f % unit == 0]
    assert fitting_factors(features, unit) == naive
