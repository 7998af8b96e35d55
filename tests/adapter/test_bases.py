"""Every base PEFT can train on: told apart, trained on, merged into exactly or refused with the reason.

Real libraries where this machine can run them.
"""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from qbl_trl import QBLoRAConfig, merge
from qbl_trl.adapter.bases import describe, float_weight
from qbl_trl.adapter.layer import adapter_layers
from qbl_trl.errors import CheckpointError, MergeError
from qbl_trl.quant.importers import take_over
from qbl_trl.quant.linear import GroupQuantLinear
from qbl_trl.quant.modules import replace
from tests.adapter.naive import balanced, dense
from tests.tiny import logits, tiny_llama, tokens

K, N = 128, 64
IDS = tokens()


def bnb4(linear: nn.Linear, quant_type: str = "nf4", double: bool = False) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    layer = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, quant_type=quant_type, compute_dtype=torch.float32,
        compress_statistics=double,
    )  # fmt: skip
    layer.weight = bnb.nn.Params4bit(
        linear.weight.data, requires_grad=False, quant_type=quant_type, compress_statistics=double
    )
    return layer.to("cpu")


def bnb8(linear: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    return layer.to("cpu")


def hqq(linear: nn.Linear) -> nn.Module:
    core = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed")
    config = core.BaseQuantizeConfig(nbits=4, group_size=64)
    return core.HQQLinear(copy.deepcopy(linear), config, compute_dtype=torch.float32, device="cpu")


def torchao(linear: nn.Linear, kind: str) -> nn.Module:
    ao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    configs = {
        "int8": lambda: ao.Int8WeightOnlyConfig(),
        "int4": lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(32)),
    }
    holder = nn.Sequential(linear)
    ao.quantize_(holder, configs[kind]())
    return holder[0]


def quanto(linear: nn.Linear, bits: int, *, frozen: bool = True) -> nn.Module:
    library = pytest.importorskip("optimum.quanto", reason="quanto is not installed")
    layer = library.QLinear.from_module(linear, weights=getattr(library, f"qint{bits}"))
    if frozen:
        layer.freeze()
    return layer


def gptq(linear: nn.Linear) -> nn.Module:
    module = pytest.importorskip(
        "gptqmodel.nn_modules.qlinear.torch", reason="GPTQModel is not installed", exc_type=ImportError
    )
    return module.TorchLinear(
        bits=4, group_size=32, sym=True, desc_act=False, in_features=linear.in_features,
        out_features=linear.out_features, bias=False, pack_dtype=torch.int32,
    )  # fmt: skip


def awq(linear: nn.Linear) -> nn.Module:
    module = pytest.importorskip(
        "gptqmodel.nn_modules.qlinear.torch_awq", reason="GPTQModel is not installed", exc_type=ImportError
    )
    return module.AwqTorchLinear(
        bits=4, group_size=32, sym=True, desc_act=False, in_features=linear.in_features,
        out_features=linear.out_features, bias=False, pack_dtype=torch.int32,
    )  # fmt: skip


BASES = {
    "nf4": (lambda m: bnb4(m), "bitsandbytes 4-bit", None),
    "nf4, double": (lambda m: bnb4(m, double=True), "bitsandbytes 4-bit", None),
    "fp4": (lambda m: bnb4(m, "fp4"), "bitsandbytes 4-bit", None),
    "llm.int8": (bnb8, "bitsandbytes 8-bit", None),
    "hqq": (hqq, "hqq", 64),
    "torchao int8": (lambda m: torchao(m, "int8"), "torchao", 128),
    "torchao int4": (lambda m: torchao(m, "int4"), "torchao", 32),
    "quanto int4": (lambda m: quanto(m, 4), "quanto", 128),
    "quanto int8": (lambda m: quanto(m, 8), "quanto", 128),
    "quanto, not frozen": (lambda m: quanto(m, 4, frozen=False), "quanto", None),
}
GIVE_THEIR_CODES = ["hqq", "torchao int8", "torchao int4", "quanto int4", "quanto int8"]
PACKED_ONLY = {"gptq": (gptq, "gptq", 32), "awq": (awq, "awq", 32)}


def linear() -> nn.Linear:
    return nn.Linear(K, N, bias=False).requires_grad_(False)


@pytest.mark.parametrize("name", [*BASES, *PACKED_ONLY])
def test_each_kind_is_told_by_its_class(name):
    make, kind, group = {**BASES, **PACKED_ONLY}[name]
    base = describe(make(linear()))
    assert (base.kind, base.in_features, base.out_features, base.group_size) == (kind, K, N, group)
    assert base.mergeable == (name in (*GIVE_THEIR_CODES, *PACKED_ONLY))


@pytest.mark.parametrize("name", BASES)
def test_an_adapter_trains_over_it_with_the_right_gradients(name):
    layer = balanced(BASES[name][0](linear()), in_factor=2, out_factor=2).train()
    x = torch.randn(2, 5, K, requires_grad=True)
    base = layer.get_base_layer()(x).detach()
    y = layer(x)
    torch.testing.assert_close(y - base, x @ dense(layer).float().T, rtol=1e-4, atol=1e-4)  # float32 sums
    grad = torch.randn_like(y)
    trained = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    got = torch.autograd.grad(y, trained, grad)
    want = torch.autograd.grad(x.detach() @ dense(layer).float().T, trained, grad)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)  # float32 sums


@pytest.mark.parametrize("name", BASES)
def test_its_float_weight_is_what_it_multiplies_with(name):
    layer = BASES[name][0](linear()).train()
    weight, x = float_weight(layer), torch.randn(7, K)
    assert weight.shape == (N, K)
    tolerance = 0.2 if name == "llm.int8" else 1e-3  # int8 also rounds its input to 8 bits
    torch.testing.assert_close(layer(x), x @ weight.T, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", GIVE_THEIR_CODES)
def test_a_layer_of_affine_groups_gives_its_codes_to_the_merged_layer(name):
    layer = balanced(BASES[name][0](linear()), in_factor=K, out_factor=2).eval()
    own = take_over(layer.get_base_layer(), layer.base.kind, "layer").dequantize()
    torch.testing.assert_close(own, float_weight(layer.get_base_layer()), rtol=0, atol=1e-6)  # quanto subtracts a shift
    x = torch.randn(7, K)
    expected = layer(x)
    layer.merge()
    assert isinstance(layer.get_base_layer(), GroupQuantLinear)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)  # float32 sums in another order
    layer.unmerge()
    assert torch.equal(layer.get_base_layer().dequantize(), own)


@pytest.mark.parametrize("name", [name for name in BASES if name not in GIVE_THEIR_CODES])
def test_merging_is_refused_with_the_reason_and_the_lossy_route(name):
    layer = balanced(BASES[name][0](linear()), in_factor=64, out_factor=2)
    with pytest.raises(MergeError, match=r"cannot take an adapter without loss.*lossy=\"requantize\""):
        layer.merge()


@pytest.mark.parametrize("name", PACKED_ONLY)
def test_a_layer_without_its_codes_cannot_give_its_weight(name):
    with pytest.raises(CheckpointError, match="cannot be taken over"):
        float_weight(PACKED_ONLY[name][0](linear()))


@pytest.mark.parametrize("name", ["nf4", "quanto, not frozen"])
def test_the_lossy_route_works_over_a_whole_model(name):
    model = tiny_llama(intermediate_size=128)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and "lm_head" not in path:
            replace(model, path, BASES[name][0](layer))
    adapted = get_peft_model(model, QBLoRAConfig(r=4, init_lora_weights=False)).train()
    assert len(adapter_layers(adapted)) == 14
    with pytest.raises(MergeError, match=r"model\.layers\.0\.self_attn\.q_proj: a .* weight cannot take"):
        merge(adapted)
    merged = merge(adapted, lossy="requantize")
    assert torch.isfinite(logits(merged, IDS)).all()


@pytest.mark.parametrize("name", GIVE_THEIR_CODES)
def test_a_whole_model_merges_with_its_codes_whether_a_layer_has_an_adapter_or_not(name):
    model = tiny_llama(intermediate_size=128)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and "lm_head" not in path:
            replace(model, path, BASES[name][0](layer))
    kind = type(model.model.layers[0].self_attn.v_proj)
    settings = {"r": 4, "init_lora_weights": False, "exclude_modules": ["v_proj"]}
    adapted = get_peft_model(model, QBLoRAConfig(quantization_aware=True, **settings)).eval()
    assert len(adapter_layers(adapted)) == 12
    merged = merge(adapted)
    torch.testing.assert_close(logits(merged, IDS), logits(adapted, IDS), rtol=0, atol=2e-5)  # float32, two layers
    assert isinstance(merged.model.layers[0].self_attn.v_proj, GroupQuantLinear)
    assert type(model.model.layers[0].self_attn.v_proj) is kind


@pytest.mark.parametrize("double", [False, True])
def test_a_layer_repacked_for_avx512_bf16_still_gives_its_weight(double):
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    layer = bnb4(linear(), double=double)
    before = float_weight(layer)
    layer.weight.data, layer.weight.quant_state = functional._convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    torch.testing.assert_close(float_weight(layer), before, rtol=2**-8, atol=0)  # maxima became bfloat16


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_a_weight_in_a_byte_is_no_float_weight(dtype):
    layer = nn.Linear(K, N, bias=False)
    layer.weight = nn.Parameter(layer.weight.data.to(dtype), requires_grad=False)
    base = describe(layer)
    assert (base.kind, base.mergeable) == (str(dtype).removeprefix("torch."), False)
    with pytest.raises(CheckpointError, match="without the scales"):
        float_weight(layer)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("evaluated", [False, True])
def test_a_4_bit_base_is_the_same_whenever_it_was_evaluated_and_saved(double, evaluated, monkeypatch):
    """Some processors' kernels want the codes in another order, and saving does not put all of it back."""
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    model = nn.Sequential(bnb4(nn.Linear(K, N, bias=False), double=double))
    x, monkeypatched = torch.randn(3, K), "bitsandbytes.nn.modules._convert_weight_packed_for_cpu"
    weight = float_weight(model[0])
    model[0].support_avx512bf16_for_cpu = True  # as if the processor were one of these
    if evaluated:
        model[0].weight.data, model[0].weight.quant_state = functional._convert_weight_packed_for_cpu(
            model[0].weight.data, model[0].weight.quant_state
        )
    monkeypatch.setattr(monkeypatched, lambda *args: pytest.fail("the codes were repacked"))
    adapted = get_peft_model(model, QBLoRAConfig(r=2, target_modules=["0"]))
    expected = x @ weight.T
    for train in (False, True, False):
        adapted.train(train)
        adapted.state_dict()
        # block maxima were rounded to bfloat16 in the other order, and stay so
        torch.testing.assert_close(adapted(x), expected, rtol=0, atol=2e-2 if evaluated else 1e-5)
