"""Foreign checkpoints that cannot be read exactly, or are damaged: refused by name."""

import json
import struct
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from qbl_trl import GroupQuantConfig
from qbl_trl.errors import CheckpointError
from qbl_trl.quant.checkpoint import read_headers
from qbl_trl.quant.hf_quantizer import quantize_model_
from qbl_trl.quant.importers import convert_checkpoint, describe_checkpoint, read_layers
from qbl_trl.quant.importers.places import check_places
from tests.quant import foreign
from tests.quant.foreign import AUTO_ROUND, AWQ, COMPRESSED, GPTQ, HQQ, WEIGHTS, affines, compressed_group, write_layer
from tests.quant.foreign_gguf import write_gguf
from tests.tiny import SIZES, tiny_llama


def narrow_words(affine):
    tensors = foreign.gptq_tensors(affine, 4)
    return tensors | {"qweight": tensors["qweight"].view(torch.int16).contiguous()}


def changed(part, change, make=foreign.gptq_tensors):
    def tensors(affine):
        made = make(affine, bits=4)
        return made | {part: change(made[part])}

    return tensors


def without(part, make):
    def tensors(affine):
        return {name: tensor for name, tensor in make(affine, bits=4).items() if name != part}

    return tensors


def with_tensor(name, dtype, make):
    return lambda affine: make(affine) | {name: torch.ones(4, dtype=dtype)}


@pytest.mark.parametrize(
    ("tensors", "quantization", "affine_of", "message"),
    [
        (partial(foreign.gptq_tensors, bits=4, act_order=True), GPTQ, affines(), "desc_act=true"),
        (partial(foreign.gptq_tensors, bits=4), GPTQ | {"checkpoint_format": "marlin"}, affines(), "marlin"),
        (partial(foreign.gptq_tensors, bits=4), GPTQ | {"sym": True}, affines(), "sym=true"),
        (foreign.awq_tensors, AWQ | {"version": "gemv_fast"}, affines(), "gemv_fast"),
        (foreign.awq_tensors, AWQ | {"bits": 8}, affines(), "8 bits"),
        (with_tensor("act.scales", torch.float16, foreign.awq_tensors), AWQ, affines(), "scales an activation"),
        (with_tensor("weight", torch.float8_e4m3fn, foreign.awq_tensors), AWQ, affines(), "is in float8"),
        (foreign.awq_tensors, {"bits": 4, "group_size": 32}, affines(), "method 'none' cannot be imported"),
        (partial(foreign.hqq_tensors, bits=4, axis=0), HQQ, affines(zeros="float"), "axis=0"),
        (foreign.awq_tensors, COMPRESSED | {"format": "marlin-24"}, affines(), "marlin-24"),
        (partial(foreign.gptq_tensors, bits=4), GPTQ | {"pack_dtype": "int16"}, affines(), "int16"),
        (narrow_words, GPTQ, affines(), r"holds torch\.int16"),
        (without("g_idx", foreign.gptq_tensors), GPTQ | {"desc_act": True}, affines(), "has no g_idx"),
        (partial(foreign.gptq_tensors, bits=4), GPTQ | {"group_size": "all"}, affines(), "group_size"),
        (partial(foreign.gptq_tensors, bits=4), AUTO_ROUND | {"act_bits": 8}, affines(), "activations are quantized"),
        (
            partial(foreign.awq_tensors, version="gemv"),
            {"quant_method": "awq", "version": "gemv"},
            affines(),
            "no group_size is stated",
        ),
        (
            without("weight_zero_point", partial(foreign.compressed_tensors, symmetric=False)),
            COMPRESSED,
            affines(),
            "symmetric=false",
        ),
        (foreign.awq_tensors, COMPRESSED | {"config_groups": None}, affines(), "names no config_groups"),
        (
            foreign.awq_tensors,
            COMPRESSED | {"transform_config": {"config_groups": {"R1": {}}}},
            affines(),
            "rotates activations",
        ),
        (foreign.awq_tensors, compressed_group(input_activations={"num_bits": 8}), affines(), "activations"),
        (foreign.awq_tensors, compressed_group(output_activations={"num_bits": 8}), affines(), "activations"),
        (partial(foreign.gptq_tensors, bits=4), GPTQ | {"rotation": "hadamard"}, affines(), "rotation rotates activ"),
        (foreign.awq_tensors, AWQ | {"rotation": "random"}, affines(), "rotation rotates activations"),
        (
            partial(foreign.gptq_tensors, bits=4),
            GPTQ | {"activation": {"mode": "w4afp8"}},
            affines(),
            "activations are quantized",
        ),
        (foreign.awq_tensors, compressed_group(targets=["Linear", "Embedding"]), affines(), "embeddings are quantized"),
        (
            foreign.awq_tensors,
            AUTO_ROUND | {"packing_format": "auto_round:auto_awq", "extra_config": {".*down_proj": {"bits": 6}}},
            affines(),
            r"layers\.0\.mlp\.down_proj has 6-bit codes; the AWQ layout is defined for 4",
        ),
        (foreign.awq_tensors, COMPRESSED | {"kv_cache_scheme": {"num_bits": 8}}, affines(), "activations"),
        (foreign.awq_tensors, compressed_group(weights=WEIGHTS | {"type": "float"}), affines(), "type 'float'"),
        (
            partial(foreign.gptq_tensors, bits=5, v1=False),
            GPTQ | {"bits": 5, "checkpoint_format": "gptq_v2"},
            affines(5),
            "5-bit codes, which GPTQModel spreads over planes of bits",
        ),
        (foreign.awq_tensors, {"quant_method": "aqlm"}, affines(), "'aqlm' cannot be imported"),
        (foreign.awq_tensors, HQQ, affines(), r"no tensor is called \*\.W_q"),
        (changed("scales", torch.flatten), GPTQ, affines(), r"no gptq layer by its shapes: .*scales \(\d+,\)"),
        (changed("scales", lambda s: s * torch.nan), GPTQ, affines(), "its scales are not all finite numbers"),
        (
            changed("qzeros", lambda z: z[:-1]),
            GPTQ,
            affines(),
            r"in: model\S* is no gptq layer by its shapes: .*qzeros \(",
        ),
        (
            changed("qweight", lambda q: q[:, :-8]),
            GPTQ,
            affines(),
            r"in: model\S* is no gptq layer by its shapes: qwei",
        ),
        (changed("g_idx", lambda g: g[:10]), GPTQ, affines(), r"no gptq layer by its shapes: .*g_idx \(10,\)"),
        (
            partial(foreign.gptq_tensors, bits=4),
            GPTQ | {"dynamic": ["up"]},
            affines(),
            "in: dynamic of quantization_conf",
        ),
        (partial(foreign.gptq_tensors, bits=4), GPTQ | {"dynamic": {"up": 4}}, affines(), "does not name layers with"),
        (partial(foreign.gptq_tensors, bits=4), GPTQ | {"dynamic": {"+:[": {}}}, affines(), r"in: dynamic holds '\['"),
        (foreign.awq_tensors, AWQ | {"extra_config": ["up"]}, affines(), "in: extra_config of quantization_config"),
        (
            partial(foreign.gptq_tensors, bits=4),
            AUTO_ROUND | {"packing_format": 3},
            affines(),
            "packing_format=3 is no",
        ),
        (
            partial(foreign.compressed_tensors, bits=4, symmetric=False),
            compressed_group(targets=["re:["]),
            affines(),
            r"in: targets holds '\[', no regular expression",
        ),
    ],
)
def test_what_cannot_be_read_exactly_is_refused(tmp_path, tensors, quantization, affine_of, message):
    foreign.write_folder(tmp_path / "in", tensors, quantization, affine_of)
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["in"]  # nothing half-written stays behind


LAYER = "model.layers.0.mlp.up_proj"


def dropped(*names):
    return lambda tensors: {key: value for key, value in tensors.items() if not key.startswith(names)}


def replaced(name, change):
    return lambda tensors: tensors | {name: change(tensors[name]).contiguous()}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (dropped("model.embed_tokens"), r"no tensor for model\.embed_tokens\.weight, which LlamaForCausalLM"),
        (dropped("model.norm"), r"no tensor for model\.norm\.weight, which"),
        (dropped("model.layers.0.self_attn.q_proj.bias"), r"no tensor for model\.layers\.0\.self_attn\.q_proj\.bias,"),
        (dropped(f"{LAYER}.qweight"), rf"no tensor for {LAYER}\.weight, which"),
        (dropped(LAYER, "model.norm"), rf"no tensor for {LAYER}\.weight, model\.norm\.weight, which"),
        (dropped("model.layers.1"), r"layers\.1\.\S+ and 5 more, which .* incomplete"),
        (replaced("model.norm.weight", lambda w: w[:10]), r"in: model\.norm\.weight is \(10,\), not \(64,\), as Llama"),
        (replaced(f"{LAYER}.qweight", lambda w: w[:-1]), rf"in: {LAYER}\.weight is \(96, 56\), not \(96, 64\), as"),
        (replaced("model.layers.0.self_attn.q_proj.bias", lambda b: b[:10]), r"q_proj\.bias is \(10,\), not \(64,\)"),
    ],
)
def test_a_checkpoint_that_is_not_the_whole_model_is_refused_by_the_names_of_what_it_lacks(tmp_path, damage, message):
    foreign.write_folder(tmp_path / "in", partial(foreign.gptq_tensors, bits=4), GPTQ, affines())
    file = tmp_path / "in" / "model.safetensors"
    save_file(damage(load_file(file)), file)
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_checkpoint_that_names_no_class_is_compared_with_the_one_that_opens_it(tmp_path):
    foreign.write_folder(tmp_path / "in", partial(foreign.gptq_tensors, bits=4), GPTQ, affines())
    settings, file = tmp_path / "in" / "config.json", tmp_path / "in" / "model.safetensors"
    config = json.loads(settings.read_text())
    del config["architectures"]
    settings.write_text(json.dumps(config))
    convert_checkpoint(tmp_path / "in", tmp_path / "whole")
    AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    save_file(dropped("model.norm")(load_file(file)), file)
    with pytest.raises(CheckpointError, match=r"no tensor for model\.norm\.weight, which LlamaForCausalLM \(what its"):
        convert_checkpoint(tmp_path / "in", tmp_path / "out")
    settings.write_text(json.dumps(config | {"model_type": "t5"}))
    with pytest.raises(CheckpointError, match="names no architectures, and a t5 is no causal language model; add"):
        convert_checkpoint(tmp_path / "in", tmp_path / "out")


def test_columns_that_a_stated_shape_leaves_out_are_missed(tmp_path):
    make = partial(foreign.compressed_tensors, bits=4, symmetric=False)
    foreign.write_folder(tmp_path / "in", make, COMPRESSED, affines())
    file = tmp_path / "in" / "model.safetensors"
    save_file(load_file(file) | {f"{LAYER}.weight_shape": torch.tensor([96, 60])}, file)
    with pytest.raises(CheckpointError, match=rf"{LAYER}\.weight is \(96, 60\), not \(96, 64\)"):
        convert_checkpoint(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize(
    ("model_type", "make", "changes"),
    [
        ("llama", AutoModelForCausalLM, {"tie_word_embeddings": True}),
        ("llama", AutoModel, {}),
        ("mixtral", AutoModelForCausalLM, {"num_local_experts": 2}),  # transformers 5 stacks its experts
        ("t5", AutoModelForSeq2SeqLM, {"d_model": 64, "d_ff": 96, "d_kv": 16, "num_layers": 1}),  # one shared embedding
        ("bert", AutoModelForMaskedLM, {}),
    ],
)
def test_what_transformers_fills_by_itself_is_not_missed(tmp_path, model_type, make, changes):
    config = AutoConfig.for_model(model_type, **(SIZES | changes))
    make.from_config(config).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    others = {name: stored.shape for name, stored in read_headers(tmp_path).items()}
    check_places(tmp_path, settings, {}, others)
    if model_type == "llama":  # its names with those of the other class
        bare = {name.removeprefix("model."): shape for name, shape in others.items()}
        check_places(tmp_path, settings, {}, bare)
        check_places(tmp_path, settings, {}, {f"model.{name}": shape for name, shape in bare.items()})
    lost = next(name for name in others if name.endswith(("norm.weight", "LayerNorm.weight")))
    with pytest.raises(CheckpointError, match=f"no tensor for {lost}, which"):
        check_places(tmp_path, settings, {}, {name: shape for name, shape in others.items() if name != lost})


@pytest.mark.parametrize("lost", ["model.norm.weight", "model.embed_tokens.weight", f"{LAYER}.weight"])
def test_a_gguf_file_that_lacks_a_tensor_is_refused(tmp_path, lost):
    pytest.importorskip("gguf", reason="the GGUF importer needs the package gguf")
    model = tiny_llama(tie_word_embeddings=False)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != lost}
    model.state_dict = lambda: state
    write_gguf(tmp_path / "in.gguf", model, {})
    with pytest.raises(CheckpointError, match=rf"in\.gguf: no tensor for {lost}, which LlamaForCausalLM"):
        convert_checkpoint(tmp_path / "in.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-100]), "model.safetensors"),
        (lambda file: file.write_bytes(struct.pack("<Q", 1 << 40) + file.read_bytes()[8:]), "model.safetensors"),
        (lambda file: file.unlink(), "no \\*.safetensors file"),
    ],
    ids=["cut", "header", "missing"],
)
def test_a_damaged_file_is_named(tmp_path, damage, message):
    foreign.write_folder(tmp_path / "in", foreign.awq_tensors, AWQ, affines())
    damage(tmp_path / "in" / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        describe_checkpoint(tmp_path / "in")


def test_a_source_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such file or folder"):
        describe_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no config\.json and 0 GGUF files"):
        describe_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="a checkpoint is the path of a folder or a GGUF file, not 3"):
        describe_checkpoint(3)
    tiny_llama().save_pretrained(tmp_path / "float")
    with pytest.raises(CheckpointError, match=r"config\.json states no quantization; allowed: GPTQ"):
        describe_checkpoint(tmp_path / "float")
    (tmp_path / "float" / "model.safetensors").rename(tmp_path / "float" / "qmodel.pt")  # how hqq saves by default
    with pytest.raises(CheckpointError, match="Pickled weights"):
        describe_checkpoint(tmp_path / "float")
    quantize_model_(tiny_llama(), GroupQuantConfig()).save_pretrained(tmp_path / "own")
    with pytest.raises(CheckpointError, match="own is in this package's own format already"):
        describe_checkpoint(tmp_path / "own")
    (tmp_path / "model.gguf").write_bytes(b"not a gguf file")
    with pytest.raises(CheckpointError, match="is not a GGUF file"):
        describe_checkpoint(tmp_path / "model.gguf")


def test_tensors_that_belong_to_no_code_are_refused(tmp_path):
    settings = AUTO_ROUND | {"packing_format": "auto_round:auto_gptq"}
    write_layer(tmp_path / "extra", 64, 32, settings, spinquant_r1_size=torch.ones(1))
    with pytest.raises(CheckpointError, match="layer holds a tensor 'spinquant_r1_size' that is no part of"):
        describe_checkpoint(tmp_path / "extra")
    write_layer(tmp_path / "rotated", 64, 32, settings | {"rotation_config": {"block": 32}})
    with pytest.raises(CheckpointError, match="rotation_config rotates activations"):
        describe_checkpoint(tmp_path / "rotated")


@pytest.mark.parametrize("common", [False, True])
def test_layers_of_their_own_symmetry_are_refused_where_that_changes_the_layout_of_zero_points(tmp_path, common):
    settings = AUTO_ROUND | {"extra_config": {"layer": {"sym": not common}}, "sym": common}
    message = f"layer has sym={not common}, the rest sym={common}".lower()
    write_layer(tmp_path / "mixed", 64, 32, settings | {"packing_format": "auto_round:auto_gptq"})
    with pytest.raises(CheckpointError, match=message):
        describe_checkpoint(tmp_path / "mixed")


def test_a_symmetric_layer_among_others_is_read_where_its_zero_points_are_stored_as_they_are(tmp_path):
    settings = AUTO_ROUND | {"extra_config": {"layer": {"sym": True}}, "packing_format": "auto_round"}
    zeros = torch.full((2, 1), 0x77777777, dtype=torch.int32)
    write_layer(tmp_path / "plain", 64, 32, settings, qzeros=zeros + 0x11111111 - (1 << 32))
    ((_, layer),) = read_layers(tmp_path / "plain")
    assert layer.format.zeros == "none"
    write_layer(tmp_path / "less-one", 64, 32, settings, qzeros=zeros)
    with pytest.raises(CheckpointError, match="layer has sym=true, the rest sym=false"):
        list(read_layers(tmp_path / "less-one"))


def test_layers_that_were_split_before_they_were_quantized_are_refused_by_name(tmp_path):
    foreign.write_folder(tmp_path / "in", foreign.awq_tensors, AWQ, affines())
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    config |= {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "pad_token_id": 0}
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"_proj is no layer of Phi3ForCausalLM, and its model\.\S* has no weight"
    ):
        convert_checkpoint(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tensor_of_an_unusual_type_is_no_reason_to_refuse(tmp_path):
    foreign.write_folder(tmp_path / "in", foreign.awq_tensors, AWQ, affines())
    file = tmp_path / "in" / "model.safetensors"
    save_file(load_file(file) | {"steps": torch.zeros(2, dtype=torch.uint32)}, file, metadata={"format": "pt"})
    assert describe_checkpoint(tmp_path / "in")["bits"] == 4
