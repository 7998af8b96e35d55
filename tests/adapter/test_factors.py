"""Which factors a layer gets, and what is said when none fits."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qbl_trl import QBLoRAConfig
from qbl_trl.adapter.bases import Base
from qbl_trl.adapter.factors import choose_factors, record_factors_, recorded_factors
from qbl_trl.errors import ConfigError

NAME = "model.layers.3.mlp.down_proj"


def base(k=1536, n=576, group=32):
    return Base("group_quant", k, n, group)


def test_the_message_names_layer_value_allowed_and_the_way_out():
    with pytest.raises(ConfigError) as error:
        choose_factors(base(), QBLoRAConfig(in_factor=48, quantization_aware=True), NAME)
    assert str(error.value) == (
        "model.layers.3.mlp.down_proj: in_factor=48 does not divide in_features=1536 into whole quantization groups "
        "of 32. Allowed here: 32, 64, 96, 128, 192, 256, 384, 512, ...; "
        'set in_factor=32, or on_misfit="reduce" to use the largest that fits'
    )


def test_a_misfit_of_the_output_is_told_the_same_way():
    with pytest.raises(ConfigError, match=r"out_factor=5 does not divide out_features=576\. Allowed here: 1, 2, 3, 4"):
        choose_factors(base(), QBLoRAConfig(out_factor=5), NAME)


def test_a_layer_no_factor_fits_is_told_to_be_left_out():
    with pytest.raises(ConfigError, match=r"no factor does.*exclude_modules"):
        choose_factors(base(k=1000), QBLoRAConfig(quantization_aware=True), NAME)


def test_quantization_aware_over_a_base_without_groups_says_which_line_to_write():
    with pytest.raises(ConfigError, match=r"this one is float.*GroupQuantConfig\(bits=4, group_size=32\)"):
        choose_factors(Base("float", 64, 64), QBLoRAConfig(quantization_aware=True), NAME)


def test_quantization_aware_pools_by_the_group_of_the_layer():
    assert choose_factors(base(group=64), QBLoRAConfig(quantization_aware=True, out_factor=2), NAME) == (64, 2)


@given(k=st.integers(1, 300), n=st.integers(1, 5000), r=st.integers(1, 200))
def test_outputs_are_shared_by_default_only_where_rank_is_scarce(k, n, r):
    p, e = choose_factors(base(32 * k, n), QBLoRAConfig(r=r, quantization_aware=True), NAME)
    naive = r * (32 * k + n) / (k + n / 2)  # R of e = 2, before rounding
    assert p == 32
    assert e == (2 if n % 2 == 0 and n > 2 and naive <= min(k, n / 2) / 2 else 1)


def test_a_rank_of_its_own_decides_how_a_layer_shares():
    few = QBLoRAConfig(r=64, quantization_aware=True, rank_pattern={"down_proj": 3})
    assert choose_factors(base(), few, NAME) == (32, 2)
    assert choose_factors(base(), few, "model.layers.3.mlp.up_proj") == (32, 1)


def test_a_block_has_no_rank_that_could_run_out():
    assert choose_factors(base(), QBLoRAConfig(adapter="block", quantization_aware=True), NAME) == (32, 2)


def test_without_quantization_awareness_two_outputs_share_as_published():
    assert choose_factors(base(), QBLoRAConfig(r=500), NAME) == (2, 2)


@given(k=st.integers(1, 300), wanted=st.integers(1, 40))
def test_reduce_takes_the_largest_that_fits(k, wanted):
    config = QBLoRAConfig(in_factor=wanted, out_factor=1, on_misfit="reduce")
    naive = max(f for f in range(1, min(wanted, k) + 1) if k % f == 0)
    assert choose_factors(Base("float", k, 8), config, NAME) == (naive, 1)


def test_a_pattern_overrides_the_common_factor_and_is_never_reduced():
    config = QBLoRAConfig(in_factor=2, out_factor=2, on_misfit="reduce", in_factor_pattern={"down_proj": 96})
    assert choose_factors(base(), config, NAME) == (96, 2)
    config.in_factor_pattern = {"down_proj": 5}
    with pytest.raises(ConfigError, match="in_factor=5 does not divide"):
        choose_factors(base(), config, NAME)


@given(
    st.dictionaries(
        st.from_regex(r"[a-z]{1,3}\.[a-z]{1,3}", fullmatch=True),
        st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2])),
        min_size=1,
    )
)
def test_recorded_factors_read_back_as_they_were_chosen(chosen):
    config = QBLoRAConfig(quantization_aware=True)
    record_factors_(config, chosen)
    for name, factors in chosen.items():
        assert choose_factors(Base("group_quant", 64, 64, 1), config, name) == factors


def test_a_kind_of_layers_that_agree_is_one_entry_and_an_odd_one_has_its_own():
    config = QBLoRAConfig(quantization_aware=True)
    names = {f"layers.{i}.{kind}": (32, e) for i in range(3) for kind, e in (("q", 2), ("k", 1), ("v", 2), ("o", 2))}
    names["layers.1.v"] = (32, 1)
    record_factors_(config, names)
    assert (config.in_factor, config.out_factor) == (32, 2)
    assert config.out_factor_pattern == {"k": 1, r"^layers\.1\.v": 1}
    assert all(recorded_factors(config, name) == factors for name, factors in names.items())


def test_writing_factors_down_leaves_copies_of_the_configuration_alone():
    first = QBLoRAConfig(r=3, quantization_aware=True)
    second = replace(first, r=64)
    record_factors_(first, {"a": (32, 2), "b": (32, 1), "c": (32, 2)})
    assert first.out_factor_pattern
    assert not second.out_factor_pattern
    assert second.out_factor is None


@given(n=st.integers(1, 60), wanted=st.integers(1, 40))
def test_reduce_leaves_a_layer_more_than_one_adapter_output(n, wanted):
    config = QBLoRAConfig(in_factor=1, out_factor=wanted, on_misfit="reduce")
    naive = max(f for f in range(1, wanted + 1) if n % f == 0 and (n // f > 1 or n == 1))
    assert choose_factors(Base("float", 8, n), config, NAME) == (1, naive)


def test_one_adapter_output_for_a_whole_layer_is_worth_a_warning():
    with pytest.warns(UserWarning, match=r"down_proj: out_factor=2 makes all 2 outputs share.*out_factor_pattern"):
        choose_factors(Base("float", 8, 2), QBLoRAConfig(), NAME)


@pytest.mark.parametrize(
    ("usual", "own", "inputs", "chosen"), [(32, 16, 96, 32), (16, 32, 96, 32), (32, 16, 48, 16), (64, 64, 128, 64)]
)
def test_of_several_groups_in_one_base_the_commonest_is_pooled_where_it_fits(usual, own, inputs, chosen):
    config = QBLoRAConfig(quantization_aware=True, r=1, base_quantization={"group_size": usual})
    assert choose_factors(base(k=inputs, group=own), config, NAME)[0] == chosen
