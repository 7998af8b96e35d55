import copy

import pytest
import torch
from torch import nn

from qbl_trl.config import LayerFormat
from qbl_trl.errors import CheckpointError, ConfigError
from qbl_trl.quant.affine import Affine, min_max
from qbl_trl.quant.blocks import pool
from qbl_trl.quant.embedding import GroupQuantEmbedding
from qbl_trl.quant.linear import GroupQuantLinear
from qbl_trl.quant.packed import ALL_ROWS


def quantized(out_features=24, in_features=64, bits=4, symmetric=False, bias=False, group_size=32):
    affine = min_max(torch.randn(out_features, in_features), group_size, bits, symmetric, torch.float16)
    return GroupQuantLinear.from_affine(
        affine,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        bias=torch.randn(out_features) if bias else None,
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("in_features", [64, 72])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_forward_and_backward_agree_with_a_float64_linear_layer(bits, in_features, bias):
    layer = quantized(24, in_features, bits, bias=bias)
    x = torch.randn(3, 5, in_features, requires_grad=True)
    x64 = x.detach().double().requires_grad_()
    expected = nn.functional.linear(x64, layer.dequantize().double(), layer.bias.double() if bias else None)
    upstream = torch.randn(3, 5, 24)
    layer(x).backward(upstream)
    expected.backward(upstream.double())
    # float32 sums of at most 72 products
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-5, atol=1e-5)


def test_rows_in_blocks_give_what_all_rows_give(monkeypatch):
    layer = quantized(24, 64)
    layer.set_delta(torch.randn(12, 2), 32, 2)
    x = torch.randn(7, 64)
    whole = layer(x)
    monkeypatch.setattr("qbl_trl.quant.linear._BLOCK_WEIGHTS", 5 * 64)
    assert layer.row_blocks(layer.weight.device)[:2] == [(0, 5), (5, 10)]
    # Two float32 sums of the same K products, and of the delta's, added up in different orders.
    most = x.abs().double() @ layer.dequantize_rows(ALL_ROWS).abs().double().T
    most += (pool(x.abs(), 32).double() @ layer.delta.abs().double().T).repeat_interleave(2, -1)
    assert ((layer(x) - whole).abs() <= 64 * torch.finfo(torch.float32).eps * most).all()


def test_nothing_is_saved_for_backward():
    layer, saved = quantized(), []
    x = torch.randn(4, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert saved == []


def test_only_x_gets_a_gradient():
    layer = quantized(bias=True)
    layer(torch.randn(2, 64, requires_grad=True)).sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in layer.parameters())


def test_a_4_bit_layer_in_groups_of_32_takes_at_most_064_bytes_per_weight():
    layer = quantized(64, 1024)
    stored = sum(t.numel() * t.element_size() for t in (layer.weight, layer.scales, layer.zeros))
    assert stored / (64 * 1024) <= 0.64


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
def test_casting_the_model_leaves_the_stored_numbers_alone(cast):
    model = nn.Sequential(nn.Linear(64, 64), quantized())
    model[1].set_delta(torch.randn(24, 2), 32, 1)
    before = {name: tensor.clone() for name, tensor in model[1].state_dict().items()}
    cast(model)
    for name, tensor in model[1].state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])


def test_autocast_decides_the_dtype_of_the_product():
    layer = quantized()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2, 64)).dtype == torch.bfloat16


def test_the_delta_is_added_block_by_block():
    layer = quantized(8, 64)
    dense, delta = layer.dequantize(), torch.randn(2, 2)
    layer.set_delta(delta, in_factor=32, out_factor=4)
    for n in range(8):
        for k in range(64):
            assert layer.dequantize()[n, k] == dense[n, k] + delta[n // 4, k // 32]


def test_a_delta_of_the_wrong_shape_is_refused():
    with pytest.raises(ConfigError, match=r"delta of \(3, 2\) with in_factor=32, out_factor=4 does not cover"):
        quantized(8, 64).set_delta(torch.zeros(3, 2), 32, 4)


def test_float_zeros_are_stored_as_they_are():
    codes, scales, zeros = min_max(torch.randn(8, 64), 32, 4, False, torch.float16)
    layer = GroupQuantLinear.from_affine(Affine(codes, scales, zeros.float() + 0.25), bits=4, group_size=32)
    assert layer.format.zeros == "float32"
    assert torch.equal(layer.zero_points(), zeros.float() + 0.25)


def test_symmetric_layers_store_no_zeros():
    layer = quantized(symmetric=True)
    assert layer.zeros is None
    assert "zeros" not in layer.state_dict()
    assert (layer.zero_points() == 8).all()


def test_shapes_that_do_not_fit_are_refused():
    codes, scales, zeros = min_max(torch.randn(8, 64), 32, 4, False, torch.float16)
    with pytest.raises(ConfigError, match="need scales and zeros of"):
        GroupQuantLinear.from_affine(Affine(codes, scales[:, :1], zeros), bits=4, group_size=32)


def test_a_state_of_another_dtype_is_refused():
    layer = quantized()
    state = layer.state_dict()
    state["scales"] = state["scales"].float()
    with pytest.raises(CheckpointError, match=r"scales: stored as torch.float32, this layer holds torch.float16"):
        layer.load_state_dict(state)


@pytest.mark.parametrize("field", [{"bits": 3}, {"group_size": 48}, {"zeros": "int"}, {"scale_dtype": "float8"}])
def test_unknown_formats_are_refused(field):
    with pytest.raises(ConfigError, match="allowed"):
        LayerFormat(**field)


def test_a_packed_embedding_looks_up_the_dequantized_rows():
    affine = min_max(torch.randn(50, 64), 32, 4, False, torch.float16)
    table = GroupQuantEmbedding.from_affine(affine, bits=4, group_size=32, dtype=torch.float32)
    ids = torch.randint(0, 50, (2, 7))
    assert torch.equal(table(ids), table.dequantize()[ids])
    assert table.to(torch.bfloat16)(ids).dtype == torch.bfloat16


def test_a_tied_head_shares_every_tensor_and_adds_none_to_the_state():
    affine = min_max(torch.randn(50, 64), 32, 4, False, torch.float16)
    table = GroupQuantEmbedding.from_affine(affine, bits=4, group_size=32, dtype=torch.float32)
    head = GroupQuantLinear(64, 50, format=table.format, device="meta")
    table.as_head_(head)
    assert set(head.state_dict()) == {"weight"}
    assert head.weight is table.weight
    assert torch.equal(head.dequantize(), table.dequantize())


def test_layers_copy_and_deepcopy():
    layer = quantized()
    twin = copy.deepcopy(layer)
    x = torch.randn(2, 64)
    assert torch.equal(layer(x), twin(x))
    assert twin.weight is not layer.weight


def test_an_exporter_that_traces_is_told_of_the_one_that_keeps_the_codes():
    with pytest.raises(
        ConfigError, match=r"not traced: no exporter but qbl_trl\.export_onnx .* `model\.dequantize\(\)`"
    ):
        torch.jit.trace(quantized(), (torch.randn(2, 64),))
    with pytest.raises(ConfigError, match="is not traced"):
        torch.export.export(quantized(), (torch.randn(2, 64),), strict=False)
    with pytest.raises(Exception, match="exception"):  # of dynamo's own kind
        torch.export.export(quantized(), (torch.randn(2, 64),), strict=True)
