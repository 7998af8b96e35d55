"""torch.compile over adapted layers: one graph, no breaks in the adapter, the same numbers and gradients."""

import shutil

import pytest
import torch
from torch import nn

from qbl_trl.quant.algorithms import quantize
from qbl_trl.quant.linear import GroupQuantLinear
from tests.adapter.naive import balanced

K, N = 128, 64
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.skipif(not shutil.which("g++"), reason="no g++"))]


def group_quant() -> GroupQuantLinear:
    affine = quantize(torch.randn(N, K), bits=4, group_size=32, symmetric=False)
    return GroupQuantLinear.from_affine(affine, bits=4, group_size=32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("settings", [{"in_factor": 1, "out_factor": 1}, {}, {"in_factor": 32}, {"adapter": "block"}])
@pytest.mark.parametrize("tokens", [4, 300])
def test_the_adapter_compiles_into_one_graph(backend, settings, tokens):
    _compare(balanced(nn.Linear(K, N), **settings), backend, tokens)


@pytest.mark.parametrize("settings", [{}, {"in_factor": 32}])
def test_over_packed_groups_too_and_the_layer_computes_the_same(settings):
    _compare(balanced(group_quant(), **settings), "aot_eager", 4)


def _compare(layer: nn.Module, backend: str, tokens: int) -> None:
    torch.compiler.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    x = torch.randn(2, tokens, K)
    grads = []
    for call in (layer, compiled):
        given = x.clone().requires_grad_(True)
        y = call(given)
        trained = [p for n, p in layer.named_parameters() if "lora_" in n]
        grads.append([y, *torch.autograd.grad(y.square().sum(), [given, *trained])])
    for eager, fused in zip(*grads, strict=True):
        torch.testing.assert_close(fused, eager, rtol=1e-4, atol=1e-3)  # float32 sums in another order
