"""BalancedLinear against float64 oracles, over every base that needs no further library."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qbl_trl.adapter.layer import BalancedLinear
from qbl_trl.errors import ConfigError, MergeError
from qbl_trl.quant.algorithms import quantize
from qbl_trl.quant.linear import GroupQuantLinear
from tests.adapter.naive import balanced, dense, naive_delta

K, N, GROUP = 128, 24, 32
VARIANTS = {
    "lora": {"in_factor": 1, "out_factor": 1},
    "q-blora": {"in_factor": 2, "out_factor": 2},
    "published": {"in_factor": 2, "out_factor": 2, "pooling": "mean"},
    "qa-lora": {"in_factor": GROUP, "out_factor": 1},
    "qa-blora": {"in_factor": GROUP, "out_factor": 4, "pooling": "sum"},
    "qa-hira": {"in_factor": GROUP, "out_factor": 8, "adapter": "block"},
}


def group_quant(dtype=torch.float16) -> GroupQuantLinear:
    affine = quantize(torch.randn(N, K), bits=4, group_size=GROUP, symmetric=False, scale_dtype=dtype)
    return GroupQuantLinear.from_affine(affine, bits=4, group_size=GROUP, bias=torch.randn(N))


def float_linear() -> nn.Linear:
    return nn.Linear(K, N)


def conv1d() -> Conv1D:
    return Conv1D(N, K)


BASES = {"linear": float_linear, "conv1d": conv1d, "groups": group_quant}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tokens", [3, 300])  # 300: where D is made whole instead of passing every token through A
def test_output_and_gradients_equal_float64_autograd(base, variant, tokens):
    layer = balanced(BASES[base](), **VARIANTS[variant])
    x = torch.randn(2, tokens, K, requires_grad=True)
    wide = copy.deepcopy(layer).double()
    x64 = x.detach().double().requires_grad_(True)
    expected = wide.get_base_layer()(x64) + x64 @ dense(wide).T
    y = layer(x)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)  # float32 sums of 128 products of N(0, 1)
    grad = torch.randn_like(y)
    trained = [p for p in layer.parameters() if p.requires_grad and "base" not in p.__class__.__name__]
    ours = {n: p for n, p in layer.named_parameters() if "lora_" in n}
    theirs = {n: p for n, p in wide.named_parameters() if "lora_" in n}
    assert trained
    got = torch.autograd.grad(y, [x, *ours.values()], grad)
    want = torch.autograd.grad(expected, [x64, *theirs.values()], grad.double())
    for a, b in zip(got, want, strict=True):
        scale = float(b.abs().max())
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5 * scale)  # float32 against float64


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "qa-hira"])
def test_delta_weight_equals_the_naive_loop(base, variant):
    layer = balanced(BASES[base](), **VARIANTS[variant])
    p, e = layer.in_factor["default"], layer.out_factor["default"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = naive_delta(a, b, layer.gain("default"), p, e)
    delta = layer.get_delta_weight("default").double()
    torch.testing.assert_close(delta.T if base == "conv1d" else delta, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dropout", [0.0, 1e-9])
def test_a_single_token_needs_no_axis_of_its_own(variant, dropout):
    layer = balanced(float_linear(), lora_dropout=dropout, **VARIANTS[variant])
    x = torch.randn(1, K, requires_grad=True)
    expected = torch.autograd.grad(layer(x).square().sum(), [x, *layer.lora_B.parameters()])
    alone = layer(x[0])
    assert torch.equal(alone, layer(x)[0])
    for ours, theirs in zip(
        torch.autograd.grad(alone.square().sum(), [x, *layer.lora_B.parameters()]), expected, strict=True
    ):
        assert torch.equal(ours, theirs)
    assert layer(torch.randn(2, 0, K)).shape == (2, 0, N)


@pytest.mark.parametrize("variant", VARIANTS)
def test_step_zero_equals_the_base(variant):
    layer = balanced(float_linear(), init_lora_weights=True, **VARIANTS[variant])
    x = torch.randn(5, K)
    assert torch.equal(layer(x), layer.get_base_layer()(x))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_out_as_it_went_in(base, dtype):
    layer = balanced(BASES[base](), in_factor=2, out_factor=2).to(dtype)
    x = torch.randn(5, K, dtype=dtype, requires_grad=True)
    y = layer(x)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    expected = layer.get_base_layer()(x).float() + x.float() @ dense(layer).float().T
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.1)  # 8 bits of mantissa


def test_a_float32_adapter_over_a_half_base_trains_in_float32():
    layer = balanced(float_linear().to(torch.bfloat16), in_factor=2, out_factor=2)
    layer.lora_A.float()
    layer.lora_B.float()
    y = layer(torch.randn(5, K, dtype=torch.bfloat16))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.lora_A["default"].weight.grad.dtype == torch.float32


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_runs_the_adapter_in_its_dtype(variant):
    layer = balanced(float_linear(), **VARIANTS[variant])
    x = torch.randn(300, K)
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.15)  # 8 bits of mantissa


def test_dropout_acts_on_the_pooled_input():
    layer = balanced(float_linear(), in_factor=4, out_factor=2, lora_dropout=0.5).train()
    x = torch.randn(50, K)
    base = layer.get_base_layer()
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    pooled = nn.functional.dropout(x.unflatten(-1, (-1, 4)).sum(-1), 0.5)
    update = pooled @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T * layer.gain("default")
    torch.testing.assert_close(y, base(x) + update.repeat_interleave(2, -1), rtol=1e-4, atol=1e-4)  # order of sums
    layer.eval()
    torch.testing.assert_close(layer(x), base(x) + x @ dense(layer).float().T, rtol=1e-4, atol=1e-4)


def test_one_layer_keeps_a_fraction_of_loras_bytes_for_backward():
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    def kept(layer: nn.Module) -> int:
        own = {t.untyped_storage().data_ptr() for t in [*layer.parameters(), *layer.buffers()]}
        found: dict[int, int] = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = layer(torch.randn(256, 2048, requires_grad=True))
        del y
        return sum(found.values())

    base = nn.Linear(2048, 2048, bias=False).requires_grad_(False)
    lora = kept(Linear(base, "default", LoraConfig(r=16), r=16, lora_alpha=16))
    assert kept(balanced(base, r=16, in_factor=2, out_factor=2)) <= 0.60 * lora
    assert kept(balanced(base, r=16, in_factor=32, out_factor=2)) <= 0.10 * lora


def test_several_active_adapters_add_up():
    layer = balanced(float_linear(), in_factor=2, out_factor=2)
    other = balanced(float_linear(), in_factor=32, out_factor=4)
    config_like = {"r": 4, "init_lora_weights": False, "in_factor": 32, "out_factor": 4}
    from qbl_trl import QBLoRAConfig

    layer.update_layer("other", 4, lora_alpha=16, config=QBLoRAConfig(**config_like), target_name="layer")
    layer.set_adapter(["default", "other"])
    x = torch.randn(7, K)
    expected = layer.get_base_layer()(x) + x @ (dense(layer) + dense(layer, "other")).float().T
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)  # order of float32 sums
    assert other.rank["default"] == layer.rank["other"]


def test_each_sample_of_a_mixed_batch_uses_the_adapter_it_names():
    layer = balanced(float_linear(), in_factor=2, out_factor=2).eval()
    x = torch.randn(3, 4, K)
    y = layer(x, adapter_names=["default", "__base__", "default"])
    base = layer.get_base_layer()(x)
    torch.testing.assert_close(y[[0, 2]], layer(x)[[0, 2]])
    assert torch.equal(y[1], base[1])


def test_the_output_of_a_hooked_or_leaf_base_is_still_right():
    layer = balanced(float_linear(), in_factor=2, out_factor=2)
    x = torch.randn(2, 3, K)
    expected = layer.get_base_layer()(x) + x @ dense(layer).float().T
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_a_layer_survives_pickling_and_copying():
    layer = balanced(group_quant(), in_factor=GROUP, out_factor=2).eval()
    x = torch.randn(4, K)
    for twin in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert torch.equal(twin(x), layer(x))


@pytest.mark.parametrize("variant", ["qa-lora", "qa-blora", "qa-hira"])
def test_merging_into_groups_keeps_codes_and_scales_and_unmerging_restores_every_bit(variant):
    layer = balanced(group_quant(), **VARIANTS[variant]).eval()
    base = layer.get_base_layer()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    x = torch.randn(5, K)
    trained, plain = layer(x), base(x)
    layer.merge(safe_merge=True)
    for name in ("weight", "scales", "zeros"):
        assert torch.equal(base.state_dict()[name], before[name])
    torch.testing.assert_close(layer(x), trained, rtol=1e-5, atol=1e-4)  # order of float32 sums
    layer.unmerge()
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert torch.equal(base(x), plain)


def test_two_adapters_of_different_factors_merge_into_one_delta():
    from qbl_trl import QBLoRAConfig

    layer = balanced(group_quant(), in_factor=64, out_factor=2).eval()
    config = QBLoRAConfig(r=4, in_factor=96 // 3, out_factor=3, init_lora_weights=False)
    layer.update_layer("other", 4, lora_alpha=16, config=config, target_name="layer")
    layer.set_adapter(["default", "other"])
    x = torch.randn(5, K)
    trained = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), trained, rtol=1e-5, atol=1e-4)  # order of float32 sums
    layer.unmerge()
    assert layer.get_base_layer().delta is None


def test_taking_out_what_was_never_merged_only_warns():
    layer = balanced(float_linear())
    before = layer.get_base_layer().weight.detach().clone()
    with pytest.warns(UserWarning, match="nothing is merged"):
        layer.unmerge()
    assert torch.equal(layer.get_base_layer().weight, before)


def test_merging_a_float_base_adds_the_naive_delta():
    layer = balanced(float_linear(), in_factor=2, out_factor=2)
    before = layer.get_base_layer().weight.detach().clone()
    layer.merge(safe_merge=True)
    expected = before.double() + dense(layer).detach()
    torch.testing.assert_close(layer.get_base_layer().weight.double(), expected.double(), rtol=1e-6, atol=1e-6)


def test_a_factor_that_is_no_multiple_of_the_group_is_refused_with_three_ways_out():
    layer = balanced(group_quant(), in_factor=2, out_factor=2)
    with pytest.raises(MergeError, match=r"in_factor=2 is no multiple .* group of 32.*Export.*quantization_aware=True"):
        layer.merge()


@pytest.mark.parametrize("base", ["linear", "groups"])
def test_an_adapter_with_values_that_are_not_finite_does_not_merge_safely(base):
    layer = balanced(BASES[base](), in_factor=GROUP, out_factor=2)
    layer.lora_B["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(MergeError, match=r"NaNs detected .* adapter default seems to be broken"):
        layer.merge(safe_merge=True)


@pytest.mark.parametrize(
    "module", [nn.Embedding(10, 4), nn.Conv2d(3, 4, 3), nn.LSTM(4, 4), nn.MultiheadAttention(4, 2)]
)
def test_other_modules_are_refused_by_name_with_what_is_supported(module):
    with pytest.raises(ConfigError, match=rf"layer: {type(module).__name__} cannot hold .* nn.Linear.*exclude_modules"):
        balanced(module)


def test_a_layer_that_is_read_but_never_called_is_refused():
    with pytest.raises(ConfigError, match=r"layer: .* never called, its weight is read.*exclude_modules"):
        balanced(nn.MultiheadAttention(4, 2).out_proj)


def test_its_representation_says_what_it_is():
    assert repr(balanced(float_linear(), in_factor=2, out_factor=2)).startswith("qblora.BalancedLinear(")


def test_it_exposes_the_features_of_its_base():
    layer = balanced(conv1d(), in_factor=2, out_factor=2)
    assert isinstance(layer, BalancedLinear)
    assert (layer.in_features, layer.out_features) == (K, N)
