"""What lies around an export: where models, tokenizers and folders come from, and what verify says of a graph."""

import errno
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import onnx
import pytest
import torch
import transformers
from peft import PeftMixedModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qbl_trl import GroupQuantConfig, QBLoRAConfig, export_onnx, verify
from qbl_trl.cli import main
from qbl_trl.errors import CheckpointError, ConfigError, ExportError
from qbl_trl.generation import BEFORE_5
from qbl_trl.onnx import export
from qbl_trl.onnx.companions import Held
from qbl_trl.onnx.files import MODEL_FILE
from qbl_trl.onnx.reference import float32_reference
from qbl_trl.onnx.session import OnnxLogits
from qbl_trl.onnx.skeleton import build_skeleton
from qbl_trl.onnx.sources import linear_sources
from qbl_trl.parity import compare, logits_of
from qbl_trl.quant.hf_quantizer import quantize_model_
from qbl_trl.tokenizers import save_tokenizer
from tests.onnx.architectures import ARCHITECTURES, GATED, build_named
from tests.onnx.models import merged_llama
from tests.tiny import tiny_llama, tiny_tokenizer, tokens


@pytest.fixture
def adapter_without_tokenizer(tmp_path):
    """An adapter as `save_pretrained` of a PeftModel leaves it, over a base that has a tokenizer."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(100)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    base = quantize_model_(tiny_llama(vocab_size=100, intermediate_size=128), GroupQuantConfig())
    base.save_pretrained(tmp_path / "base")
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(tmp_path / "base")
    base.config._name_or_path = base.name_or_path = str(tmp_path / "base")
    model = get_peft_model(base, QBLoRAConfig(r=4, quantization_aware=True, init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, torch.compile, PeftMixedModel])
def test_a_wrapped_model_is_exported_as_the_one_inside(wrap, tmp_path):
    if wrap is PeftMixedModel:
        model = PeftMixedModel(merged_llama(), QBLoRAConfig(r=4, init_lora_weights=False), "default").eval()
        expected = logits_of(model)(tokens(), torch.ones_like(tokens()))
    else:
        expected, model = logits_of(merged_llama())(tokens(), torch.ones_like(tokens())), wrap(merged_llama())
    export_onnx(model, tmp_path / "graph")
    found = OnnxLogits(tmp_path / "graph")(tokens(), torch.ones_like(tokens()))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)  # sums in another order


def test_the_tokenizer_of_an_adapter_is_that_of_its_base(adapter_without_tokenizer, tmp_path, capsys):
    adapter, graph, merged = str(adapter_without_tokenizer), str(tmp_path / "graph"), str(tmp_path / "merged")
    assert main(["export", adapter, graph]) == 0
    assert main(["merge", adapter, merged]) == 0
    assert main(["merge", adapter, f"{merged}-again", "--base", str(tmp_path / "base")]) == 0
    assert main(["verify", adapter, graph, "--text", "w5 w6 w7"]) == 0
    for folder in (graph, merged, f"{merged}-again"):
        assert PreTrainedTokenizerFast.from_pretrained(folder)("w5 w6").input_ids == [5, 6]


def test_a_folder_without_a_tokenizer_is_said_to_have_none(tmp_path, caplog):
    quantize_model_(tiny_llama(intermediate_size=128), GroupQuantConfig()).save_pretrained(tmp_path / "model")
    export_onnx(tmp_path / "model", tmp_path / "out")
    assert "written without a tokenizer" in caplog.text


def test_a_folder_of_links_is_no_tampered_one(tmp_path, exported):
    """As the cache of the hub holds files."""
    found = exported(next(iter(ARCHITECTURES)))
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for number, file in enumerate(found.folder.iterdir()):
        shutil.copyfile(file, tmp_path / "blobs" / str(number))
        os.symlink(f"../blobs/{number}", tmp_path / "snapshot" / file.name)
    assert verify(found.model, tmp_path / "snapshot", tokens()).max_abs_difference <= 1e-3


def test_a_graph_may_be_named_from_anywhere(tmp_path, monkeypatch, exported):
    found = exported(next(iter(ARCHITECTURES)))
    monkeypatch.chdir(found.folder)
    assert verify(found.model, f"../{found.folder.name}", tokens()).max_abs_difference <= 1e-3


def test_a_base_whose_tokenizer_does_not_open_costs_a_warning(adapter_without_tokenizer, tmp_path, caplog):
    for file in (tmp_path / "base").glob("*token*"):
        file.unlink()
    (tmp_path / "base" / "tokenizer_config.json").write_text('{"tokenizer_class": "NoSuchTokenizer"}')
    config = adapter_without_tokenizer / "adapter_config.json"
    config.write_text(config.read_text().replace(str(tmp_path / "base"), "nobody/no-such-model"))
    folder = tmp_path / "out"
    folder.mkdir()
    save_tokenizer(str(adapter_without_tokenizer), folder)
    assert "that of nobody/no-such-model does not open" in caplog.text


def test_attention_in_half_precision_is_no_reference(tmp_path):
    """FlashAttention has no other; the graph is held against the same model in float32."""

    def in_half(module, query, key, value, *args, **kwargs):
        parts = (tensor.to(torch.bfloat16) for tensor in (query, key, value))
        output, weights = sdpa_attention_forward(module, *parts, *args, **{**kwargs, "attention_mask": None})
        return output.to(query.dtype), weights

    AttentionInterface.register("in_half", in_half)
    model = merged_llama()
    model.config._attn_implementation = "in_half"
    reference = float32_reference(model)
    assert reference is not model
    assert reference.model.norm.weight is model.model.norm.weight  # no second copy in memory
    assert export_onnx(model, tmp_path / "out").parity.max_abs_difference <= 1e-4
    assert model.config._attn_implementation == "in_half"


@pytest.mark.parametrize("case", ["opt with learned positions", "stablelm, which calls torch's attention"])
def test_what_the_trace_runs_is_brought_to_the_cpu(case):
    """A norm on the meta device stands for one on a GPU: it has no values to bring, and is asked for them."""
    model = build_named(case)
    norm = next(module for module in model.modules() if isinstance(module, torch.nn.LayerNorm))
    norm.weight = torch.nn.Parameter(norm.weight.detach().to("meta"))
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        build_skeleton(model, linear_sources(model), torch.float32, fused_attention=False)


@pytest.mark.parametrize("case", ["llama4, which attends in chunks"])
def test_a_router_chooses_in_float32_where_the_graph_is_in_bfloat16(tmp_path, case):
    export_onnx(build_named(case), tmp_path / "out", provider="cuda", dtype="bfloat16")
    graph = onnx.load(tmp_path / "out" / MODEL_FILE, load_external_data=False).graph
    choices = [node for node in graph.node if node.op_type == "TopK"]
    made = {name: node for node in graph.node for name in node.output}
    assert choices
    assert all(made[node.input[0]].op_type == "Cast" for node in choices)


def test_an_export_inside_autocast_is_the_same(tmp_path):
    with torch.autocast("cpu", torch.bfloat16):
        report = export_onnx(merged_llama(), tmp_path / "out")
    assert report.parity.max_abs_difference <= 1e-4


def test_threads_that_export_at_once_wait_for_each_other(tmp_path, monkeypatch):
    tracing, together, trace = [], [], export.make_exact

    def watched(*args):
        tracing.append(args)
        together.append(len(tracing))
        time.sleep(0.5)  # long enough for another thread to come here, too
        made = trace(*args)
        tracing.pop()
        return made

    monkeypatch.setattr(export, "make_exact", watched)
    models = [quantize_model_(tiny_llama(seed=seed), GroupQuantConfig()) for seed in (0, 1)]
    with ThreadPoolExecutor() as threads:
        reports = list(threads.map(export_onnx, models, [tmp_path / "one", tmp_path / "other"]))
    assert together == [1, 1]
    for model, report in zip(models, reports, strict=True):
        assert verify(model, report.path, tokens()).max_abs_difference < 1e-4


def test_a_full_disk_under_the_trace_is_named(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.onnx.export", full)
    with pytest.raises(ExportError, match=r"TMPDIR.*No space left on device"):
        export_onnx(merged_llama(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_verify_says_why_a_graph_does_not_run(tmp_path):
    model = merged_llama()
    export_onnx(model, tmp_path / "short", max_length=16)
    with pytest.raises(ExportError, match=r"does not run on these 40 tokens \(longer than its max_length"):
        verify(tmp_path / "short", tmp_path / "short", tokens(1, 40))
    export_onnx(model, tmp_path / "cuda", provider="cuda", dtype="bfloat16")
    with pytest.raises(ExportError, match="CPU provider does not open this graph"):
        verify(model, tmp_path / "cuda", tokens())


@pytest.mark.skipif(not BEFORE_5, reason="transformers 5 has graphs of them")
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
        ("GraniteMoeHybrid", {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 16}),
    ],
)
def test_transformers_5_is_named_where_states_have_graphs_with_it(tmp_path, monkeypatch, kind, settings):
    config = getattr(transformers, f"{kind}Config")(**GATED, **settings)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    monkeypatch.setattr(Held, "linears", lambda held: pytest.fail("work began"))
    with pytest.raises(ExportError, match=r"states beside keys and values, have graphs with transformers 5 alone"):
        export_onnx(model, tmp_path / "out")


def test_a_graph_does_not_take_the_place_of_what_it_is_made_from(adapter_without_tokenizer, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for given in (adapter_without_tokenizer, model, get_peft_model(model, QBLoRAConfig(r=4))):
        with pytest.raises(ExportError, match=r"would replace .*base, which it is made from"):
            export_onnx(given, tmp_path / "base", overwrite=True)
    assert main(["export", str(adapter_without_tokenizer), str(tmp_path / "base"), "--overwrite"]) == 1
    assert "which it is made from" in capsys.readouterr().err
    assert (tmp_path / "base" / "model.safetensors").is_file()


def test_a_tokenizer_that_was_asked_for_is_there_or_nothing_is(tmp_path, monkeypatch):
    model = merged_llama()
    words = tmp_path / "words"
    tiny_tokenizer().save_pretrained(words)
    (words / "tokenizer.json").write_text((words / "tokenizer.json").read_text()[:-9])
    with pytest.raises(ExportError, match=r"words' holds files that cannot be read"):
        export_onnx(model, tmp_path / "out", tokenizer=words)

    def full(source, folder):
        (folder / "tokenizer.json").write_text("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("qbl_trl.onnx.companions.save_tokenizer", full)
    with pytest.raises(ExportError, match="No space left on device; nothing was written"):
        export_onnx(model, tmp_path / "out", tokenizer=tiny_tokenizer())
    assert not (tmp_path / "out").exists()


def test_the_settings_of_the_callers_model_stay_as_they_are(tmp_path):
    model = merged_llama()
    model.config.use_cache = False
    before = model.config.to_dict()
    export_onnx(model, tmp_path / "out")
    assert model.config.to_dict() == before


OPTIONS = [
    {"embedding_bits": 8, "accuracy_level": 4, "prompt_weights": "int8"},
    {"attention": "standard"},
    {"dtype": "float16"},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_the_caller_has_set_for_new_tensors_is_no_matter(tmp_path, dtype, options):
    model = merged_llama()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            export_onnx(model, tmp_path / "out", **options)
    finally:
        torch.set_default_dtype(torch.float32)
    export_onnx(model, tmp_path / "again", **options)
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_generation_settings_mean_the_same_to_onnx_runtime_genai(tmp_path):
    model = merged_llama()
    model.generation_config.update(do_sample=True, top_k=0, eos_token_id=None)
    model.config.eos_token_id = None
    export_onnx(model, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert written["search"]["top_k"] == 0  # all tokens
    assert written["model"]["eos_token_id"] == []  # 0 would be a token
    model.generation_config.update(top_p=0.0, min_length=20)
    export_onnx(model, tmp_path / "best")
    search = json.loads((tmp_path / "best" / "genai_config.json").read_text())["search"]
    assert (search["top_k"], search["top_p"], search["min_length"]) == (1, 1.0, 20)  # the best token alone


@pytest.mark.skipif(BEFORE_5, reason="its decoder gives no cache in transformers 4.57")
def test_a_configuration_that_names_no_special_tokens_has_a_graph(tmp_path):
    sizes = {f"{part}_{name}": 32 for part in ("pronunciation", "shape") for name in ("vocab_size", "embed_dim")}
    settings = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.RoCBertConfig(vocab_size=100, is_decoder=True, **sizes, **settings)
    decoder = transformers.RoCBertForCausalLM(config).eval()
    report = export_onnx(quantize_model_(decoder, GroupQuantConfig()), tmp_path / "out")
    assert report.parity.max_abs_difference < 2e-5
    assert json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]["eos_token_id"] == []


@pytest.mark.parametrize("lost", ["lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"])
def test_a_folder_that_lacks_a_float_tensor_is_no_model(tmp_path, lost):
    quantize_model_(tiny_llama(), GroupQuantConfig()).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    held = load_file(file)
    del held[lost]
    save_file(held, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"the files lack 1 of the model's tensors \({lost}, ...\)"):
        export_onnx(tmp_path / "model", tmp_path / "out")
    with pytest.raises(CheckpointError, match="the files lack 1"):
        verify(tmp_path / "model", merged_llama(), tokens())
    assert not (tmp_path / "out").exists()


def test_a_graph_that_was_cut_is_named(tmp_path, exported):
    found = exported(next(iter(ARCHITECTURES)))
    copy = shutil.copytree(found.folder, tmp_path / "copy")
    whole = (copy / MODEL_FILE).read_bytes()
    for content in (whole[:5000], b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"):
        (copy / MODEL_FILE).write_bytes(content)
        with pytest.raises(ExportError, match=r"model.onnx is no whole ONNX graph .*; copy or export it again"):
            verify(found.model, copy, tokens())


def test_vectors_before_a_text_have_no_place_in_a_graph(tmp_path):
    base = quantize_model_(tiny_llama(), GroupQuantConfig())
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    for tolerance in (1e-3, None):
        with pytest.raises(ExportError, match="prompt and prefix tuning put trained vectors before"):
            export_onnx(model, tmp_path / "out", tolerance=tolerance)


def test_steps_that_are_far_off_are_not_hidden_behind_prompts_that_are_exact(tmp_path):
    model = merged_llama(tie_word_embeddings=False)
    model.lm_head.weight.data *= 30
    with pytest.raises(ExportError, match="the graph is no longer the model"):
        export_onnx(model, tmp_path / "out", kv_cache_dtype="int8", calibration=[torch.tensor([[5]])])
    report = export_onnx(model, tmp_path / "out", accuracy_level=4, prompt_accuracy_level=0)
    ids, length = tokens(8, 60, seed=1), 20
    expected = logits_of(model)(ids, torch.ones_like(ids))
    found = OnnxLogits(tmp_path / "out").with_cache(ids, torch.ones_like(ids), length)
    told, steps = report.parity_as_written.kl_per_token, compare(expected[:, length:], found[:, length:]).kl_per_token
    assert steps / 4 < told < 4 * steps


def test_a_tokenizer_that_nobody_asked_for_costs_a_warning(tmp_path, monkeypatch, caplog):
    def unreadable(source, folder):
        raise NotADirectoryError(errno.ENOTDIR, "Not a directory")

    monkeypatch.setattr("qbl_trl.onnx.companions.save_tokenizer", unreadable)
    model = merged_llama()
    model.config._name_or_path = "org/some-model"
    export_onnx(model, tmp_path / "out")
    assert "written without a tokenizer: [Errno 20] Not a directory" in caplog.text


def test_generation_settings_that_cannot_be_saved_are_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("qbl_trl.onnx.making.Gate.on_noise", lambda *args: pytest.fail("it worked"))
    model = merged_llama()
    model.generation_config.pad_token_id = -1
    with pytest.raises(ConfigError, match="pad_token_id"):
        export_onnx(model, tmp_path / "out")


def test_a_row_of_padding_alone_does_not_count_for_a_graph_of_last_logits(tmp_path):
    model = merged_llama()
    export_onnx(model, tmp_path / "out", logits="last")
    mask = torch.ones_like(tokens())
    mask[1] = 0
    found = verify(model, tmp_path / "out", tokens(), mask)
    assert found.tokens == 1
    assert found.max_abs_difference < 2e-5


def test_a_disk_that_fails_under_the_tokenizer_is_no_reason_to_do_without(tmp_path, monkeypatch):
    quantize_model_(tiny_llama(), GroupQuantConfig()).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    copy = shutil.copyfile

    def failing(source, target, **options):
        if str(target).endswith("tokenizer.json"):
            raise OSError(errno.EIO, "Input/output error", str(target))
        return copy(source, target, **options)

    monkeypatch.setattr(shutil, "copyfile", failing)
    with pytest.raises(OSError, match="Input/output error"):
        export_onnx(tmp_path / "model", tmp_path / "graph")
    assert not (tmp_path / "graph").exists()


def test_the_decoder_of_a_larger_encoder_is_exported(tmp_path):
    sizes = {"d_model": 64, "encoder_layers": 3, "decoder_layers": 1, "vocab_size": 100, "max_position_embeddings": 64}
    heads = {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
    widths = {f"{part}_ffn_dim": 96 for part in ("encoder", "decoder")}
    config = transformers.BartConfig(**sizes, **heads, **widths, is_decoder=True, is_encoder_decoder=False)
    model = quantize_model_(transformers.BartForCausalLM(config).eval(), GroupQuantConfig())
    report = export_onnx(model, tmp_path)
    assert report.parity.max_abs_difference < 1e-4
