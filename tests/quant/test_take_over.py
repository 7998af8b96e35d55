"""A loaded layer of another library becomes ours with the same codes, or is refused because it computes otherwise.

The layers here are stand-ins: the tensors of the format, and the product with what they stand for. The libraries'
own are in tests/adapter/test_bases.py and integration/test_importers.py.
"""

import importlib
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from torch import nn

from qbl_trl import QBLoRAConfig, export_onnx, merge
from qbl_trl.adapter.bases import describe, foreign_kind
from qbl_trl.errors import CheckpointError, ConfigError, ExportError
from qbl_trl.onnx.sources import linear_source
from qbl_trl.quant.affine import dequantize
from qbl_trl.quant.importers import take_over
from tests.adapter.naive import balanced
from tests.quant.foreign import GROUP, awq_tensors, gptq_tensors, hqq_tensors, random_affine
from tests.tiny import logits, tiny_llama, tokens

K, N = 128, 64


class Subclass(torch.Tensor):
    """A weight inside a subclass of Tensor: codes and scales as attributes, products with what they stand for."""

    @staticmethod
    def __new__(cls, affine, dtype=torch.float32, **kept):
        return torch.Tensor._make_wrapper_subclass(cls, (N, K), dtype=dtype)

    def __init__(self, affine, **kept):
        self.product = dequantize(*affine, GROUP)
        vars(self).update(kept)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            x, weight, bias = args
            return nn.functional.linear(x, weight.product, bias)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        assert operation is torch.ops.aten.detach.default
        return args[0]


def held_in(module, name, affine, **kept):
    """A linear layer whose weight is a class of that name in that module."""
    cls = type(name, (Subclass,), {"__module__": module})
    layer = nn.Linear(K, N)
    layer.weight = nn.Parameter(cls(affine, **kept), requires_grad=False)
    return layer


def torchao(zeros="integer", **kept):
    affine = random_affine(N, K, 4, 0, zeros="packed" if zeros == "integer" else "float", dtype=torch.float32)
    zero_point = affine.zeros - 8 if zeros == "float" else (affine.zeros.short() - 8).to(torch.int8)
    stored = {"qdata": (affine.codes.short() - 8).to(torch.int8), "scale": affine.scales, "zero_point": zero_point}
    sizes = {"target_dtype": torch.int4, "block_size": (1, GROUP)}
    return affine, held_in("torchao.quantization", "IntxUnpackedToInt8Tensor", affine, **stored, **sizes, **kept)


class Packed:
    def __init__(self, codes):
        self.codes = codes

    def unpack(self):
        return self.codes


def quanto(shift="float"):
    affine = random_affine(N, K, 4, 0, dtype=torch.float32)
    zeros = affine.zeros.reshape(-1, 1)
    stored = {
        "_data": Packed(affine.codes.reshape(-1, GROUP)),
        "_scale": affine.scales.reshape(-1, 1),
        "_shift": zeros * affine.scales.reshape(-1, 1) if shift == "float" else zeros.to(torch.int8),
        "_group_size": GROUP,
        "axis": 0,
        "qtype": SimpleNamespace(bits=4),
    }
    return affine, held_in("optimum.quanto.tensor", "WeightQBitsTensor", affine, **stored)


class Kernel(nn.Module):
    """A layer of another library: its tensors as buffers, its product in float16 or float32."""

    def __init__(self, tensors, affine, *, zero_format=1):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", torch.randn(N).to(affine.scales.dtype))
        self.compute_dtype = affine.scales.dtype
        if "group_size" not in tensors:  # HQQ says it there
            self.bits, self.group_size, self.sym = 4, GROUP, False
        self.qzero_format = lambda: zero_format
        self.product = dequantize(*affine, GROUP)

    def forward(self, x):
        return x @ self.product.T.to(x.dtype) + self.bias


def hqq():
    affine = random_affine(N, K, 4, 0, zeros="float", dtype=torch.float32)
    return affine, hqq_tensors(affine, 4)


def gptq(v1=True):
    affine = random_affine(N, K, 4, 0)
    return affine, gptq_tensors(affine, 4, v1=v1)


def awq():
    affine = random_affine(N, K, 4, 0)
    return affine, awq_tensors(affine)


@pytest.mark.parametrize(
    ("kind", "made", "zero_format"),
    [("hqq", hqq(), 1), ("awq", awq(), 1), ("gptq", gptq(v1=True), 1), ("gptq", gptq(v1=False), 2)],
)
def test_codes_scales_zeros_and_bias_are_the_layers_own(kind, made, zero_format):
    affine, tensors = made
    layer = Kernel(tensors, affine, zero_format=zero_format)
    ours = take_over(layer, kind, "model.q_proj")
    assert torch.equal(ours.affine().codes, affine.codes)
    assert torch.equal(ours.scales, affine.scales)
    assert torch.equal(ours.zero_points().float(), affine.zeros.float())
    assert torch.equal(ours.bias, layer.bias)


def test_a_kernel_that_keeps_another_layout_is_refused_by_what_it_computes():
    affine, tensors = gptq()
    layer = Kernel(tensors | {"qweight": tensors["qweight"].flip(0)}, affine)
    with pytest.raises(CheckpointError, match=r"model\.q_proj: read code for code.*quantize --from"):
        take_over(layer, "gptq", "model.q_proj")


def test_a_kernel_that_dropped_its_tensors_is_refused_by_name():
    affine, tensors = gptq()
    layer = Kernel({"scales": tensors["scales"]}, affine)
    with pytest.raises(CheckpointError, match=r"model\.q_proj: the codes of this gptq layer cannot be taken over"):
        take_over(layer, "gptq", "model.q_proj")


def test_scattered_groups_are_refused():
    affine, _ = gptq()
    layer = Kernel(gptq_tensors(affine, 4, act_order=True), affine)
    with pytest.raises(CheckpointError, match="desc_act=true"):
        take_over(layer, "gptq", "model.q_proj")


@pytest.mark.parametrize(
    ("kind", "made"),
    [
        *(("torchao", torchao(zeros)) for zeros in ("integer", "float")),
        *(("quanto", quanto(shift)) for shift in ("integer", "float")),
    ],
)
def test_subclasses_of_tensor_give_their_codes_too(kind, made):
    affine, layer = made
    base = describe(layer)
    assert (base.kind, base.group_size, base.mergeable) == (kind, GROUP, True)
    ours = take_over(layer, kind, "model.q_proj")
    assert torch.equal(ours.affine().codes, affine.codes)
    assert torch.equal(ours.scales, affine.scales)
    torch.testing.assert_close(ours.zero_points().float(), affine.zeros.float(), rtol=1e-6, atol=1e-6)  # float sums
    assert torch.equal(ours.bias, layer.bias)


def test_an_adapter_over_them_merges_and_exports_exactly():
    _, layer = torchao()
    adapted = balanced(layer, in_factor=GROUP, out_factor=2).eval()
    source, x = linear_source("q_proj", adapted), torch.randn(3, K)
    assert (source.base.bits, source.base.group_size, len(source.branches)) == (4, GROUP, 1)
    expected = adapted(x)
    adapted.merge()
    torch.testing.assert_close(adapted.get_base_layer()(x), expected, rtol=1e-5, atol=1e-5)  # float32 sums


def test_rounded_activations_are_refused_by_name():
    _, layer = torchao(activation_quantization="int8_asym_per_token")
    assert describe(layer).group_size is None
    with pytest.raises(CheckpointError, match=r"model\.q_proj: .* its activations are quantized or scaled too"):
        take_over(layer, "torchao", "model.q_proj")
    with pytest.raises(ExportError, match="its activations are quantized or scaled too"):
        linear_source("model.q_proj", layer)


def test_layers_without_affine_groups_stay_beside_those_that_are_merged():
    """Of torchao some layers round their inputs; adapters elsewhere merge as over any base."""
    model = tiny_llama(hidden_size=64, intermediate_size=96)
    _, layer = torchao(activation_quantization="int8_asym_per_token")
    model.extra = layer  # never called
    adapted = get_peft_model(model, QBLoRAConfig(r=4, init_lora_weights=False, target_modules=["q_proj"])).eval()
    merged = merge(adapted)
    assert type(merged.extra.weight) is type(layer.weight)
    torch.testing.assert_close(logits(merged, tokens()), logits(adapted, tokens()), rtol=1e-4, atol=1e-5)


def test_a_linear_layer_without_a_weight_is_no_kind_of_layer():
    layer = nn.Linear(K, N)
    del layer.weight
    assert foreign_kind(layer) is None
    with pytest.raises(ConfigError, match="cannot hold a balanced adapter"):
        describe(layer)


def test_an_export_takes_every_layer_over_once(tmp_path, monkeypatch):
    pytest.importorskip("onnx_ir", reason="needs the [onnx] or [onnx5] extra")
    sources = importlib.import_module("qbl_trl.onnx.sources")
    model, taken = tiny_llama(hidden_size=K, head_dim=N // 4), []
    for layer in model.model.layers:
        _, layer.self_attn.q_proj = torchao()
    monkeypatch.setattr(sources, "take_over", lambda layer, *named: taken.append(layer) or take_over(layer, *named))
    report = export_onnx(model, tmp_path / "out", accuracy_level=4)
    assert report.parity.max_abs_difference < 1e-5  # float32 on both sides
    assert len(taken) == len({*taken}) == len(model.model.layers)
