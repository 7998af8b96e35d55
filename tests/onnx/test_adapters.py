"""A model that still has its adapters exports with them, exactly."""

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qbl_trl import GroupQuantConfig, QBLoRAConfig, export_onnx, merge, verify
from qbl_trl.errors import ExportError, MergeError
from qbl_trl.loading import load_adapter
from tests.onnx.models import quantize
from tests.tiny import tiny_llama, tokens


def kinds(report):
    return {(layer.operator, layer.correction) for layer in report.layers if layer.name != "lm_head"}


@pytest.mark.parametrize(
    ("lowering", "expected"),
    [("auto", "low rank"), ("low_rank", "low rank"), ("factored", "block delta")],
)
def test_a_q_blora_adapter_over_4_bits_is_exact_in_every_form(tmp_path, lowering, expected):
    base = quantize(tiny_llama(), p=None)
    model = get_peft_model(base, QBLoRAConfig(r=4, init_lora_weights=False))
    report = export_onnx(model, tmp_path / "out", lowering=lowering)
    assert report.parity_cached.max_abs_difference < 2e-5  # fp32, random adapters
    assert kinds(report) == {("MatMulNBits", expected)}


def test_large_pooling_factors_are_written_as_their_product(tmp_path):
    base = quantize(tiny_llama(), p=None)
    model = get_peft_model(base, QBLoRAConfig(r=4, in_factor=32, out_factor=2, init_lora_weights=False))
    report = export_onnx(model, tmp_path / "out")
    assert kinds(report) == {("MatMulNBits", "block delta")}


@pytest.mark.parametrize(
    ("codebook", "nested", "storage"),
    [
        ("nf4", False, torch.uint8),
        ("nf4", True, torch.uint8),
        ("fp4", False, torch.uint8),
        ("nf4", True, torch.bfloat16),
    ],
)
def test_a_bitsandbytes_base_keeps_its_codes(tmp_path, codebook, nested, storage):
    pytest.importorskip("bitsandbytes")
    tiny_llama().save_pretrained(tmp_path / "float")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=codebook,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=storage,
    )
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=quantization, dtype=torch.float32
    )
    model = get_peft_model(base, QBLoRAConfig(r=4, init_lora_weights=False))
    report = export_onnx(model, tmp_path / "out")
    assert report.parity.max_abs_difference < 2e-5
    assert kinds(report) == {("MatMulBnb4", "low rank")}

    model.save_pretrained(tmp_path / "adapter")  # a folder brings its own base along
    assert kinds(export_onnx(tmp_path / "adapter", tmp_path / "again")) == {("MatMulBnb4", "low rank")}
    assert verify(tmp_path / "out", tmp_path / "again", tokens()).max_abs_difference == 0
    with pytest.raises(MergeError, match="bitsandbytes 4-bit weight cannot take an adapter without loss"):
        merge(load_adapter(tmp_path / "adapter"))
    with pytest.warns(UserWarning, match=r"trained over a base with bitsandbytes .* and this one has none"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")


def test_a_layer_that_bitsandbytes_names_by_its_codebook_keeps_its_codes(tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny_llama()
    layer = model.model.layers[0].mlp.up_proj
    packed = bnb.nn.LinearNF4(64, 96, bias=False)
    packed.load_state_dict(layer.state_dict())
    model.model.layers[0].mlp.up_proj = packed.to("cpu")
    report = export_onnx(model, tmp_path / "out")
    assert report.parity.max_abs_difference < 2e-5
    assert ("MatMulBnb4", "none") in kinds(report)


def test_a_plain_lora_over_4_bits_is_traced_as_it_is(tmp_path):
    base = quantize(tiny_llama(), p=None)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    assert export_onnx(model, tmp_path / "out").parity.max_abs_difference < 2e-5


@pytest.mark.parametrize("config", [LoraConfig(use_dora=True), LoHaConfig()])
def test_adapters_that_no_trace_follows_are_named(tmp_path, config):
    config.target_modules = ["q_proj"]
    with pytest.raises(ExportError, match=r"It carries adapters of PEFT \((lora|loha)\): merge_and_unload\(\) them"):
        export_onnx(get_peft_model(tiny_llama(), config), tmp_path / "out")


def test_an_adapter_that_is_switched_off_is_not_written(tmp_path):
    base = quantize(tiny_llama(), p=None)
    model = get_peft_model(base, QBLoRAConfig(r=4, init_lora_weights=False))
    with model.disable_adapter():
        report = export_onnx(model, tmp_path / "out")
    assert kinds(report) == {("MatMulNBits", "none")}
    assert report.parity.max_abs_difference < 2e-5


def test_an_adapter_folder_is_exported_on_the_base_it_was_trained_over(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "float")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=GroupQuantConfig())
    model = get_peft_model(base, QBLoRAConfig(r=4, quantization_aware=True, init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")  # names the float folder, and how it was quantized
    report = export_onnx(tmp_path / "adapter", tmp_path / "out")
    assert kinds(report) == {("MatMulNBits", "block delta")}
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    assert verify(model, tmp_path / "out", ids).max_abs_difference < 2e-5  # float32 rounding


def test_trained_rows_of_an_embedding_are_merged_first(tmp_path):
    base = quantize(tiny_llama(), p=None)
    settings = {"quantization_aware": True, "trainable_token_indices": [1, 2], "init_lora_weights": False}
    model = get_peft_model(base, QBLoRAConfig(r=4, **settings)).eval()
    with pytest.raises(ExportError, match="merge first"):
        export_onnx(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert export_onnx(merge(model), tmp_path / "out").parity.max_abs_difference < 2e-5
