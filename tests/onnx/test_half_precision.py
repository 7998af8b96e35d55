"""Models that are loaded in half precision: their graphs in float32, and graphs in half precision of their tables."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qbl_trl import GroupQuantConfig, export_onnx, verify
from qbl_trl.onnx.reference import float32_reference
from tests.onnx.architectures import GPTJ
from tests.onnx.models import padded_batch
from tests.onnx.test_export import FP32
from tests.tiny import tiny_llama


@pytest.mark.parametrize("family", ["gptj", "codegen"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_far_positions_are_rotated_by_the_tables_of_the_layers(tmp_path, family, dtype):
    settings = {**GPTJ, "n_positions": 600, "initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).save_pretrained(tmp_path / "float")
    quantization = GroupQuantConfig(bits=8, symmetric=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=dtype, quantization_config=quantization)
    report = export_onnx(model.eval(), tmp_path / "onnx")
    assert report.attention == "gqa"
    ids = torch.randint(3, 100, (1, 600), generator=torch.Generator().manual_seed(0))
    far = verify(float32_reference(model), tmp_path / "onnx", ids)
    assert far.max_abs_difference < 5 * FP32  # the tables were off by 2**-9 of an angle, or 2**-12: 0.009, 0.03
    assert report.parity.max_abs_difference < FP32


def loaded(folder, **settings):
    quantization = GroupQuantConfig(quantize_embeddings=True, **settings.pop("quantization", {}))
    tiny_llama(tie_word_embeddings=settings.pop("tied", False)).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, **settings).eval()


def test_tables_that_are_packed_already_stay_as_they_are(tmp_path):
    model = loaded(tmp_path / "float", dtype=torch.bfloat16)
    report = export_onnx(model, tmp_path / "onnx", embedding_bits=8)
    assert report.parity_embeddings.max_abs_difference == 0
    ids, mask = padded_batch()
    assert verify(float32_reference(model), tmp_path / "onnx", ids, mask).max_abs_difference < FP32


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_table_is_read_in_half_precision_and_multiplied_in_float32(tmp_path, scale_dtype, tied):
    model = loaded(tmp_path / "float", tied=tied, dtype=torch.float32, quantization={"scale_dtype": scale_dtype})
    ids, mask = padded_batch()
    export_onnx(model, tmp_path / "plain", dtype="float16")
    export_onnx(model, tmp_path / "onnx", dtype="float16", accuracy_level=4)
    found = verify(tmp_path / "plain", tmp_path / "onnx", ids, mask)
    assert found.kl_per_token < 1e-3  # what 8-bit activations cost
