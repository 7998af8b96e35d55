import copy
from functools import partial

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from qbl_trl.config import GroupQuantConfig
from qbl_trl.errors import ConfigError
from qbl_trl.quant import calibration, gptq_solver
from qbl_trl.quant.affine import Affine, dequantize, min_max
from qbl_trl.quant.algorithms import clip_search, quantize
from qbl_trl.quant.calibration import calibrating, find_chain
from qbl_trl.quant.gptq import collect_hessian, gptq_model_, stages
from qbl_trl.quant.gptq_solver import gptq, inverse_factor
from qbl_trl.quant.linear import GroupQuantLinear
from tests.tiny import logits, tiny_gpt2, tiny_llama, tokens

SETTINGS = {"bits": 4, "group_size": 16, "symmetric": False}
GRID = partial(clip_search, bits=4, symmetric=False, scale_dtype=torch.float32)


def correlated(columns=48, samples=200, seed=0):
    """A Hessian of inputs that resemble each other, in float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(samples, columns, generator=generator, dtype=torch.float64) @ mixing
    return x.T @ x / samples


def range_grid(grouped, *, importance=None):
    codes = min_max(grouped[:, 0], grouped.shape[2], 4, False, torch.float32)
    return codes.scales, codes.zeros.float()


def naive_gptq(weight, hessian, order, group_size, damp):
    """Optimal brain quantization as published: invert the Hessian of the remaining inputs after every input."""
    work = weight.double().clone()
    damped = hessian / hessian.diagonal().mean() + damp * torch.eye(len(hessian), dtype=torch.float64)
    codes = torch.zeros(weight.shape, dtype=torch.uint8)
    groups = -(-weight.shape[1] // group_size)
    scales, zeros = torch.zeros(len(weight), groups), torch.zeros(len(weight), groups)
    done: set[int] = set()
    for position, k in enumerate(order):
        g = k // group_size
        if not any(other // group_size == g for other in done):
            members = [other for other in order if other // group_size == g]
            s, z = range_grid(work[:, members].float()[:, None])
            scales[:, g], zeros[:, g] = s[:, 0], z[:, 0]
        s, z = scales[:, g].double(), zeros[:, g].double()
        code = (work[:, k] / s + z).round().clamp(0, 15)
        codes[:, k] = code.to(torch.uint8)
        left = order[position:]
        inverse = torch.linalg.inv(damped[left][:, left])
        work[:, left] -= torch.outer((work[:, k] - s * (code - z)) / inverse[0, 0], inverse[0])
        done.add(k)
    return codes, scales, zeros


@pytest.mark.parametrize("columns", [48, 40])
def test_the_solver_agrees_with_brain_surgery_by_explicit_inverses(columns):
    weight, hessian = torch.randn(5, columns), correlated(columns)
    diagonal = hessian.diagonal()
    groups = [range(start, min(start + 16, columns)) for start in range(0, columns, 16)]
    groups = [sorted(group, key=lambda k: -float(diagonal[k])) for group in groups]
    order = [k for group in sorted(groups, key=lambda group: -float(diagonal[group[0]])) for k in group]
    expected = naive_gptq(weight, hessian, order, 16, 0.01)
    found = gptq(weight, hessian, grid=range_grid, bits=4, group_size=16, scale_dtype=torch.float32)
    assert torch.equal(found.codes, expected[0])
    torch.testing.assert_close(found.scales, expected[1], rtol=1e-6, atol=0)
    assert torch.equal(found.zeros.float(), expected[2])


def test_rows_are_rounded_alike_in_blocks(monkeypatch):
    weight, hessian = torch.randn(5, 40), correlated(40)
    settings = {"grid": range_grid, "bits": 4, "group_size": 16, "scale_dtype": torch.float32}
    whole = gptq(weight, hessian, **settings)
    monkeypatch.setattr(gptq_solver, "_BLOCK_ROWS", 2)
    for one, other in zip(gptq(weight, hessian, **settings), whole, strict=True):
        assert torch.equal(one, other)


def test_the_factor_is_that_of_the_damped_inverse():
    hessian = correlated(12)
    upper = inverse_factor(hessian, 0.01)
    damped = hessian / hessian.diagonal().mean() + 0.01 * torch.eye(12, dtype=torch.float64)
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.T @ upper, torch.linalg.inv(damped), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_has_a_smaller_output_error_than_rounding(symmetric):
    weight, hessian = torch.randn(16, 64), correlated(64).float()
    settings = {**SETTINGS, "symmetric": symmetric}

    def output_error(affine: Affine) -> float:
        wrong = dequantize(*affine, 16) - weight
        return float((wrong @ hessian * wrong).sum())

    ours = output_error(quantize(weight, **settings, algorithm="gptq", hessian=hessian))
    assert ours < 0.6 * output_error(quantize(weight, **settings, algorithm="mse"))


def test_without_correlation_gptq_is_the_clip_search():
    weight = torch.randn(6, 48)
    found = quantize(weight, **SETTINGS, algorithm="gptq", hessian=torch.eye(48))
    for one, other in zip(found, quantize(weight, **SETTINGS, algorithm="mse"), strict=True):
        assert torch.equal(one, other)


def test_inputs_that_calibration_never_saw_are_rounded():
    hessian = correlated(32).float()
    hessian[5, :] = hessian[:, 5] = 0
    weight = torch.randn(4, 32)
    codes, scales, zeros = quantize(weight, **SETTINGS, algorithm="gptq", hessian=hessian)
    wrong = (dequantize(codes, scales, zeros, 16) - weight)[:, 5].abs()
    inside = (codes[:, 5] > 0) & (codes[:, 5] < 15)
    assert (wrong <= scales[:, 0].float().abs() * 0.5001)[inside].all()


@pytest.mark.parametrize("hessian", [torch.zeros(32, 32), torch.ones(32, 32)])
def test_singular_hessians_are_damped(hessian):
    found = quantize(torch.randn(3, 32), **SETTINGS, algorithm="gptq", hessian=hessian)
    assert found.codes.shape == (3, 32)


@pytest.mark.parametrize(
    ("hessian", "message"),
    [
        (torch.eye(16), "must be \\(K, K\\)"),
        (torch.full((32, 32), torch.nan), "NaN or infinite"),
        (torch.eye(32) * torch.linspace(1, -3, 32)[:, None] + 2 * torch.ones(32).diag(), "not positive definite"),
    ],
)
def test_hessians_that_cannot_be_used_are_refused(hessian, message):
    with pytest.raises(ConfigError, match=message):
        quantize(torch.randn(3, 32), **SETTINGS, algorithm="gptq", hessian=hessian)


# ---- whole models


def linear_names(model):
    return [
        name
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and name != "lm_head"
    ]


def config(**changes):
    return GroupQuantConfig(
        **{**SETTINGS, "algorithm": "gptq", "calibration": [tokens(2, 24), tokens(2, 24, 1)], **changes}
    )


def naive_gptq_model_(model, targets, batches):
    """The same, by running the whole model for every stage and recomputing each Hessian from scratch."""
    while remaining := [name for name in targets if not isinstance(model.get_submodule(name), GroupQuantLinear)]:
        inputs: dict[str, list[torch.Tensor]] = {}
        handles = [
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name, inputs=inputs: inputs.setdefault(name, []).append(args[0].clone())
            )
            for name in remaining
        ]
        for batch in batches:
            logits(model, batch)
        for handle in handles:
            handle.remove()
        first = next(iter(inputs))
        same = [n for n in inputs if all(torch.equal(a, b) for a, b in zip(inputs[n], inputs[first], strict=False))]
        x = torch.cat([value.flatten(0, 1) for value in inputs[first]])
        for name in same:
            layer = model.get_submodule(name)
            affine = quantize(layer.weight.data, **SETTINGS, algorithm="gptq", hessian=x.T @ x / len(x))
            model.set_submodule(name, GroupQuantLinear.from_affine(affine, bits=4, group_size=16))


def test_replaying_blocks_gives_the_codes_of_replaying_the_whole_model():
    settings, expected = config(), tiny_llama()
    ours = copy.deepcopy(expected)
    targets = linear_names(ours)
    naive_gptq_model_(expected, targets, settings.calibration)
    gptq_model_(ours, settings, targets)
    for name in targets:
        one, other = ours.get_submodule(name).affine(), expected.get_submodule(name).affine()
        differing = (one.codes != other.codes).float().mean()
        assert differing <= 0.002, name  # sums of different order may flip a tie


def test_a_model_without_a_chain_of_blocks_gives_the_same_codes(monkeypatch):
    settings, walked = config(), tiny_llama()
    whole, targets = copy.deepcopy(walked), linear_names(walked)
    gptq_model_(walked, settings, targets)
    monkeypatch.setattr(calibration, "find_chain", lambda *_: [])
    gptq_model_(whole, settings, targets)
    for name in targets:
        assert torch.equal(whole.get_submodule(name).weight, walked.get_submodule(name).weight), name


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_gptq_keeps_the_logits_closer_than_rounding_does(make):
    model = make()
    reference, targets = logits(model, tokens(2, 24)), linear_names(model)
    rounded = copy.deepcopy(model)
    for name in targets:
        layer = rounded.get_submodule(name)
        conv = type(layer).__name__ == "Conv1D"
        weight = layer.weight.data.T if conv else layer.weight.data
        restored = dequantize(*quantize(weight, bits=2, group_size=16, symmetric=False), 16)
        layer.weight.data = restored.T if conv else restored
    gptq_model_(model, config(bits=2), targets)
    assert all(isinstance(model.get_submodule(name), GroupQuantLinear) for name in targets)
    ours = (logits(model, tokens(2, 24)) - reference).norm()
    assert ours < 0.8 * (logits(rounded, tokens(2, 24)) - reference).norm()


def test_layers_that_read_one_tensor_are_one_stage():
    model = tiny_llama()
    block = model.model.layers[0]
    found = stages(model, linear_names(model)[:7], [lambda: model(tokens())])
    short = [[name.rsplit(".", 1)[1] for name in stage] for stage in found]
    assert short == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert not block.self_attn.q_proj._forward_pre_hooks


def test_the_hessian_is_the_mean_outer_product_of_the_inputs():
    model, inputs = tiny_llama(), []
    layer = model.model.layers[1].mlp.down_proj
    handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    calls = [lambda batch=batch: logits(model, batch) for batch in (tokens(), tokens(3, 5))]
    for call in calls:
        call()
    handle.remove()
    x = torch.cat(inputs).double()
    with calibrating(model):
        found = collect_hessian(layer, calls)
    torch.testing.assert_close(found.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)  # float32 sums


def test_the_decoder_blocks_are_found_and_a_plain_list_of_layers_is_no_chain():
    model = tiny_llama()
    assert find_chain(model, linear_names(model), lambda: model(tokens())) == ["model.layers.0", "model.layers.1"]
    heads = torch.nn.ModuleDict({"list": torch.nn.ModuleList([torch.nn.Linear(4, 4)] * 2)})
    assert find_chain(heads, ["list.0", "list.1"], lambda: None) == []


def test_layers_outside_the_blocks_and_unused_layers_are_quantized_too():
    model = tiny_llama(tie_word_embeddings=False)
    model.unused = torch.nn.Linear(64, 16)
    gptq_model_(model, config(), ["lm_head", *linear_names(model)])
    assert isinstance(model.lm_head, GroupQuantLinear)
    assert isinstance(model.unused, GroupQuantLinear)


def test_a_decoder_with_a_configuration_of_its_own_keeps_no_cache_either(monkeypatch):
    torch.manual_seed(0)
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
    walked = T5ForConditionalGeneration(T5Config(**sizes)).eval()
    whole = copy.deepcopy(walked)
    targets = [name for name in linear_names(walked) if not name.endswith("wo")]  # which T5 reads the type of
    texts = [{"input_ids": tokens(3, 12, seed), "decoder_input_ids": tokens(3, 10, seed)} for seed in (0, 1)]
    gptq_model_(walked, config(calibration=texts), targets)
    monkeypatch.setattr(calibration, "find_chain", lambda *_: [])
    gptq_model_(whole, config(calibration=texts), targets)
    for name in targets:
        assert torch.equal(whole.get_submodule(name).weight, walked.get_submodule(name).weight), name


def test_mode_and_cache_setting_are_put_back():
    model = tiny_llama().train()
    model.model.layers[1].eval()
    gptq_model_(model, config(), linear_names(model))
    assert model.training
    assert model.config.use_cache
    assert model.model.layers[0].mlp.up_proj.training
    assert not model.model.layers[1].mlp.up_proj.training


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no batch was given"),
        (None, "no batch was given"),
        ([{"input_ids": tokens(), "attention_mask": torch.zeros(2, 9)}], "padded"),
    ],
)
def test_calibration_that_cannot_be_used_is_refused(batches, message):
    model = tiny_llama()
    with pytest.raises(ConfigError, match=message):
        gptq_model_(model, config(calibration=batches), linear_names(model))


def test_a_target_that_is_no_linear_layer_is_refused():
    with pytest.raises(ConfigError, match=r"model\.norm is a LlamaRMSNorm"):
        gptq_model_(tiny_llama(), config(), ["model.norm"])


def test_an_error_names_the_layer():
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.mlp\.up_proj: "):
        gptq_model_(model, config(), linear_names(model))
