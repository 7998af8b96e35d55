import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qbl_trl.errors import ConfigError
from qbl_trl.quant.affine import Affine, dequantize, min_max, to_groups
from qbl_trl.quant.algorithms import clip_search, half_quadratic, quantize

DEFAULTS = {"bits": 4, "group_size": 32, "symmetric": False}


def heavy_tailed(rows=6, columns=96, seed=0):
    """Weights with a few large ones in every group, as real layers have them."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    return weight * (1 + 6 * (torch.rand(rows, columns, generator=generator) > 0.97))


def group_errors(affine: Affine, weight, group_size, norm=2.0):
    wrong = (dequantize(*affine, group_size) - weight).abs().pow(norm)
    filled = torch.nn.functional.pad(wrong, (0, -wrong.shape[1] % group_size))
    return filled.unflatten(1, (-1, group_size)).sum(-1)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([2, 4, 8]),
    st.sampled_from([16, 32, 64]),
    st.booleans(),
    st.sampled_from(["rtn", "mse", "hqq"]),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    st.integers(17, 130),
)
def test_codes_are_the_nearest_ones_for_what_is_stored(bits, group_size, symmetric, algorithm, dtype, columns):
    if algorithm == "hqq" and symmetric:
        return
    weight = heavy_tailed(3, columns)
    codes, scales, zeros = quantize(
        weight, bits=bits, group_size=group_size, symmetric=symmetric, algorithm=algorithm, scale_dtype=dtype
    )
    groups = -(-columns // group_size)
    assert codes.shape == weight.shape
    assert codes.dtype == torch.uint8
    assert scales.shape == zeros.shape == (3, groups)
    assert scales.dtype == dtype
    assert zeros.is_floating_point() == (algorithm == "hqq")
    assert int(codes.max()) < 1 << bits
    for row in range(3):
        for column in range(columns):
            s, z = scales[row, column // group_size].float(), zeros[row, column // group_size].float()
            candidates = (s * (torch.arange(1 << bits) - z) - weight[row, column]).abs()
            chosen = candidates[int(codes[row, column])]
            assert chosen <= candidates.min() + 1e-6 * s.abs() * (1 << bits)  # ties, and float32 rounding of w / s + z


def test_rtn_is_the_range_of_each_group():
    weight = heavy_tailed()
    for given_, expected in zip(
        quantize(weight, **DEFAULTS), min_max(weight, 32, 4, False, torch.float16), strict=True
    ):
        assert torch.equal(given_, expected)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_the_clip_search_is_nowhere_worse_than_the_range_and_much_better_in_sum(bits, symmetric):
    weight = heavy_tailed(32, 256)
    settings_ = {"bits": bits, "group_size": 64, "symmetric": symmetric}
    rtn = group_errors(quantize(weight, **settings_), weight, 64)
    mse = group_errors(quantize(weight, **settings_, algorithm="mse"), weight, 64)
    assert (mse <= rtn * (1 + 1e-5)).all()  # float32 sums of squares
    assert mse.sum() < 0.95 * rtn.sum()


def test_the_quick_search_lies_between_the_range_and_the_whole_search():
    grouped = to_groups(heavy_tailed(32, 256), 64)
    settings_ = {"bits": 4, "symmetric": False, "scale_dtype": torch.float16}

    def errors(scales, zeros):
        codes = (grouped / scales[..., None] + zeros[..., None]).round().clamp(0, 15)
        return (scales[..., None] * (codes - zeros[..., None]) - grouped).square().sum(-1)

    plain = min_max(grouped.flatten(1), 64, 4, False, torch.float16)
    by_range = errors(plain.scales.float(), plain.zeros.float())
    quick, whole = errors(*clip_search(grouped, **settings_, quick=True)), errors(*clip_search(grouped, **settings_))
    assert (quick <= by_range * (1 + 1e-5)).all()
    assert whole.sum() <= quick.sum() < 0.97 * by_range.sum()


def test_the_clip_search_finds_what_a_dense_search_of_the_scale_finds():
    grouped = to_groups(heavy_tailed(4, 64, seed=3), 64)
    scales, _zeros = clip_search(grouped, bits=4, symmetric=True, scale_dtype=torch.float32)
    for row in range(4):
        w = grouped[row, 0]
        grid = torch.linspace(-1, 1, 4001)[:, None] * w.abs().max() / 8
        grid = grid[grid[:, 0].abs() > 1e-6]
        errors = ((w / grid).round().clamp(-8, 7) * grid - w).square().sum(1)
        own = ((w / scales[row]).round().clamp(-8, 7) * scales[row] - w).square().sum()
        assert own <= errors.min() * 1.15  # 24 candidates and a least-squares fit, against 4000 candidates


def test_importance_moves_the_search_towards_the_weights_that_count():
    grouped = to_groups(heavy_tailed(16, 32, seed=5), 32)
    importance = torch.where(torch.arange(32) < 4, 100.0, 1.0)

    def weighted_error(scales, zeros):
        codes = (grouped / scales[..., None] + zeros[..., None]).round().clamp(0, 3)
        return ((scales[..., None] * (codes - zeros[..., None]) - grouped).square() * importance).sum()

    settings_ = {"bits": 2, "symmetric": False, "scale_dtype": torch.float32}
    aware = weighted_error(*clip_search(grouped, **settings_, importance=importance))
    assert aware < 0.8 * weighted_error(*clip_search(grouped, **settings_))


def test_hqq_recovers_a_lattice_with_fractional_zero_points():
    codes = torch.randint(0, 16, (4, 64), dtype=torch.uint8)
    codes[:, ::32], codes[:, 1::32] = 0, 15  # the range is used in full
    scales, zeros = torch.rand(4, 2).half() + 0.5, torch.rand(4, 2) * 15
    weight = dequantize(codes, scales, zeros, 32)
    found = quantize(weight, **DEFAULTS, algorithm="hqq", scale_dtype=torch.float32)
    assert torch.equal(found.codes, codes)
    torch.testing.assert_close(dequantize(*found, 32), weight, rtol=0, atol=1e-5)  # float32 of numbers near 16


def test_hqq_lowers_the_error_norm_that_it_is_named_for():
    weight = heavy_tailed(32, 256, seed=1)
    settings_ = {"group_size": 64, "bits": 4, "scale_dtype": torch.float32}
    start = half_quadratic(weight, **settings_, steps=1)
    end = half_quadratic(weight, **settings_)
    assert group_errors(end, weight, 64, 0.7).sum() < group_errors(start, weight, 64, 0.7).sum()


@pytest.mark.parametrize("algorithm", ["rtn", "mse", "hqq"])
def test_rows_do_not_see_each_other_and_blocks_of_rows_change_nothing(algorithm, monkeypatch):
    weight = heavy_tailed(10, 64)
    whole = quantize(weight, **DEFAULTS, algorithm=algorithm)
    monkeypatch.setattr("qbl_trl.quant.algorithms._BLOCK_WEIGHTS", 64 * 3)
    for one, other in zip(quantize(weight, **DEFAULTS, algorithm=algorithm), whole, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("algorithm", ["rtn", "mse", "hqq"])
@pytest.mark.parametrize("value", [0.0, 0.25, -0.25])
def test_a_constant_group_survives(algorithm, value):
    weight = torch.full((2, 32), value)
    found = quantize(weight, **DEFAULTS, algorithm=algorithm)
    torch.testing.assert_close(dequantize(*found, 32), weight, rtol=1e-3, atol=0)  # float16 scales


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "awq"}, "algorithm='awq' is not known"),
        ({"algorithm": "hqq", "symmetric": True}, 'use symmetric=False, or algorithm="mse"'),
        ({"algorithm": "gptq"}, "needs the hessian"),
        ({"hessian": torch.eye(64)}, "does not use one"),
        ({"bits": 3}, "bits=3"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        quantize(torch.randn(2, 64), **{**DEFAULTS, **changes})


@pytest.mark.parametrize("algorithm", ["rtn", "mse", "hqq"])
def test_weights_that_are_not_finite_are_refused(algorithm):
    weight = torch.ones(2, 64)
    weight[1, 3] = torch.inf
    with pytest.raises(ConfigError, match="NaN or infinite"):
        quantize(weight, **DEFAULTS, algorithm=algorithm)


def test_a_weight_that_is_no_float_matrix_is_refused():
    with pytest.raises(ConfigError, match="give an \\(N, K\\) float matrix"):
        quantize(torch.ones(64), **DEFAULTS)


@pytest.mark.parametrize("algorithm", ["rtn", "mse", "hqq"])
def test_a_narrow_group_far_from_zero_keeps_its_weights(algorithm):
    weight = 1 + 1e-5 * torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    made = quantize(weight, bits=4, group_size=32, symmetric=False, algorithm=algorithm)
    # a step of the range from 0 to 1 is 1/15, and float16 rounds it
    torch.testing.assert_close(dequantize(*made, 32), weight, rtol=0, atol=1e-3)


@pytest.mark.parametrize("algorithm", ["rtn", "mse", "hqq"])
def test_a_scale_beyond_its_type_is_refused(algorithm):
    weight = torch.zeros(2, 32)
    weight[0, 0] = 2e6
    with pytest.raises(ConfigError, match="beyond float16"):
        quantize(weight, bits=4, group_size=32, symmetric=False, algorithm=algorithm)


@pytest.mark.parametrize("algorithm", ["rtn", "mse", "hqq", "gptq"])
def test_a_matrix_too_small_for_its_scales_is_refused_and_fits_a_wider_type(algorithm):
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * 1e-8
    hessian = torch.eye(64) if algorithm == "gptq" else None
    settings = {**DEFAULTS, "algorithm": algorithm, "hessian": hessian}
    with pytest.raises(ConfigError, match=r"weights of at most .*e-08 have no scales of 4 bits in float16; set"):
        quantize(weight, **settings)
    found = dequantize(*quantize(weight, **settings, scale_dtype=torch.bfloat16), 32)
    assert (found - weight).norm() < 0.1 * weight.norm()  # a step is a fifteenth of the range
    weight[0] = 1.0  # beside larger weights, small ones may vanish
    quantize(weight, **settings)
    quantize(torch.zeros(8, 64), **settings)
