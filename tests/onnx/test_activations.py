"""GELU is one operator, in whatever words a modeling file spells it."""

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from qbl_trl import export_onnx
from qbl_trl.onnx.activations import gelu_form
from tests.onnx.architectures import ARCHITECTURES, build
from tests.onnx.models import operators

FORMS = {
    "gelu": "none",
    "gelu_python": "none",
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu_accurate": "tanh",
    "quick_gelu": None,
    "silu": None,
}


@pytest.mark.parametrize("name", FORMS)
def test_a_gelu_is_known_by_what_it_computes(name):
    assert gelu_form(ACT2FN[name]) == FORMS[name]


class BiasedGelu(nn.Module):
    def forward(self, x, bias):
        return nn.functional.gelu(x + bias)


class ScaledGelu(nn.Module):
    def forward(self, x):
        return 1.001 * nn.functional.gelu(x)


@pytest.mark.parametrize("other", [BiasedGelu(), ScaledGelu(), ACT2FN["gelu_10"], nn.Linear(2, 2)])
def test_what_only_sounds_like_one_is_traced(other):
    assert gelu_form(other) is None


@pytest.mark.parametrize("case", ["gemma3 with norms of heads", "gpt_neox with partial rotary"])
def test_the_graph_holds_the_operator(tmp_path, case):
    kind, settings, _ = ARCHITECTURES[case]
    export_onnx(build(kind, settings), tmp_path / "out")
    found = operators(tmp_path / "out")
    assert found.count("Gelu") == settings["num_hidden_layers"]
    assert not {"Tanh", "Erf"} & set(found)


def test_half_precision_runs_it(tmp_path):
    kind, settings, _ = ARCHITECTURES["gemma3 with norms of heads"]
    report = export_onnx(build(kind, settings), tmp_path / "out", dtype="float16")
    assert report.parity_as_written.max_abs_difference < 2e-2  # fp16 keeps 11 bits
    assert torch.isfinite(torch.tensor(report.parity_as_written.kl_per_token))
