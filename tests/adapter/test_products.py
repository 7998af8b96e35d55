"""The fused products and their hand-written gradients, against loops and float64 autograd."""

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qbl_trl.adapter.products import _last, add_expanded, plus_expanded, pool, project, sum_neighbours
from tests.adapter.naive import naive_pool

FACTORS = [1, 2, 3, 8, 32]


@pytest.mark.parametrize("p", FACTORS)
def test_pooling_sums_neighbours(p):
    x = torch.randn(3, 2 * p, dtype=torch.float64)
    torch.testing.assert_close(sum_neighbours(x, p, torch.float64), naive_pool(x, p))


@pytest.mark.parametrize("e", FACTORS)
def test_expansion_gives_every_neighbour_the_same_update(e):
    y, update = torch.randn(3, 2 * e), torch.randn(3, 2)
    before = y.clone()
    assert torch.equal(plus_expanded(y, update, e), y + update.repeat_interleave(e, -1))
    assert torch.equal(y, before)


@settings(max_examples=40, deadline=None)
@given(
    p=st.sampled_from(FACTORS), e=st.sampled_from(FACTORS), rank=st.sampled_from([1, 3, 70]), tokens=st.integers(1, 5)
)
def test_gradients_are_those_of_float64_autograd(p, e, rank, tokens):
    x = torch.randn(2, tokens, 2 * p, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3 * e, 2 * p, dtype=torch.float64)
    a = torch.randn(rank, 2, dtype=torch.float64, requires_grad=True)
    b = torch.randn(3, rank, dtype=torch.float64, requires_grad=True)
    through, h = project(x, a, p)
    y = add_expanded(through @ w.T, h, b, e)
    expected = x @ (w + (b @ a).repeat_interleave(e, 0).repeat_interleave(p, 1)).T
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    for ours, oracle in zip(
        torch.autograd.grad(y, [x, a, b], grad), torch.autograd.grad(expected, [x, a, b], grad), strict=True
    ):
        torch.testing.assert_close(ours, oracle)


@pytest.mark.parametrize("function", ["pool", "project"])
def test_the_input_is_handed_on_and_not_kept(function):
    x = torch.randn(5, 64, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        if function == "pool":
            through, _ = pool(x, 32, torch.float32)
        else:
            through, _ = project(x, torch.randn(3, 2, requires_grad=True), 32)
    assert torch.equal(through, x)
    assert all(t.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() for t in kept)


def test_layers_that_read_one_input_share_one_pooled_copy():
    x = torch.randn(5, 64, requires_grad=True) * 1.0  # made by autograd, as between layers
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        first = project(x, torch.randn(3, 2, requires_grad=True), 32)
        second = project(x, torch.randn(3, 2, requires_grad=True), 32)
    assert len({t.untyped_storage().data_ptr() for t in kept if t.shape == (5, 2)}) == 1
    del first, second


def test_an_input_changed_in_place_is_pooled_anew():
    x = torch.randn(5, 64)
    _, before = project(x, torch.ones(1, 2), 32)
    x.add_(1)
    _, after = project(x, torch.ones(1, 2), 32)
    torch.testing.assert_close(after, before + 64)


def test_another_input_at_the_same_address_is_not_taken_for_the_last_one():
    for seed in range(20):  # freed memory is handed out again
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(seed))
        _, h = project(x, torch.ones(1, 2), 32)
        torch.testing.assert_close(h[:, 0], x.sum(-1), rtol=1e-4, atol=1e-4)  # float32 sums in another order
        del x


def test_an_output_that_is_a_view_is_not_written_over():
    y = torch.randn(2, 3, 4)
    view = y.view(6, 4)
    before = y.clone()
    add_expanded(view, torch.randn(6, 1), torch.randn(2, 1), 2)
    assert torch.equal(y, before)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("rank", "e"), [(1, 2), (200, 2), (1, 1), (200, 1), (3, 32)])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("view", [False, True])
def test_a_model_may_add_in_place_to_what_it_gets(own, rank, e, shape, view):
    given = torch.randn(*shape, 64, requires_grad=True)
    y = given * 2
    h, weight = torch.randn(*shape, rank), torch.randn(64 // e, rank, requires_grad=True)
    found = add_expanded(y.view(y.shape) if view else y, h, weight, e, own)
    found += 1
    torch.testing.assert_close(found, given * 2 + (h @ weight.T).repeat_interleave(e, -1) + 1)
    found.sum().backward()
    assert torch.equal(given.grad, torch.full_like(given, 2))


@pytest.mark.parametrize("function", [lambda x, w: project(x, w, 2), lambda x, w: pool(x, 2, torch.float32)])
def test_an_input_without_gradient_asks_the_base_layer_for_none(function):
    weight = torch.randn(3, 4, requires_grad=True)
    passed, _ = function(torch.randn(5, 8), weight)
    assert not passed.requires_grad
    passed, _ = function(torch.randn(5, 8, requires_grad=True), weight)
    assert passed.requires_grad


def test_what_was_pooled_last_goes_with_what_it_was_pooled_from():
    x = torch.randn(4, 8, requires_grad=True) * 1
    pooled = pool(x, 2, torch.float32)[1]
    assert _last.pooled is not None
    del x, pooled
    gc.collect()
    assert _last.pooled is None
