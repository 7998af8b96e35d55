"""Packed folders that are not what their configuration says, in part or whole: named before a tensor is loaded."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from qbl_trl import GroupQuantConfig
from qbl_trl.errors import CheckpointError, ConfigError
from qbl_trl.generation import BEFORE_5
from qbl_trl.quant.hf_quantizer import quantize_model_
from tests.tiny import logits, tiny_llama, tokens


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


@pytest.fixture
def folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "float")
    load(tmp_path / "float", quantization_config=GroupQuantConfig()).save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


def change_config(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"].update(changes)
    file.write_text(json.dumps(config))


def test_a_file_cut_short_is_named(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cut short"):
        load(folder)


@pytest.mark.parametrize("kind", ["packed", "float", "shards"])
def test_a_file_cut_short_is_named_to_a_class_that_loads_it_by_itself(folder, kind):
    if kind == "shards":
        load(folder.parent / "float").save_pretrained(folder.parent / "shards", max_shard_size="50KB")
    file = sorted((folder.parent / kind).glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=rf"{kind}.{file.name}: cut short"):
        LlamaForCausalLM.from_pretrained(file.parent, quantization_config=GroupQuantConfig())


def test_a_flipped_byte_in_the_header_is_named(folder):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    at = content.index(b'"data_offsets"')
    content[at] ^= 0xFF
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cut short or damaged"):
        load(folder)


def test_a_flipped_length_is_named(folder):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[6] = 0x7F
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load(folder)


def test_a_format_that_does_not_match_the_tensors_is_named(folder):
    change_config(folder, group_size=16)
    with pytest.raises(CheckpointError, match=r"tensor '.*weight|scales' is .*config\.json calls for"):
        load(folder)


def test_a_missing_tensor_is_named(folder):
    change_config(folder, in_factor=32, out_factor=1)
    with pytest.raises(CheckpointError, match=r"tensor '.*\.delta' is missing"):
        load(folder)


def test_a_tensor_that_the_model_would_leave_out_is_refused(folder):
    state = load_file(folder / "model.safetensors")
    name = next(key for key in state if key.endswith(".scales"))
    state[name.replace(".scales", ".delta")] = torch.zeros(2, 2)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"\.delta' has no place"):
        load(folder)


def test_what_the_index_does_not_find_is_missing_and_what_nobody_reads_is_no_matter(folder):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, found = sorted(state), {"model.rotary_emb.inv_freq": "model-00001-of-00002.safetensors"}
    for shard, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{shard:05}-of-00002.safetensors"
        extra = {"old.inv_freq": torch.zeros(2)} if shard == 2 else {}
        save_file({name: state[name] for name in part} | extra, folder / file, metadata={"format": "pt"})
        found |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": found}))
    whole = load(folder)
    lost = next(name for name in found if name.endswith(".scales"))
    del found[lost]
    index.write_text(json.dumps({"metadata": {}, "weight_map": found}))
    if BEFORE_5:
        with pytest.raises(CheckpointError, match=f"{lost}' is missing"):
            load(folder)
    else:  # loads all that the files hold
        assert torch.equal(logits(load(folder), tokens()), logits(whole, tokens()))
    index.write_text(json.dumps({"weight_map": found | {"x": 3}}))
    with pytest.raises(CheckpointError, match="not a readable index"):
        load(folder)


def test_a_missing_shard_is_named(folder):
    tiny = load(folder)
    tiny.save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    next(folder.glob("model-00002*")).unlink()
    with pytest.raises((CheckpointError, OSError), match="model-00002"):
        load(folder)


def test_a_missing_bias_is_named(tmp_path):
    quantize_model_(tiny_llama(attention_bias=True), GroupQuantConfig()).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.1.self_attn.q_proj.bias"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'model\.layers\.1\.self_attn\.q_proj\.bias' is missing"):
        load(tmp_path)


def test_a_layer_more_than_the_file_holds_is_refused(folder):
    with pytest.raises(CheckpointError, match=r"'model\.layers\.2\."):
        load(folder, num_hidden_layers=3)


def test_an_index_of_an_earlier_save_is_not_read(folder):
    model = load(folder)
    model.save_pretrained(folder, max_shard_size="20KB")
    for shard in folder.glob("model-*.safetensors"):
        shard.unlink()
    index = (folder / "model.safetensors.index.json").read_text()
    model.save_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text(index)
    assert torch.equal(logits(load(folder), tokens()), logits(model, tokens()))


@pytest.mark.skipif(BEFORE_5, reason="transformers 4 does not say which files it chose")
def test_the_files_of_a_variant_are_those_that_are_checked(folder):
    load(folder).save_pretrained(folder, variant="own")
    state = load_file(folder / "model.own.safetensors")
    (folder / "model.safetensors").write_bytes((folder / "model.own.safetensors").read_bytes())
    del state["model.layers.0.mlp.up_proj.scales"]
    save_file(state, folder / "model.own.safetensors", metadata={"format": "pt"})
    load(folder)
    with pytest.raises(CheckpointError, match=r"'model\.layers\.0\.mlp\.up_proj\.scales' is missing"):
        load(folder, variant="own")


def test_unknown_fields_are_refused(folder):
    change_config(folder, colour="blue")
    with pytest.raises(ConfigError, match="unknown fields: colour"):
        load(folder)
