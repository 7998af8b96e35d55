"""GGUF files come over code for code, and are the model that transformers reads from them."""

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import qbl_trl
from qbl_trl import QBLoRAConfig
from qbl_trl.errors import CheckpointError
from qbl_trl.quant.affine import dequantize
from qbl_trl.quant.importers import convert_checkpoint, describe_checkpoint, read_layers
from qbl_trl.quant.importers.gguf_blocks import FORMATS, split_blocks
from qbl_trl.quant.linear import GroupQuantLinear
from tests.quant import foreign
from tests.quant.foreign_gguf import K_QUANTS, write_gguf
from tests.tiny import logits, tiny_llama, tokens


@pytest.fixture
def gguf_file(tmp_path):
    pytest.importorskip("gguf", reason="the GGUF importer needs the package gguf")

    def write(types=None, default="Q4_1", rope=None, **changes):
        model = tiny_llama(**{"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": False, **changes})
        write_gguf(tmp_path / "tiny.gguf", model, types or {}, default, rope)
        return tmp_path / "tiny.gguf"

    return write


@pytest.mark.parametrize("kind", FORMATS)
def test_a_gguf_file_gives_the_model_that_transformers_dequantizes(tmp_path, gguf_file, kind):
    width = 256 if kind in K_QUANTS else 64
    file = gguf_file(default=kind, hidden_size=width, intermediate_size=2 * width)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    convert_checkpoint(file, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    layers = foreign.linear_layers(reference)
    for name, layer in layers.items():
        ours = model.get_submodule(name)
        assert isinstance(ours, GroupQuantLinear), name
        assert ours.scales.dtype == (torch.float32 if kind in K_QUANTS else torch.float16), name
        tolerance = 0 if FORMATS[kind].zeros == "none" else 2e-7  # -m / d is rounded to float32: |m| < 1 times 2**-23
        torch.testing.assert_close(ours.dequantize(), layer.weight.float(), rtol=0, atol=tolerance)
    expected = logits(reference, tokens())
    torch.testing.assert_close(logits(model, tokens()), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_an_adapter_over_a_file_of_mixed_k_quants_merges_exactly(tmp_path, gguf_file):
    """Q4_K_M: most matrices Q4_K, some Q6_K, whose groups are half as long."""
    file = gguf_file({"v_proj": "Q6_K", "down_proj": "Q6_K"}, "Q4_K", hidden_size=256, intermediate_size=512)
    convert_checkpoint(file, tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, QBLoRAConfig(r=4, quantization_aware=True, init_lora_weights=False)).eval()
    layer = base.model.layers[0].mlp.down_proj
    assert (layer.base.group_size, layer.in_factor["default"]) == (16, 32)
    qbl_trl.merge(model).save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = logits(model, tokens())
    torch.testing.assert_close(logits(merged, tokens()), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_codes_and_scales_of_a_gguf_file_are_its_own(gguf_file):
    import gguf

    file = gguf_file()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    layer = dict(read_layers(file))["model.layers.1.mlp.down_proj"]
    codes, scales, zeros = layer.affine()
    for row, raw in enumerate(np.array(tensors["blk.1.ffn_down.weight"].data)[:5]):
        for group, block in enumerate(raw.reshape(-1, 20)):
            d, m = block[:4].copy().view(np.float16)
            assert scales[row, group].numpy() == d
            assert abs(float(zeros[row, group]) + float(m) / float(d)) < 1e-6 * abs(float(m) / float(d)) + 1e-12
            for k in range(32):
                nibble = block[4 + k] & 15 if k < 16 else block[4 + k - 16] >> 4
                assert codes[row, group * 32 + k] == nibble


def test_matrices_of_other_types_stay_float_and_8_bit_layers_are_named(gguf_file):
    file = gguf_file({"down_proj": "Q8_0", "o_proj": "BF16", "lm_head": "Q8_0", "embed": "Q8_0"})
    described = describe_checkpoint(file)
    assert described["bits"] == 4
    assert described["zeros"] == "float32"
    eight = {"bits": 8, "zeros": "none"}
    assert described["layers"] == {
        "model.layers.0.mlp.down_proj": eight,
        "model.layers.1.mlp.down_proj": eight,
    }
    assert {"lm_head", "model.layers.0.self_attn.o_proj"} <= set(described["modules_to_not_convert"])
    assert isinstance(dict(read_layers(file))["model.embed_tokens.weight"], torch.Tensor)


def test_a_constant_group_of_a_gguf_file_keeps_its_value():
    d, m = np.zeros(1, np.float16), np.array([0.37], np.float16)
    raw = np.concatenate([d.view(np.uint8), m.view(np.uint8), np.full(16, 0x5A, np.uint8)])
    codes, scales, zeros = split_blocks(torch.from_numpy(raw)[None], "Q4_1")
    assert (dequantize(codes, scales, zeros, 32) == float(m[0])).all()


@pytest.mark.parametrize(("kind", "size"), [("Q4_0", 18), ("Q4_1", 20), ("Q8_0", 34), ("Q4_K", 144)])
def test_groups_of_zeros_get_the_usual_scale(kind, size):
    raw = np.random.default_rng(0).integers(0, 256, (2, 2, size), dtype=np.uint8)
    raw[..., :4] = np.array([0.25, 0.5], np.float16).view(np.uint8)
    raw[1, 1, :4] = 0
    codes, scales, zeros = split_blocks(torch.from_numpy(raw.reshape(2, -1)), kind)
    width, group = codes.shape[1] // 2, codes.shape[1] // scales.shape[1]
    assert (dequantize(codes, scales, zeros, group)[1, width:] == 0).all()
    assert (scales != 0).all()


def test_a_gguf_file_cut_short_is_refused(gguf_file):
    file = gguf_file()
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(CheckpointError, match=r"tiny\.gguf cannot be read as GGUF"):
        describe_checkpoint(file)


def test_a_gguf_file_without_codes_of_ours_is_refused(gguf_file):
    with pytest.raises(CheckpointError, match=r"no linear layer is stored as Q4_0, .*Q6_K \(found: F16"):
        describe_checkpoint(gguf_file(default="F16"))


def test_a_file_that_becomes_float_for_the_most_part_says_so(gguf_file):
    with pytest.warns(UserWarning, match=r"8\d% of the weights of linear layers become float32.*stored as BF16:"):
        describe_checkpoint(gguf_file({"v_proj": "Q8_0", "o_proj": "Q4_0"}, default="BF16"))


def llama3_factors(factor, base=10000.0, length=8192):
    """As llama.cpp's converter writes them for heads of 16."""
    waves = 2 * np.pi * base ** (np.arange(8) / 8)
    smooth = (length / waves - 1) / 3
    between = 1 / ((1 - smooth) / factor + smooth)
    return np.where(waves < length / 4, 1, np.where(waves > length, factor, between)).astype(np.float32)


def test_rotary_angles_of_a_gguf_file_are_stretched_as_it_says(tmp_path, gguf_file):
    convert_checkpoint(gguf_file(rope=4.0), tmp_path / "linear")
    convert_checkpoint(gguf_file(rope=llama3_factors(8.0)), tmp_path / "llama3")
    convert_checkpoint(gguf_file(), tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").model.rotary_emb.inv_freq
    linear = AutoModelForCausalLM.from_pretrained(tmp_path / "linear").model.rotary_emb.inv_freq
    llama3 = AutoModelForCausalLM.from_pretrained(tmp_path / "llama3").model.rotary_emb.inv_freq
    torch.testing.assert_close(linear, plain / 4)
    torch.testing.assert_close(llama3, plain / torch.from_numpy(llama3_factors(8.0)), rtol=1e-5, atol=0)
    with pytest.raises(CheckpointError, match="stretches the rotary angles"):
        describe_checkpoint(gguf_file(rope=np.linspace(1, 8, 8, dtype=np.float32)))
