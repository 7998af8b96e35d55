"""How a modeling file rotates is found by rotating."""

import importlib

import pytest

from qbl_trl.onnx.rotations import ROTATING, pairs_neighbours, reads_rows, rotate_of


@pytest.mark.parametrize(
    ("model", "name", "repeats", "expected"),
    [
        ("llama", ROTATING[0], "halves", False),
        ("cohere", ROTATING[0], "neighbours", True),
        ("gpt_oss", ROTATING[0], "once", False),
        ("gpt_oss", ROTATING[0], "halves", None),
        ("llama", ROTATING[0], "once", None),
        ("phimoe", ROTATING[0], "halves", False),
        ("deepseek_v3", ROTATING[1], "halves", True),
        ("gptj", ROTATING[0], "neighbours", None),  # it takes one tensor, and sines first
    ],
)
def test_pairs_are_those_that_the_modeling_file_turns(model, name, repeats, expected):
    file = f"transformers.models.{model}.modeling_{model}"
    importlib.import_module(file)
    assert pairs_neighbours(rotate_of(file, name), repeats) is expected


def test_a_function_that_turns_in_another_way_has_no_pairs():
    assert pairs_neighbours(lambda q, k, cos, sin: (q * cos[:, None], k * cos[:, None]), "halves") is None


def test_a_function_that_must_be_given_positions_reads_rows():
    def by_rows(q, k, cos, sin, position_ids):
        return q * cos[position_ids], k

    assert reads_rows(by_rows)
    assert not reads_rows(lambda q, k, cos, sin, position_ids=None: (q, k))
