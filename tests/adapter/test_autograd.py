"""Adapted layers under all that follows a computation: hooks, transforms, traces, inputs that change in place."""

import copy

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn

from qbl_trl import QBLoRAConfig

KINDS = {"low_rank": {}, "block": {"adapter": "block"}, "wider": {"in_factor": 8, "out_factor": 8}}


class Two(nn.Module):
    def __init__(self, second=nn.Linear):
        super().__init__()
        self.first, self.second = nn.Linear(32, 48), second(48, 32)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Squashed(nn.Linear):
    """A base class whose backward needs its own output."""

    def forward(self, x):
        return torch.sigmoid(super().forward(x))


def adapted(kind="low_rank", model=None):
    torch.manual_seed(0)
    settings = {"r": 2, "init_lora_weights": False, "target_modules": ["first", "second"], **KINDS[kind]}
    return get_peft_model(model or Two(), QBLoRAConfig(**settings))


def plain_answer(model, x):
    """By fresh memory, in a model that has pooled nothing yet."""
    return copy.deepcopy(model)(x.detach().clone())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_an_input_changed_behind_torchs_back_is_pooled_anew(mode):
    model, buffer = adapted().eval(), np.ones((4, 32), np.float32)
    x = torch.from_numpy(buffer)
    with mode():
        model(x)
        buffer[:, ::3] = -2.0
        torch.testing.assert_close(model(x), plain_answer(model, x), rtol=0, atol=0)


def test_an_input_with_a_gradient_may_be_stepped_through_its_data():
    model, x = adapted(), torch.randn(4, 32, requires_grad=True)
    model(x).sum().backward()
    x.data = torch.randn(6, 32)
    torch.testing.assert_close(model(x), plain_answer(model, x), rtol=0, atol=0)


def test_training_follows_inference_on_the_same_tensor():
    model, x = adapted(), torch.randn(4, 32)
    with torch.inference_mode():
        answered = model(x)
    trained = model(x)
    trained.sum().backward()
    torch.testing.assert_close(trained, answered.clone(), rtol=0, atol=0)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("input_has_gradient", [False, True])
def test_second_derivatives_are_those_of_the_formula(kind, input_has_gradient):
    model = adapted(kind).double()
    x = torch.randn(4, 32, dtype=torch.float64, requires_grad=input_has_gradient)
    trained = [p for p in model.parameters() if p.requires_grad] + [x] * input_has_gradient
    directions = [torch.randn_like(p) for p in trained]

    def first():
        gradients = torch.autograd.grad(model(x).square().mean(), trained, create_graph=True)
        return gradients, sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))

    found = torch.autograd.grad(first()[1], trained)
    step, moved = 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, direction in zip(trained, directions, strict=True):
                parameter += sign * step * direction
        moved.append([g.detach() for g in first()[0]])
        with torch.no_grad():
            for parameter, direction in zip(trained, directions, strict=True):
                parameter -= sign * step * direction
    for above, below, exact in zip(*moved, found, strict=True):
        # differences of step 1e-5 in float64, of functions whose third derivative is large
        torch.testing.assert_close((above - below) / (2 * step), exact, rtol=1e-3, atol=1e-4)


def test_what_a_hook_on_the_base_keeps_is_the_bases_own_output():
    model, x, kept = adapted(), torch.randn(4, 32), []
    base = model.base_model.model.first.base_layer
    base.register_forward_hook(lambda module, inputs, output: kept.append(output))
    model(x)
    torch.testing.assert_close(kept[0], nn.functional.linear(x, base.weight, base.bias))


def test_a_base_class_that_needs_its_output_for_backward_trains():
    model = adapted(model=Two(Squashed))
    model(torch.randn(4, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", KINDS)
def test_functional_transforms_and_traces_compute_the_same(kind):
    model, x = adapted(kind).double().eval(), torch.randn(4, 32, dtype=torch.float64)
    expected = model(x)
    close = {"rtol": 0, "atol": 1e-10}
    torch.testing.assert_close(torch.vmap(model)(x), expected, **close)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters, row):
        return torch.func.functional_call(model, parameters, (row[None],)).square().sum()

    per_sample = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(trained, x)
    summed = torch.autograd.grad(model(x).square().sum(), list(trained.values()))
    for name, gradient in zip(trained, summed, strict=True):
        torch.testing.assert_close(per_sample[name].sum(0), gradient, **close)
    _, moved = torch.func.jvp(model, (x,), (torch.ones_like(x),))
    step = 1e-5
    slope = (model(x + step) - model(x - step)) / (2 * step)
    torch.testing.assert_close(moved, slope, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), expected, **close)
