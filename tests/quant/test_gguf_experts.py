"""Mixtures of experts in GGUF files: every expert's slice of a stack becomes a layer of its own, codes untouched."""

import json

import numpy as np
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from qbl_trl import QBLoRAConfig, merge
from qbl_trl.errors import CheckpointError, ConfigError
from qbl_trl.generation import BEFORE_5
from qbl_trl.quant.importers import convert_checkpoint, describe_checkpoint, read_layers
from qbl_trl.quant.linear import GroupQuantLinear
from qbl_trl.quant.writers import write_checkpoint
from tests.quant.foreign_gguf import put_on_grid_, stacks_of, write_gguf
from tests.tiny import SIZES, logits, tokens

gguf = pytest.importorskip("gguf", reason="the GGUF importer needs the package gguf")

FLOAT = {"embed": "F32", "lm_head": "F32"}
COUNTS = {"expert_count": 4, "expert_used_count": 2}
PARTS, MIXTRAL = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")
QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
CASES = {  # architecture -> model type, settings, metadata
    "qwen2moe": (
        "qwen2_moe",
        {**QWEN, "shared_expert_intermediate_size": 64, "norm_topk_prob": False},
        {"expert_feed_forward_length": 32, "expert_shared_feed_forward_length": 64},
    ),
    "qwen3moe": (
        "qwen3_moe",
        {**QWEN, "norm_topk_prob": True, "head_dim": 32},
        {"expert_feed_forward_length": 32, "attention.key_length": 32},
    ),
    "llama": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_theta": 10000.0}, {}),
    "minimax-m2": (
        "minimax_m2",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "rotary_dim": 8, "rope_theta": 10000.0},
        {"attention.key_length": 16, "attention.value_length": 16, "rope.dimension_count": 8, "expert_gating_func": 2},
    ),
}
NEWER = "minimax-m2"  # no model of transformers 4.57
needs_5 = pytest.mark.skipif(BEFORE_5, reason="a model of transformers 5")
architectures = pytest.mark.parametrize(
    "architecture", [pytest.param(name, marks=[needs_5] if name == NEWER else []) for name in CASES]
)


def mixture(architecture, **changes):
    model_type, settings, _ = CASES[architecture]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **settings, "tie_word_embeddings": False, **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if ".experts." in name:  # transformers leaves them small
            parameter.data = torch.randn_like(parameter) * 0.1
    for name, buffer in model.named_buffers():
        if "e_score_correction" in name:
            buffer.copy_(torch.randn_like(buffer) * 0.1)
    return model


def write(path, model, types=None, default="Q4_1", architecture="qwen3moe", **fields):
    fields = {**COUNTS, **CASES[architecture][2], **fields}
    write_gguf(path, model, {**(types or {}), **FLOAT}, default, architecture=architecture, fields=fields)
    return path


def expert_names(architecture, layer=1, expert=3):
    block, parts = ("mlp", PARTS) if "qwen" in architecture else ("block_sparse_moe", MIXTRAL)
    return [f"model.layers.{layer}.{block}.experts.{expert}.{part}" for part in parts]


def tensors_of(path):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def slices(path, architecture):
    """Name in files -> what the package gguf makes of an expert's part of the file."""
    tensors = tensors_of(path)
    for layer in range(2):
        for kind, place in zip(("gate", "up", "down"), range(3), strict=True):
            raw = tensors[f"blk.{layer}.ffn_{kind}_exps.weight"]
            for expert in range(4):
                whole = gguf.quants.dequantize(raw.data, raw.tensor_type)
                yield expert_names(architecture, layer, expert)[place], torch.from_numpy(whole[expert].copy())


@architectures
def test_a_mixture_is_the_model_it_was_written_from(tmp_path, architecture):
    model = mixture(architecture)
    put_on_grid_(model)
    write(tmp_path / "in.gguf", model, default="Q8_0", architecture=architecture)
    convert_checkpoint(tmp_path / "in.gguf", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    packed = [name for name, m in loaded.named_modules() if isinstance(m, GroupQuantLinear) and ".experts." in name]
    assert len(packed) == 2 * 4 * 3
    ids = tokens(length=24)
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), rtol=0, atol=2e-5)  # order of sums


@architectures
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_every_expert_has_the_weight_of_its_slice(tmp_path, architecture, kind):
    write(tmp_path / "in.gguf", mixture(architecture), default=kind, architecture=architecture)
    layers = dict(read_layers(tmp_path / "in.gguf"))
    for name, expected in slices(tmp_path / "in.gguf", architecture):
        tolerance = 0 if kind != "Q4_1" else 2e-7  # -m / d is rounded to float32: |m| < 1 times 2**-23
        torch.testing.assert_close(layers[name].dequantize(), expected, rtol=0, atol=tolerance)


def test_codes_and_scales_of_experts_are_those_of_the_file(tmp_path):
    write(tmp_path / "in.gguf", mixture("qwen3moe"))
    raw = tensors_of(tmp_path / "in.gguf")["blk.1.ffn_down_exps.weight"].data
    layer = dict(read_layers(tmp_path / "in.gguf"))[expert_names("qwen3moe")[2]]
    codes, scales, _ = layer.affine()
    assert scales.shape == (64, 1)
    for row, block in enumerate(np.array(raw[3])):
        assert scales[row, 0].numpy() == block[:2].copy().view(np.float16)
        assert codes[row].tolist() == [*(block[4:] & 15), *(block[4:] >> 4)]


def test_stacks_of_other_types_are_dequantized_expert_by_expert(tmp_path, monkeypatch):
    model = mixture("qwen3moe", hidden_size=256)
    write(tmp_path / "in.gguf", model, {"experts.gate_proj": "BF16", "experts.down_proj": "F16"}, default="Q4_0")
    expected = dict(slices(tmp_path / "in.gguf", "qwen3moe"))
    sizes, dequantize = [], gguf.quants.dequantize
    monkeypatch.setattr(gguf.quants, "dequantize", lambda data, kind: sizes.append(data.ndim) or dequantize(data, kind))
    convert_checkpoint(tmp_path / "in.gguf", tmp_path / "out")
    assert max(sizes) == 2  # never a whole stack
    stored = load_file(tmp_path / "out" / "model.safetensors")
    gate, up, down = expert_names("qwen3moe")
    assert torch.equal(stored[f"{gate}.weight"], expected[gate])
    assert torch.equal(stored[f"{down}.weight"], expected[down])
    assert stored[f"{up}.weight"].dtype == torch.uint8

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    reference = mixture("qwen3moe", hidden_size=256)
    reference.load_state_dict(loaded.dequantize().state_dict())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for index, part, values in stacks_of(reference):
        names = [expert_names("qwen3moe", index, expert)[PARTS.index(part)] for expert in range(4)]
        assert torch.equal(torch.from_numpy(values), torch.stack([expected[name] for name in names]))
    torch.testing.assert_close(logits(again, tokens()), logits(reference, tokens()), rtol=0, atol=1e-5)  # order of sums


@architectures
def test_names_in_the_folder_are_those_that_every_version_reads(tmp_path, architecture):
    write(tmp_path / "in.gguf", mixture(architecture), architecture=architecture)
    convert_checkpoint(tmp_path / "in.gguf", tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    gate, up, down = expert_names(architecture)
    assert {f"{name}.{part}" for name in (gate, up, down) for part in ("weight", "scales", "zeros")} <= set(stored)
    block = gate.rpartition(".experts.")[0]
    assert stored[f"{block}.gate.weight"].dtype == torch.float32
    assert stored[f"{block}.gate.weight"].shape == (4, 64)
    if architecture == "qwen2moe":
        assert stored[f"{block}.shared_expert_gate.weight"].shape == (1, 64)
        assert stored[f"{block}.shared_expert.up_proj.weight"].dtype == torch.uint8
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == CASES[architecture][0]
    assert config["num_experts_per_tok"] == 2


def test_sizes_that_a_file_does_not_state_follow_as_llama_cpp_takes_them(tmp_path):
    changes = {"intermediate_size": 64, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}
    model = mixture("qwen2moe", **changes)
    put_on_grid_(model)
    write(
        tmp_path / "in.gguf",
        model,
        default="Q8_0",
        architecture="qwen2moe",
        expert_feed_forward_length=0,
        expert_shared_feed_forward_length=0,
    )
    convert_checkpoint(tmp_path / "in.gguf", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded, tokens()), logits(model, tokens()), rtol=0, atol=2e-5)


def test_a_router_that_a_file_holds_in_codes_becomes_float(tmp_path):
    write(tmp_path / "in.gguf", mixture("qwen2moe"), {".gate.weight": "Q8_0"}, architecture="qwen2moe")
    described = describe_checkpoint(tmp_path / "in.gguf")
    routers = [f"model.layers.{i}.mlp.{gate}" for i in range(2) for gate in ("gate", "shared_expert_gate")]
    assert set(routers) <= set(described["modules_to_not_convert"])
    raw = tensors_of(tmp_path / "in.gguf")["blk.1.ffn_gate_inp.weight"]
    stored = dict(read_layers(tmp_path / "in.gguf"))["model.layers.1.mlp.gate.weight"]
    assert torch.equal(stored, torch.from_numpy(gguf.quants.dequantize(raw.data, raw.tensor_type)))


@architectures
def test_an_adapter_over_a_mixture_of_a_gguf_file_merges_exactly(tmp_path, architecture):
    write(tmp_path / "in.gguf", mixture(architecture), architecture=architecture)
    convert_checkpoint(tmp_path / "in.gguf", tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, QBLoRAConfig(r=4, quantization_aware=True, init_lora_weights=False)).eval()
    assert any("experts.3" in name for name, _ in model.named_parameters() if "lora_A" in name)
    expected = logits(model, tokens())
    merged = merge(model)
    torch.testing.assert_close(logits(merged, tokens()), expected, rtol=0, atol=2e-5)  # float32, width 64
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again, tokens()), logits(merged, tokens()))

    report = write_checkpoint(again, tmp_path / "out.gguf", "gguf", template=tmp_path / "in.gguf")
    assert report.layers == sum(isinstance(module, GroupQuantLinear) for module in again.modules())
    convert_checkpoint(tmp_path / "out.gguf", tmp_path / "back")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    layers = {name: m for name, m in again.named_modules() if isinstance(m, GroupQuantLinear)}
    wrong = max(
        float((back.get_submodule(name).dequantize() - layer.dequantize()).abs().max())
        for name, layer in layers.items()
    )
    assert 0 < wrong <= report.largest_rounding + 1e-6
    assert report.largest_rounding < 2e-3  # offsets below 4, rounded to float16


@architectures
def test_a_mixture_that_was_imported_and_written_again_holds_the_same_bytes(tmp_path, architecture):
    write(tmp_path / "in.gguf", mixture(architecture), {"experts.down_proj": "F16"}, architecture=architecture)
    convert_checkpoint(tmp_path / "in.gguf", tmp_path / "ours")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    write_checkpoint(model, tmp_path / "out.gguf", "gguf", template=tmp_path / "in.gguf")
    first, second = tensors_of(tmp_path / "in.gguf"), tensors_of(tmp_path / "out.gguf")
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert second[name].tensor_type == tensor.tensor_type, name
        assert (second[name].data == tensor.data).all(), name


@architectures
def test_experts_and_gates_in_float_are_written_as_they_are_by_now(tmp_path, architecture):
    types = {"experts.down_proj": "F16"}
    write(tmp_path / "in.gguf", mixture(architecture), types, architecture=architecture)
    convert_checkpoint(tmp_path / "in.gguf", tmp_path / "ours")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    for name, parameter in model.named_parameters():
        if "down" in name or name.endswith(("w2.weight", "gate.weight")):
            parameter.data *= 2
    write_checkpoint(model, tmp_path / "out.gguf", "gguf", template=tmp_path / "in.gguf")
    first, second = tensors_of(tmp_path / "in.gguf"), tensors_of(tmp_path / "out.gguf")
    for layer in range(2):
        gates = ("ffn_gate_inp", *(["ffn_gate_inp_shexp"] if architecture == "qwen2moe" else []))
        for name in (f"blk.{layer}.{tensor}.weight" for tensor in ("ffn_down_exps", *gates)):
            assert second[name].tensor_type == gguf.GGMLQuantizationType.F32
            assert (second[name].data == 2 * first[name].data.astype(np.float32)).all(), name
    convert_checkpoint(tmp_path / "out.gguf", tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(again, tokens()), logits(model, tokens()), rtol=0, atol=1e-4)  # float16 offsets


def test_a_stack_of_which_some_experts_are_in_float_is_not_written(tmp_path):
    write(tmp_path / "in.gguf", mixture("qwen3moe"))
    convert_checkpoint(tmp_path / "in.gguf", tmp_path / "ours")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    layer = expert_names("qwen3moe")[1]
    plain = torch.nn.Linear(64, 32, bias=False)
    plain.weight.data = model.get_submodule(layer).dequantize()
    model.set_submodule(layer, plain)
    with pytest.raises(ConfigError, match=rf"\(blk\.1\.ffn_up_exps\.weight\), and .* is packed while {layer} is in"):
        write_checkpoint(model, tmp_path / "new" / "out.gguf", "gguf", template=tmp_path / "in.gguf")
    assert not (tmp_path / "new").exists()


def without(path, lost=None, changed=None):
    """The file again without a tensor, or with one of another shape."""
    old = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(path.with_name("damaged.gguf"), "qwen3moe")
    for field in old.fields.values():
        if field.name != "general.architecture" and not field.name.startswith("GGUF."):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    for tensor in old.tensors:
        data = np.array(tensor.data)
        if tensor.name in (changed or {}):
            data = changed[tensor.name](data)
        if tensor.name != lost:
            writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.with_name("damaged.gguf")


UP = "blk.1.ffn_up_exps.weight"


@pytest.mark.parametrize(
    ("lost", "change", "message"),
    [
        (None, lambda data: data[:3], rf"{UP} is \(3, 32, 64\), and \(4, 32, 64\) by the sizes"),
        (None, lambda data: np.concatenate([data, data]), rf"{UP} is \(8, 32, 64\), and \(4, 32, 64\)"),
        (None, lambda data: data[:, :16], rf"{UP} is \(4, 16, 64\), and \(4, 32, 64\)"),
        (None, lambda data: data[:, :, :20], rf"{UP} is \(4, 32, 32\), and \(4, 32, 64\)"),
        (None, lambda data: data.reshape(-1, data.shape[-1]), rf"{UP} is \(128, 64\), and \(4, 32, 64\)"),
        (UP, None, rf"no tensor {UP}, the experts of a layer; the file is incomplete"),
    ],
    ids=["fewer", "more", "rows", "columns", "flat", "missing"],
)
def test_a_stack_of_another_shape_is_refused_by_name(tmp_path, lost, change, message):
    write(tmp_path / "in.gguf", mixture("qwen3moe"))
    file = without(tmp_path / "in.gguf", lost, {UP: change} if change else None)
    with pytest.raises(CheckpointError, match=rf"damaged\.gguf: {message}"):
        convert_checkpoint(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_cut_within_its_experts_is_refused(tmp_path):
    file = write(tmp_path / "in.gguf", mixture("qwen3moe"))
    file.write_bytes(file.read_bytes()[: tensors_of(file)[UP].data_offset + 1000])
    with pytest.raises(CheckpointError, match=r"in\.gguf cannot be read as GGUF"):
        convert_checkpoint(file, tmp_path / "out")


def stub(path, architecture):
    """A file that says it has experts, and holds one stack of them."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_expert_count(4)
    writer.add_tensor(UP, np.zeros((4, 32, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("architecture", ["gpt-oss", "deepseek2", "phimoe", "olmoe", "gemma4"])
def test_mixtures_that_are_not_read_are_refused_with_those_that_are(tmp_path, architecture):
    stub(tmp_path / "in.gguf", architecture)
    message = rf"experts are read in files of qwen2moe, qwen3moe, llama.*; this one is of {architecture}\. Quantize the"
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(tmp_path / "in.gguf", tmp_path / "out")


@pytest.mark.skipif(not BEFORE_5, reason="transformers 5 has the model")
def test_a_mixture_of_newer_transformers_says_so(tmp_path):
    stub(tmp_path / "in.gguf", NEWER)
    with pytest.raises(CheckpointError, match=r"with transformers 5, minimax-m2; this one is of minimax-m2"):
        describe_checkpoint(tmp_path / "in.gguf")


@needs_5
def test_experts_that_are_weighed_otherwise_than_the_model_does_are_refused(tmp_path):
    file = write(tmp_path / "in.gguf", mixture(NEWER), architecture=NEWER, expert_gating_func=1)
    with pytest.raises(CheckpointError, match="expert_gating_func=1, and MiniMax-M2 weighs its experts by a sigmoid"):
        describe_checkpoint(file)


@pytest.mark.parametrize("name", ["blk.0.ffn_gate_up_exps.weight", "blk.0.ffn_up_exps.bias"])
def test_tensors_of_experts_that_have_no_place_are_named(tmp_path, name, monkeypatch):
    model = mixture("qwen3moe")
    add = gguf.GGUFWriter.write_header_to_file

    def with_another(writer):
        writer.add_tensor(name, np.zeros((4, 64), np.float32))
        add(writer)

    monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", with_another)
    write(tmp_path / "in.gguf", model)
    with pytest.raises(
        CheckpointError, match=rf"{name} is no part of a mixture that is read: experts as ffn_gate_exps"
    ):
        describe_checkpoint(tmp_path / "in.gguf")
