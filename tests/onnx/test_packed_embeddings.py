"""embedding_bits: the embedding and the head are packed for the graph alone, and what that changes is reported."""

import onnx
import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForImageTextToText

from qbl_trl import GroupQuantConfig, QBLoRAConfig, export_onnx, merge, verify
from qbl_trl.errors import ExportError
from qbl_trl.generation import BEFORE_5
from qbl_trl.onnx import making
from qbl_trl.onnx.companions import causal_lm
from qbl_trl.onnx.packed_embeddings import Tables, head_inputs, packed_tables, with_tables
from qbl_trl.onnx.reference import float32_reference
from qbl_trl.quant.hf_quantizer import quantize_model_
from tests.onnx.architectures import ARCHITECTURES, VISION, build
from tests.onnx.models import greedy, merged_llama, operators, padded_batch
from tests.onnx.test_export import FP32
from tests.tiny import logits, tiny_llama


def twin(model, bits, texts=None):
    decoder = causal_lm(model)
    longest = decoder.config.get_text_config().max_position_embeddings
    reference = float32_reference(model)
    read = head_inputs(reference, causal_lm(reference), longest, texts)
    return with_tables(model, decoder, packed_tables(decoder, bits, read))


def with_a_common_direction(model):
    """A model in whose hidden states one direction is far larger than the rest, as in those that were trained long."""
    with torch.no_grad():
        model.get_input_embeddings().weight += 0.2 * torch.randn(model.config.hidden_size)
    return model


def stored_by_vocabulary(model, folder):
    """Weights with a row for every token."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    return sum(list(weight.dims[:1]) == [model.config.vocab_size] for weight in graph.initializer)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tied", [True, False])
def test_the_graph_is_the_model_with_packed_tables_and_the_report_says_how_far_that_is(tmp_path, bits, tied):
    model = merged_llama(tie_word_embeddings=tied)
    ids, mask = padded_batch()
    report = export_onnx(model, tmp_path / "onnx", embedding_bits=bits)
    assert verify(twin(model, bits), tmp_path / "onnx", ids, mask).max_abs_difference < FP32
    assert report.parity.max_abs_difference < FP32
    assert verify(model, tmp_path / "onnx", ids, mask).max_abs_difference > 100 * FP32
    assert report.parity_embeddings.max_abs_difference > 100 * FP32
    assert "embedding and head packed" in str(report)
    assert operators(tmp_path / "onnx").count("GatherBlockQuantized") == 1
    # codes, scales, zero points
    assert stored_by_vocabulary(model, tmp_path / "onnx") == (3 if tied else 6)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_head_is_rounded_to_what_it_reads(tied, bits):
    torch.manual_seed(0)
    model = with_a_common_direction(tiny_llama(tie_word_embeddings=tied))
    ids = torch.randint(0, model.config.vocab_size, (4, 24))
    exact = logits(model, ids)

    def error(hessian):
        head = packed_tables(model, bits, hessian).head
        return (logits(with_tables(model, model, Tables(None, head)), ids) - exact).square().mean()

    assert error(head_inputs(model, model, 64)) < 0.3 * error(None)


def test_texts_decide_what_a_head_is_rounded_to(tmp_path):
    torch.manual_seed(0)
    model = tiny_llama(tie_word_embeddings=True)
    texts = [torch.randint(0, 16, (2, 20)) for _ in range(3)]  # a few tokens of the vocabulary
    ids = torch.randint(0, 16, (2, 12))
    export_onnx(model, tmp_path / "onnx", embedding_bits=4, calibration=texts)
    ours, other = twin(model, 4, texts), twin(model, 4)
    assert not torch.equal(ours.get_input_embeddings().weight, other.get_input_embeddings().weight)
    assert verify(ours, tmp_path / "onnx", ids).max_abs_difference < FP32


@pytest.mark.parametrize(("layers", "tied", "expected"), [(32, True, 64), (32, False, 32), (128, False, 128)])
def test_heads_have_wide_groups_and_no_table_narrower_ones_than_most_layers(layers, tied, expected):
    wide = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2, "head_dim": 64}
    model = quantize_model_(tiny_llama(**wide, tie_word_embeddings=tied), GroupQuantConfig(group_size=layers))
    tables = packed_tables(model, 4)
    assert (tables.embedding.group_size, tables.head.group_size) == (expected, max(64, layers))


def test_groups_divide_the_width():
    narrow = tiny_llama(hidden_size=96, num_attention_heads=2, head_dim=48)
    assert packed_tables(narrow, 4).head.group_size == 32


def test_the_model_stays_as_it_was(tmp_path):
    model = merged_llama()
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    before = table.weight.detach().clone()
    export_onnx(model, tmp_path / "onnx", embedding_bits=4)
    assert model.get_input_embeddings() is table
    assert model.get_output_embeddings() is head
    assert head.weight is table.weight
    torch.testing.assert_close(table.weight.detach(), before, rtol=0, atol=0)


def test_a_folder_that_is_read_twice_is_packed_once(tmp_path, monkeypatch):
    quantized = quantize_model_(tiny_llama(tie_word_embeddings=True), GroupQuantConfig())
    adapted = get_peft_model(quantized, QBLoRAConfig(r=2, quantization_aware=True, out_factor=2))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    merge(adapted).save_pretrained(tmp_path / "merged")
    options = {"embedding_bits": 8, "accuracy_level": 4}  # writes two graphs, and reads the folder for each
    packed = []
    monkeypatch.setattr(making, "packed_tables", lambda *args: packed.append(packed_tables(*args)) or packed[-1])
    report = export_onnx(tmp_path / "merged", tmp_path / "onnx", **options)
    assert len(packed) == 1
    assert report.parity.max_abs_difference < FP32
    assert all(layer.operator == "MatMulNBits" for layer in report.layers)


def test_adapters_that_are_not_merged_stay_beside_packed_tables(tmp_path):
    adapted = get_peft_model(tiny_llama(), QBLoRAConfig(r=2))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    ids, mask = padded_batch()
    export_onnx(adapted, tmp_path / "onnx", embedding_bits=8)
    assert verify(twin(adapted, 8), tmp_path / "onnx", ids, mask).max_abs_difference < FP32


def test_rows_that_the_model_scales_are_scaled_in_the_graph(tmp_path):
    model = build(*ARCHITECTURES["gemma3 with norms of heads"][:2])
    ids, mask = padded_batch()
    export_onnx(model, tmp_path / "float")
    assert stored_by_vocabulary(model, tmp_path / "float") == 1  # tied: once
    export_onnx(model, tmp_path / "packed", embedding_bits=8)
    packed = twin(model, 8)
    assert packed.get_input_embeddings().scale == pytest.approx(model.config.hidden_size**0.5)
    assert verify(packed, tmp_path / "packed", ids, mask).max_abs_difference < 10 * FP32  # logits of about 10
    expected = packed.generate(ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert torch.equal(greedy(tmp_path / "packed", ids, mask, 5), expected)


def test_tables_that_are_packed_already_stay_as_they_are(tmp_path):
    model = quantize_model_(tiny_llama(), GroupQuantConfig(quantize_embeddings=True))
    report = export_onnx(model, tmp_path / "onnx", embedding_bits=8)
    assert report.parity_embeddings.max_abs_difference == 0


@pytest.mark.parametrize("tied", [True, False])
def test_tables_with_fractional_zero_points_are_exact(tmp_path, tied):
    config = GroupQuantConfig(algorithm="hqq", quantize_embeddings=True)
    model = quantize_model_(tiny_llama(tie_word_embeddings=tied), config)
    assert model.get_input_embeddings().zeros.is_floating_point()
    ids, mask = padded_batch()
    for lowering in ("auto", "float_zero_point"):
        export_onnx(model, tmp_path / lowering, lowering=lowering)
        assert verify(model, tmp_path / lowering, ids, mask).max_abs_difference < 2e-5  # zero points rounded near 8


def test_a_float_model_with_packed_tables_is_still_said_to_stay_in_float(tmp_path, caplog):
    export_onnx(tiny_llama(), tmp_path / "float", embedding_bits=8)
    assert "no layer of this model is quantized" in caplog.text


def test_what_cannot_be_packed_is_refused_by_name(tmp_path):
    trained = get_peft_model(tiny_llama(), QBLoRAConfig(r=2, modules_to_save=["lm_head"]))
    with pytest.raises(ExportError, match=r"embedding_bits=4: .*ModulesToSaveWrapper cannot be packed. Merge"):
        export_onnx(trained, tmp_path / "onnx", embedding_bits=4)
    narrow = tiny_llama(hidden_size=40, num_attention_heads=2, num_key_value_heads=1, head_dim=20)
    with pytest.raises(ExportError, match="the embedding is 40 wide, which no group of 16 or more divides"):
        export_onnx(narrow, tmp_path / "onnx", embedding_bits=4)
    with pytest.raises(ExportError, match="embedding_bits=3 is not known; allowed: None, 4, 8"):
        export_onnx(narrow, tmp_path / "onnx", embedding_bits=3)
    assert not (tmp_path / "onnx").exists()


@pytest.mark.skipif(BEFORE_5, reason="not in transformers 4.57")
def test_a_model_that_reads_its_embeddings_weight_itself_is_refused(tmp_path):
    model = AutoModelForImageTextToText.from_config(VISION["gemma4, which reads a row of its embedding"]()).eval()
    with pytest.raises(ExportError, match=r"embedding_bits=4: a Gemma4\w+ does not run over a packed embedding"):
        export_onnx(model, tmp_path / "onnx", embedding_bits=4)
    assert not (tmp_path / "onnx").exists()
