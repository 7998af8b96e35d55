"""What lies around an export: where models, tokenizers and folders come from, and what verify says of a graph."""

import os
import shutil

import onnx
import pytest
import torch
import transformers
from peft import get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AttentionInterface, PreTrainedTokenizerFast
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qbl_trl import GroupQuantConfig, QBLoRAConfig, export_onnx, verify
from qbl_trl.cli import main
from qbl_trl.errors import ExportError
from qbl_trl.generation import BEFORE_5
from qbl_trl.onnx.companions import Held
from qbl_trl.onnx.files import MODEL_FILE
from qbl_trl.onnx.reference import float32_reference
from qbl_trl.onnx.skeleton import build_skeleton
from qbl_trl.onnx.sources import linear_sources
from qbl_trl.quant.hf_quantizer import quantize_model_
from qbl_trl.tokenizers import save_tokenizer
from tests.onnx.architectures import ARCHITECTURES, GATED, build_named
from tests.onnx.models import merged_llama
from tests.tiny import tiny_llama, tokens


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
