"""The folder in the runtimes people use: ORTModelForCausalLM and ONNX Runtime GenAI, over architectures."""

import importlib
import json
from pathlib import Path

import onnx
import pytest
import torch
import transformers

from qbl_trl import export_onnx, verify
from qbl_trl.errors import ExportError
from qbl_trl.generation import BEFORE_5
from qbl_trl.onnx.companions import warn_of_towers
from qbl_trl.onnx.session import OnnxLogits
from qbl_trl.parity import logits_of
from tests.onnx.architectures import ARCHITECTURES, FUSED, GATED, TOKENS, VISION, build
from tests.onnx.models import PAD, both_generate, merged_llama, ort_model, padded_batch
from tests.tiny import tiny_tokenizer


@pytest.mark.parametrize("case", VISION)
def test_the_text_side_of_a_model_with_a_vision_tower_generates(tmp_path, case, caplog):
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(VISION[case]()).eval()
    assert export_onnx(model, tmp_path / "out").attention == "gqa"
    assert (
        f"a {type(model).__name__} reads images or sound, too: the graph will hold its text side alone" in caplog.text
    )
    expected, found = both_generate(model, tmp_path / "out")
    assert torch.equal(expected, found)


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_every_architecture_generates_what_the_torch_model_does(exported, case):
    made = exported(case)
    assert made.report.attention == ARCHITECTURES[case][2]
    assert made.report.parity_cached.max_abs_difference < 1e-5  # fp32 on both sides
    expected, found = both_generate(made.model, made.folder)
    assert torch.equal(expected, found)


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_a_decoder_of_text_is_not_said_to_read_more(case, caplog):
    warn_of_towers(build(*ARCHITECTURES[case][:2]))
    assert not caplog.records


@pytest.mark.parametrize("case", FUSED)
def test_every_fused_decoder_goes_on_over_its_cache_by_one_token_and_by_several(exported, case):
    made = exported(case)
    graph, (ids, mask) = OnnxLogits(made.folder), padded_batch()
    expected = logits_of(made.model)(ids, mask)
    shared = json.loads((made.folder / "genai_config.json").read_text())["search"]["past_present_share_buffer"]
    counts_buffer = ARCHITECTURES[case][0] == "Bart"  # for places, in model.onnx; model_genai.onnx does not
    for buffer in (0, 16) if shared and not counts_buffer else (0,):
        cache, found = graph.empty_cache(2, buffer), []
        for start, end in ((0, 4), (4, 5), (5, 9)):
            logits, cache = graph.step(ids[:, start:end], mask[:, :end], cache)
            found.append(logits)
        difference = (torch.cat(found, 1) - expected)[mask.bool()].abs().max()
        assert difference < 1e-5  # fp32 on both sides


def test_the_onnx_operator_is_refused_where_there_are_sinks(tmp_path):
    model = build(*ARCHITECTURES["gpt_oss with sinks and windows"][:2])
    with pytest.raises(ExportError, match="the Attention operator has no attention sinks"):
        export_onnx(model, tmp_path / "out", attention="attention")
    report = export_onnx(model, tmp_path / "cuda", provider="cuda")
    assert report.attention == "standard"
    assert "no kernel on CUDA for attention sinks" in report.attention_reason


@pytest.mark.parametrize("case", [name for name in FUSED if "sinks" not in name and "shared caches" not in name])
def test_the_onnx_operator_fits_wherever_group_query_attention_does_but_for_sinks(tmp_path, case):
    kind, settings, _ = ARCHITECTURES[case]
    report = export_onnx(build(kind, settings), tmp_path / "out", attention="attention")
    assert "Attention" in report.operators
    assert report.parity_cached.max_abs_difference < 1e-5  # fp32 on both sides


def test_gpt2_with_its_transposed_weights_is_exact(tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=100, n_positions=64, **TOKENS)
    model = transformers.GPT2LMHeadModel(config).eval()
    export_onnx(model, tmp_path / "out")
    expected, found = both_generate(model, tmp_path / "out")
    assert torch.equal(expected, found)


def test_biogpt_counts_the_mask_where_it_is_given_no_positions(tmp_path):
    model = build(*ARCHITECTURES["biogpt, which makes its mask by itself"][:2])
    export_onnx(model, tmp_path / "out")
    ids, mask = padded_batch()
    deployed = ort_model(tmp_path / "out")
    assert "position_ids" not in deployed.input_names
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
    found = deployed(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)  # fp32 on both sides


@pytest.mark.parametrize("attention", ["attention", "gqa"])
def test_beams_and_continued_generation_are_right(tmp_path, attention):
    model = merged_llama()
    export_onnx(model, tmp_path / "out", attention=attention)
    expected, found = both_generate(model, tmp_path / "out", num_beams=3)
    assert torch.equal(expected, found)
    deployed = ort_model(tmp_path / "out")
    ids = torch.arange(3, 15).unsqueeze(0)
    first = deployed(input_ids=ids[:, :7], attention_mask=torch.ones(1, 7, dtype=torch.long))
    rest = deployed(
        input_ids=ids[:, 7:],
        attention_mask=torch.ones(1, 12, dtype=torch.long),
        past_key_values=first.past_key_values,
        position_ids=torch.arange(7, 12).unsqueeze(0),
    )
    with torch.no_grad():
        whole = model(ids).logits[:, 7:]
    torch.testing.assert_close(rest.logits, whole, rtol=0, atol=5e-6)


@pytest.mark.parametrize("attention", ["attention", "gqa", "standard"])
def test_a_padded_batch_can_be_continued_by_several_tokens(tmp_path, attention):
    model = merged_llama()
    export_onnx(model, tmp_path / "out", attention=attention)
    graph, (ids, mask) = OnnxLogits(tmp_path / "out"), padded_batch()
    _, cache = graph.step(ids[:, :4], mask[:, :4], graph.empty_cache(2))
    rest, _ = graph.step(ids[:, 4:], mask, cache)
    torch.testing.assert_close(rest, graph(ids, mask)[:, 4:], rtol=0, atol=5e-6)


def test_verify_takes_an_ort_model(tmp_path):
    model = merged_llama()
    export_onnx(model, tmp_path / "out")
    deployed = ort_model(tmp_path / "out")
    assert verify(model, deployed, *padded_batch()).max_abs_difference < 5e-6


@pytest.mark.parametrize("attention", ["attention", "gqa"])
def test_positions_are_read_at_every_step(tmp_path, attention):
    model = merged_llama()
    export_onnx(model, tmp_path / "out", attention=attention)
    deployed = ort_model(tmp_path / "out")
    ids, cache, far = torch.arange(3, 11).unsqueeze(0), None, torch.tensor([[0, 1, 2, 3, 20, 21, 22, 40]])
    found = []
    for start, end in ((0, 4), (4, 5), (5, 8)):  # a prompt, one token, several tokens
        whole = torch.ones(1, end, dtype=torch.long)
        made = deployed(
            input_ids=ids[:, start:end], attention_mask=whole, past_key_values=cache, position_ids=far[:, start:end]
        )
        found.append(made.logits)
        cache = made.past_key_values
    with torch.no_grad():
        expected = model(ids, position_ids=far).logits
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=0, atol=5e-6)


def test_an_older_runtime_gets_the_operators_that_it_knows(tmp_path, monkeypatch):
    monkeypatch.setattr("onnxruntime.__version__", "1.31.1")
    assert export_onnx(merged_llama(), tmp_path / "auto").attention == "attention"
    report = export_onnx(merged_llama(), tmp_path / "gqa", attention="gqa")
    graph = onnx.load(tmp_path / "gqa" / "model.onnx", load_external_data=False).graph
    assert report.parity_cached.max_abs_difference < 1e-5  # fp32 on both sides
    assert all(len(node.input) == 11 for node in graph.node if node.op_type == "GroupQueryAttention")


def test_a_graph_without_position_ids_counts_the_text_and_not_the_buffer(tmp_path):
    # Optimum gives Gemma no position_ids; what the trace counts instead is as long as the buffer in GenAI.
    genai = pytest.importorskip("onnxruntime_genai")
    settings = {**GATED, "head_dim": 16, "tie_word_embeddings": False}
    model = build("Gemma", settings)
    report = export_onnx(model, tmp_path / "out", tokenizer=tiny_tokenizer())
    assert report.attention == "gqa"
    loaded = genai.Model(str(tmp_path / "out"))
    params = genai.GeneratorParams(loaded)
    params.set_search_options(max_length=60, min_length=60, do_sample=False)
    generator = genai.Generator(loaded, params)
    text = list(range(5, 45))  # longer than what the rotary table leaves behind a buffer of 60
    generator.append_tokens(text)
    for _ in range(4):
        found = torch.tensor(generator.get_logits()).reshape(-1, 100)[-1]
        with torch.no_grad():
            expected = model(torch.tensor([text])).logits[0, -1]
        seen = found > -1e30  # ends of text are ruled out
        torch.testing.assert_close(found[seen], expected[seen], rtol=0, atol=1e-5)
        generator.generate_next_token()
        text = generator.get_sequence(0).tolist()


@pytest.mark.skipif(not BEFORE_5, reason="Gemma is given positions where Optimum does not trace it")
@pytest.mark.parametrize("logits", ["all", "last"])
def test_a_buffer_is_shared_only_where_the_graph_is_right_in_one(tmp_path, monkeypatch, logits):
    model = build("Gemma", {**GATED, "head_dim": 16})
    monkeypatch.setattr("qbl_trl.onnx.attention.told_positions", lambda site: True)
    export_onnx(model, tmp_path / "out", logits=logits)
    config = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert config["search"]["past_present_share_buffer"] is False


def test_a_padded_batch_may_be_longer_than_its_positions(tmp_path):
    model = merged_llama(max_position_embeddings=32)
    export_onnx(model, tmp_path / "out")
    ids = torch.randint(3, 100, (2, 30), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, :12] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    deployed = ort_model(tmp_path / "out")
    assert torch.equal(model.generate(ids, **settings), deployed.generate(ids, **settings))


def test_the_recipe_binds_caches_that_optimum_guesses_wrong(tmp_path, monkeypatch):
    kind, settings, _ = ARCHITECTURES["qwen3 with its own head size"]
    model = build(kind, settings)
    export_onnx(model, tmp_path / "out", tokenizer=tiny_tokenizer())
    ort = pytest.importorskip("optimum.onnxruntime")
    load = ort.ORTModelForCausalLM.from_pretrained

    def on_cpu(folder, **options):
        return load(folder, **{**options, "provider": "CPUExecutionProvider"})

    monkeypatch.setattr(ort.ORTModelForCausalLM, "from_pretrained", on_cpu)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "recipes"))
    answer = importlib.import_module("export_onnx").answer(tmp_path / "out", "w5 w6 w7", "cuda", 4, 1)
    ids = torch.tensor([[5, 6, 7]])
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)[0, 3:]
    assert answer == tiny_tokenizer().decode(expected, skip_special_tokens=True)


def test_the_recipe_answers_by_genai_too(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime_genai")
    model = merged_llama()
    export_onnx(model, tmp_path / "out", tokenizer=tiny_tokenizer())
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "recipes"))
    answer = importlib.import_module("export_onnx").answer_by_genai(tmp_path / "out", "w5 w6 w7", "cpu", 4, 1)
    expected = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)[0, 3:]
    assert answer == tiny_tokenizer().decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("logits", ["all", "last"])
@pytest.mark.parametrize("provider", ["cpu", "cuda"])
def test_a_buffer_is_shared_where_it_can_be(tmp_path, logits, provider):
    export_onnx(merged_llama(), tmp_path / "out", logits=logits, provider=provider)
    config = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert config["search"]["past_present_share_buffer"] is True


def test_genai_is_not_told_to_make_a_buffer_for_the_longest_text(tmp_path):
    export_onnx(merged_llama(max_position_embeddings=8192), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert (config["model"]["context_length"], config["search"]["max_length"]) == (8192, 4096)


@pytest.mark.parametrize("attention", ["gqa", "attention", "standard"])
def test_another_turn_of_a_chat_goes_on_in_onnx_runtime_genai(tmp_path, attention):
    genai = pytest.importorskip("onnxruntime_genai")
    model = merged_llama()
    export_onnx(model, tmp_path / "out", attention=attention, tokenizer=tiny_tokenizer())
    loaded = genai.Model(str(tmp_path / "out"))
    params = genai.GeneratorParams(loaded)
    params.set_search_options(max_length=24, min_length=24, do_sample=False)
    generator = genai.Generator(loaded, params)
    said: list[int] = []
    for turn in ([5, 6, 7, 8, 9], [10, 11, 12]):
        # GenAI 0.18 leaves the last token it generated out of the cache, whatever the graph: it is read again, and one
        # more, because a cache that is no shared buffer is not cut to the length that it has.
        last = said[-2:]
        if last:
            generator.rewind_to(len(said) - 2)
        said += turn
        generator.append_tokens([*last, *turn])
        for _ in range(4):
            generator.generate_next_token()
        answer = model.generate(torch.tensor([said]), max_new_tokens=4, min_new_tokens=4, do_sample=False)[0].tolist()
        assert generator.get_sequence(0).tolist() == answer
        said = answer


@pytest.mark.parametrize("logits", ["all", "last"])
@pytest.mark.parametrize("attention", ["attention", "gqa"])
def test_the_same_folder_runs_in_onnx_runtime_genai(tmp_path, attention, logits):
    genai = pytest.importorskip("onnxruntime_genai")
    model = merged_llama()
    export_onnx(model, tmp_path / "out", attention=attention, logits=logits, tokenizer=tiny_tokenizer())
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    ids = padded_batch()[0][1].tolist()
    loaded = genai.Model(str(tmp_path / "out"))
    params = genai.GeneratorParams(loaded)
    params.set_search_options(max_length=len(ids) + 8, min_length=len(ids) + 8, do_sample=False)
    generator = genai.Generator(loaded, params)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    expected = model.generate(torch.tensor([ids]), max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert generator.get_sequence(0).tolist() == expected[0].tolist()


def test_a_traced_graph_states_the_sizes_of_its_caches_too(tmp_path):
    kind, settings, _ = ARCHITECTURES["qwen3 with its own head size"]
    export_onnx(build(kind, settings), tmp_path / "out", attention="standard")
    decoder = json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]["decoder"]
    assert (decoder["head_size"], decoder["num_key_value_heads"]) == (32, 2)


def test_the_genai_configuration_says_what_the_graph_holds(tmp_path):
    export_onnx(merged_llama(), tmp_path / "out", max_length=48)
    config = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    decoder = config["model"]["decoder"]
    assert (decoder["head_size"], decoder["num_key_value_heads"]) == (16, 2)
    assert config["search"]["past_present_share_buffer"] is True
    assert (config["model"]["context_length"], config["search"]["max_length"]) == (48, 48)
    assert config["model"]["eos_token_id"] == PAD
