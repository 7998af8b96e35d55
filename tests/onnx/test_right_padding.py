"""Batches as ONNX Runtime GenAI pads them: on the right, each row's next token at the row's own end."""

import json

import onnx
import onnx_ir as ir
import pytest
import torch

from qbl_trl import export_onnx
from qbl_trl.generation import BEFORE_5
from qbl_trl.onnx.gate import Gate
from qbl_trl.onnx.session import OnnxLogits
from tests.onnx.architectures import ARCHITECTURES, FUSED, PADDED, build, build_named
from tests.onnx.models import PAD, merged_llama, operators
from tests.tiny import tiny_tokenizer, tokens

ROWS, MORE = (tokens(1, 12)[0], tokens(1, 4, seed=1)[0]), tokens(2, 5, seed=2)  # MORE: tokens that follow each row
FP32 = 1e-5


def in_genais_way(graph, buffer=24):
    """Logits of the rows' last tokens and of those that follow, (2, 1 + 5, V)."""
    longest = max(len(row) for row in ROWS)
    ids = torch.stack([torch.nn.functional.pad(row, (0, longest - len(row)), value=PAD) for row in ROWS])
    mask = torch.stack([(torch.arange(longest) < len(row)).long() for row in ROWS])
    logits, cache = graph.step(ids, mask, graph.empty_cache(2, buffer))
    last = [0, 0] if logits.shape[1] == 1 else [len(row) - 1 for row in ROWS]
    parts = [torch.stack([row[place] for row, place in zip(logits, last, strict=True)]).unsqueeze(1)]
    for place in range(MORE.shape[1]):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        logits, cache = graph.step(MORE[:, place : place + 1], mask, cache)
        parts.append(logits)
    return torch.cat(parts, 1)


def one_by_one(model):
    """The same from the torch model, every row alone and without padding."""
    with torch.no_grad():
        whole = [model(torch.cat([row, more]).unsqueeze(0)).logits[0] for row, more in zip(ROWS, MORE, strict=True)]
    return torch.stack([row[-MORE.shape[1] - 1 :] for row in whole])


@pytest.mark.parametrize("case", [*FUSED, *PADDED])
@pytest.mark.parametrize("options", [{}, {"logits": "last"}], ids=["all", "last"])
def test_rows_of_different_lengths_are_read_as_if_alone(exported, case, options):
    made = exported(case, **options)
    named = json.loads((made.folder / "genai_config.json").read_text())["model"]["decoder"]["filename"]
    assert named == "model_genai.onnx"
    found = in_genais_way(OnnxLogits(made.folder / named))
    torch.testing.assert_close(found, one_by_one(made.model), rtol=0, atol=FP32)


@pytest.mark.parametrize("case", ["mistral with a window", "the decoder of bart"])
@pytest.mark.parametrize("options", [{"kv_cache_dtype": "int8"}, {"accuracy_level": 4, "prompt_accuracy_level": 0}])
def test_a_cache_of_8_bits_and_levels_keep_the_rows_apart(tmp_path, case, options):
    model = build(*ARCHITECTURES[case][:2])
    report = export_onnx(model, tmp_path / "out", lowering="factored", **options)
    found = in_genais_way(OnnxLogits(tmp_path / "out" / "model_genai.onnx"))
    expected = one_by_one(model)
    tolerance = float(expected.abs().max()) / 20  # as 8 bits round
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    assert report.parity_as_written.max_abs_difference < tolerance


def test_the_graph_shares_weights_and_holds_nothing_it_does_not_read(tmp_path):
    export_onnx(merged_llama(), tmp_path / "out")
    own = tmp_path / "out" / "model_genai.onnx"
    onnx.checker.check_model(str(own), full_check=True)
    graph = onnx.load(own, load_external_data=False).graph
    values = {name for node in ir.from_proto(graph).all_nodes() for name in (v.name for v in node.inputs if v)}
    assert {weight.name for weight in graph.initializer} <= values
    assert "If" not in operators(own)
    biases = [node.input[10] for node in graph.node if node.op_type == "GroupQueryAttention"]
    assert biases == ["", ""]


def test_a_graph_that_reads_padding_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(Gate, "_right_padded", lambda gate, graph: gate.measure(OnnxLogits(tmp_path / "other"))[0])
    other = merged_llama()
    other.model.layers[0].self_attn.o_proj.set_delta(torch.ones(32, 2), 32, 2)
    export_onnx(other, tmp_path / "other", attention="attention")
    for name, options in (("exact", {}), ("digits", {"accuracy_level": 4})):
        export_onnx(merged_llama(), tmp_path / name, **options)
        assert [file.name for file in (tmp_path / name).glob("*.onnx")] == ["model.onnx"]
        config = json.loads((tmp_path / name / "genai_config.json").read_text())
        assert config["model"]["decoder"]["filename"] == "model.onnx"


NEW = [] if BEFORE_5 else ["gemma4 with shared caches", "gemma3n with shared caches"]


@pytest.mark.parametrize("case", ["mistral with a window", "pegasus with positions as sinusoids", *NEW])
def test_onnx_runtime_genai_generates_for_a_batch_of_different_lengths(tmp_path, case):
    genai = pytest.importorskip("onnxruntime_genai")
    model = build_named(case)
    model.generation_config.forced_eos_token_id = None  # Bart's, which GenAI does not know
    export_onnx(model, tmp_path / "out", tokenizer=tiny_tokenizer())
    loaded = genai.Model(str(tmp_path / "out"))
    params = genai.GeneratorParams(loaded)
    longest = max(len(row) for row in ROWS)
    params.set_search_options(max_length=longest + 8, min_length=longest + 8, do_sample=False, batch_size=2)
    generator = genai.Generator(loaded, params)
    padded = torch.stack([torch.nn.functional.pad(row, (0, longest - len(row)), value=PAD) for row in ROWS])
    generator.append_tokens(padded.int().numpy())
    while not generator.is_done():
        generator.generate_next_token()
    for place, row in enumerate(ROWS):
        expected = model.generate(row.unsqueeze(0), max_new_tokens=8, min_new_tokens=8, do_sample=False)[0, len(row) :]
        assert generator.get_sequence(place)[longest:].tolist() == expected.tolist()
