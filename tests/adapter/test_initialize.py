"""Starting an adapter at the quantization error: the nearest weight the adapter can express, and no worse than zero."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model

from qbl_trl import GroupQuantConfig, QBLoRAConfig
from qbl_trl.adapter.initialize import initialize_from_error_, nearest_factors
from qbl_trl.adapter.layer import adapter_layers
from qbl_trl.errors import ConfigError
from qbl_trl.quant.hf_quantizer import quantize_model_
from tests.tiny import logits, tiny_llama, tokens

IDS = tokens()


def model(**settings):
    base = quantize_model_(tiny_llama(), GroupQuantConfig(bits=2, group_size=32))
    return get_peft_model(base, QBLoRAConfig(**{"r": 8, "task_type": "CAUSAL_LM", **settings})).eval()


@given(p=st.sampled_from([1, 2, 3]), e=st.sampled_from([1, 2]), rank=st.integers(1, 9))
def test_factors_equal_the_oracle_of_block_means_and_singular_values(p, e, rank):
    error = torch.randn(4 * e, 6 * p, dtype=torch.float64)
    block, up, down = nearest_factors(error, p, e, rank)
    naive = torch.zeros(4, 6, dtype=torch.float64)
    for n in range(4 * e):
        for k in range(6 * p):
            naive[n // e, k // p] += error[n, k] / (e * p)
    torch.testing.assert_close(block, naive)
    values = torch.linalg.svdvals(naive)
    left = float((naive - up @ down).norm() ** 2)
    assert left == pytest.approx(float((values[rank:] ** 2).sum()), abs=1e-12)  # Eckart and Young
    assert up.shape == (4, rank)
    assert down.shape == (rank, 6)


@pytest.mark.parametrize("settings", [{"in_factor": 1, "out_factor": 1}, {}, {"in_factor": 32}, {"adapter": "block"}])
@pytest.mark.parametrize("source", ["model", "folder"])
def test_the_weight_error_shrinks_to_what_the_oracle_says(tmp_path, settings, source):
    adapted, reference = model(**settings), tiny_llama()
    reference.save_pretrained(tmp_path)
    shares = initialize_from_error_(adapted, reference if source == "model" else tmp_path)
    layers = adapter_layers(adapted.get_base_model())
    assert shares.keys() == layers.keys()
    for name, layer in layers.items():
        error = (reference.get_submodule(name).weight - layer.get_base_layer().dequantize()).detach().double()
        p, e = layer.in_factor["default"], layer.out_factor["default"]
        block = error.unflatten(0, (-1, e)).unflatten(-1, (-1, p)).mean((1, 3))
        kept = torch.linalg.svdvals(block)
        kept = kept if settings.get("adapter") == "block" else kept[: layer.rank["default"]]
        # The block part is orthogonal to the rest, and the kept singular values to the dropped ones (Pythagoras).
        oracle = (1 - p * e * float((kept**2).sum()) / float((error**2).sum())) ** 0.5
        left = float((error - layer.get_delta_weight("default").detach()).norm() / error.norm())
        assert left == pytest.approx(oracle, abs=1e-4)  # float32 factors
        assert shares[name] == pytest.approx(left, abs=1e-4)
        assert left < 1


def test_a_full_rank_start_brings_the_logits_back():
    reference = tiny_llama()
    adapted = model(r=64, in_factor=1, out_factor=1)
    before = (logits(adapted, IDS) - logits(reference, IDS)).abs().max()
    initialize_from_error_(adapted, reference)
    after = (logits(adapted, IDS) - logits(reference, IDS)).abs().max()
    assert after < 1e-4 < before  # rank 64 of 64: only rounding is left


def test_another_checkpoint_or_adapter_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no balanced adapter 'other'"):
        initialize_from_error_(model(), tiny_llama(), "other")
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.q_proj: the float weight is \(32, 32\)"):
        initialize_from_error_(model(), tiny_llama(hidden_size=32))
    with pytest.raises(ConfigError, match="the float source has no model"):
        initialize_from_error_(model(), tiny_llama().model)
    with pytest.raises(ConfigError, match="holds no safetensors file"):
        initialize_from_error_(model(), tmp_path)


def test_a_negative_scale_starts_as_near_and_none_at_all_is_refused():
    near, far = (initialize_from_error_(model(lora_alpha=alpha), tiny_llama()) for alpha in (16, -16))
    assert far == pytest.approx(near)
    with pytest.raises(ConfigError, match="scale is 0"):
        initialize_from_error_(model(lora_alpha=0), tiny_llama())


def test_merged_adapters_are_refused():
    adapted = model(in_factor=32)
    adapted.merge_adapter()
    with pytest.raises(ConfigError, match=r"merged here; call unmerge_adapter\(\) first"):
        initialize_from_error_(adapted, tiny_llama())
