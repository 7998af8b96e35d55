"""Rows of `qbl-trl inspect`."""

from dataclasses import replace

import pytest

from qbl_trl.quant.kinds import by_kind, spans
from qbl_trl.quant.summary import LayerSummary

LAYER = LayerSummary("m.0.q", 64, 32, 4, 32, "packed", 0.6, None, 0.1, (32,))


def named(*names, **changes):
    return [replace(LAYER, name=name, **changes) for name in names]


@pytest.mark.parametrize(
    ("numbers", "text"), [([3], "3"), ([0, 1, 2, 5], "0-2,5"), ([5, 4, 1], "1,4-5"), ([1, 1, 2], "1-2")]
)
def test_numbers_are_written_as_ranges(numbers, text):
    assert spans(numbers) == text


def test_every_layer_is_in_one_kind_and_kinds_stand_where_their_first_layer_does():
    layers = named("m.0.q", "m.0.k", "m.1.q", "m.1.k", "head", "m.10.q")
    kinds = by_kind(layers)
    assert [(kind.name, len(kind.layers)) for kind in kinds] == [("m.0-1,10.q", 3), ("m.0-1.k", 2), ("head", 1)]
    assert sorted(layer.name for kind in kinds for layer in kind.layers) == sorted(layer.name for layer in layers)


def test_experts_of_a_block_are_alike():
    layers = named(*(f"m.{block}.experts.{expert}.up" for block in range(3) for expert in range(4)))
    assert [kind.name for kind in by_kind(layers)] == ["m.0-2.experts.0-3.up"]


@pytest.mark.parametrize(
    "change",
    [{"bits": 8}, {"group_size": 16}, {"out_features": 32}, {"delta": (32, 2)}, {"zeros": "none"}, {"in_factors": ()}],
)
def test_layers_that_differ_in_anything_but_number_and_error_are_two_kinds(change):
    kinds = by_kind([*named("m.0.q", "m.2.q"), *named("m.1.q", **change)])
    assert [kind.name for kind in kinds] == ["m.0,2.q", "m.1.q"]


def test_the_errors_of_a_kind_are_the_smallest_and_the_largest():
    layers = [*named("m.0.q", error=0.3), *named("m.1.q", error=0.1), *named("m.2.q", error=0.2)]
    assert [kind.errors for kind in by_kind(layers)] == [(0.1, 0.3)]
    assert [kind.errors for kind in by_kind(named("m.0.q", error=None))] == [None]
