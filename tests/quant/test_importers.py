import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import qbl_trl  # noqa: F401  (registers the quantizer)
from qbl_trl.config import GroupQuantConfig
from qbl_trl.errors import CheckpointError, ConfigError
from qbl_trl.quant.affine import dequantize
from qbl_trl.quant.importers import convert_checkpoint, describe_checkpoint, open_reader, read_layers
from qbl_trl.quant.importers.reader import split_words, stored_group_size
from qbl_trl.quant.linear import GroupQuantLinear
from tests.quant import foreign
from tests.quant.foreign import (
    AUTO_ROUND,
    AWQ,
    COMPRESSED,
    GPTQ,
    HQQ,
    affines,
    symmetric_compressed,
    write_layer,
)
from tests.tiny import logits, tokens


def case(name, tensors, quantization, affine_of, bits=4, zeros="packed", **changes):
    return pytest.param(tensors, quantization, affine_of, bits, zeros, changes, id=name)


CASES = [
    case("gptq-v1", partial(foreign.gptq_tensors, bits=4), GPTQ, affines()),
    case(
        "gptq-v2", partial(foreign.gptq_tensors, bits=4, v1=False), GPTQ | {"checkpoint_format": "gptq_v2"}, affines()
    ),
    case("gptq-sym", partial(foreign.gptq_tensors, bits=4), GPTQ | {"sym": True}, affines(zeros="half"), zeros="none"),
    case("gptq-2bit", partial(foreign.gptq_tensors, bits=2), GPTQ | {"bits": 2}, affines(2), 2),
    case("gptq-8bit-bf16", partial(foreign.gptq_tensors, bits=8), GPTQ, affines(8, dtype=torch.bfloat16), 8),
    case("awq-gemm", foreign.awq_tensors, AWQ, affines()),
    case("awq-gemv", partial(foreign.awq_tensors, version="gemv"), AWQ | {"version": "gemv"}, affines()),
    case(
        "auto-round-gptq",
        partial(foreign.gptq_tensors, bits=4),
        AUTO_ROUND | {"packing_format": "auto_round:auto_gptq"},
        affines(),
    ),
    case(
        "auto-round-plain",
        partial(foreign.gptq_tensors, bits=4, v1=False),
        AUTO_ROUND | {"packing_format": "auto_round"},
        affines(),
    ),
    case("auto-round-awq", foreign.awq_tensors, AUTO_ROUND | {"packing_format": "auto_round:auto_awq"}, affines()),
    case(
        "auto-round-0.4-gptq",
        partial(foreign.gptq_tensors, bits=4),
        AUTO_ROUND | {"backend": "auto_round:gptq:exllamav2"},
        affines(),
    ),
    case(
        "auto-round-0.4",
        partial(foreign.gptq_tensors, bits=4, v1=False),
        AUTO_ROUND | {"backend": "auto_round:exllamav2"},
        affines(),
    ),
    case("auto-round-0.4-awq", foreign.awq_tensors, AUTO_ROUND | {"backend": "auto_round:awq:gemm"}, affines()),
    case("auto-round-auto", partial(foreign.gptq_tensors, bits=4), AUTO_ROUND | {"backend": "auto"}, affines()),
    case("compressed-signed-zeros", foreign.signed_zeros, COMPRESSED, affines()),
    case("compressed", partial(foreign.compressed_tensors, bits=4, symmetric=False), COMPRESSED, affines()),
    case(
        "compressed-sym-2bit",
        partial(foreign.compressed_tensors, bits=2, symmetric=True),
        symmetric_compressed(),
        affines(2, zeros="half", dtype=torch.bfloat16),
        2,
        "none",
    ),
    case("hqq", partial(foreign.hqq_tensors, bits=4), HQQ, affines(zeros="float"), zeros="float16"),
    case("hqq-2bit", partial(foreign.hqq_tensors, bits=2), HQQ, affines(2, zeros="float"), 2, "float16"),
    case(
        "hqq-8bit-bf16",
        partial(foreign.hqq_tensors, bits=8),
        HQQ,
        affines(8, zeros="float", dtype=torch.bfloat16),
        8,
        "bfloat16",
    ),
    case("shards", partial(foreign.gptq_tensors, bits=4), GPTQ, affines(), shards=3),
]


@pytest.mark.parametrize(("tensors", "quantization", "affine_of", "bits", "zeros", "changes"), CASES)
def test_codes_scales_and_zero_points_come_over_bit_for_bit(
    tmp_path, tensors, quantization, affine_of, bits, zeros, changes
):
    reference, written = foreign.write_folder(tmp_path / "in", tensors, quantization, affine_of, **changes)
    described = describe_checkpoint(tmp_path / "in")
    assert described["bits"] == bits
    assert described["group_size"] == 32
    assert described["zeros"] == zeros
    assert described["symmetric"] == (zeros == "none")
    assert described["layers"] == {}
    assert {"lm_head", "model.embed_tokens"} == set(described["modules_to_not_convert"])

    convert_checkpoint(tmp_path / "in", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, affine in written.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, GroupQuantLinear), name
        for ours, theirs in zip(layer.affine(), affine, strict=True):
            assert ours.dtype == theirs.dtype, name
            assert torch.equal(ours, theirs), name
    torch.testing.assert_close(logits(model, tokens()), logits(reference, tokens()), rtol=0, atol=1e-5)  # float32 sums
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()


def compressed_weights(bits, symmetric):
    weights = {"num_bits": bits, "symmetric": symmetric, "strategy": "group", "group_size": 32, "type": "int"}
    return COMPRESSED | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


def odd(name, tensors, quantization, bits, zeros="integer", **more):
    return pytest.param(partial(tensors, bits=bits, **more), quantization, bits, zeros, id=name)


@pytest.mark.parametrize(
    ("tensors", "quantization", "bits", "zeros"),
    [
        odd("gptq-v1", foreign.gptq_tensors, GPTQ | {"bits": 3}, 3),
        odd("gptq-v2", foreign.gptq_tensors, GPTQ | {"bits": 3, "checkpoint_format": "gptq_v2"}, 3, v1=False),
        odd("gptq-sym", foreign.gptq_tensors, GPTQ | {"bits": 3, "sym": True}, 3, "half"),
        odd("hqq-1bit", foreign.hqq_tensors, HQQ, 1, "float"),
        odd("hqq-3bit", foreign.hqq_tensors, HQQ, 3, "float"),
        *[
            odd(
                f"compressed-{bits}bit{'-sym' * symmetric}{'-older' * whole}",
                foreign.compressed_tensors,
                told,
                bits,
                "half" if symmetric else "integer",
                symmetric=symmetric,
                whole=whole,
            )
            for bits in (3, 5, 6, 7)
            for symmetric in (False, True)
            for whole in (False, True)
            for told in [compressed_weights(bits, symmetric)]
        ],
    ],
)
def test_codes_of_other_bits_get_the_next_wider_place(tmp_path, tensors, quantization, bits, zeros):
    reference, written = foreign.write_folder(tmp_path / "in", tensors, quantization, affines(bits, zeros=zeros))
    stored = {1: 2, 3: 4}.get(bits, 8)
    moved = (1 << (stored - 1)) - (1 << (bits - 1)) if zeros == "half" else 0  # to the middle, which is not stored
    assert describe_checkpoint(tmp_path / "in")["bits"] == stored
    convert_checkpoint(tmp_path / "in", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, (codes, scales, points) in written.items():
        layer = model.get_submodule(name)
        assert torch.equal(layer.affine().codes, codes + moved)
        assert torch.equal(layer.affine().zeros, points + moved)
        assert torch.equal(layer.scales, scales)
        assert (layer.zeros is None) == (zeros == "half")
    torch.testing.assert_close(logits(model, tokens()), logits(reference, tokens()), rtol=0, atol=1e-5)  # float32 sums


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("rows", "columns"), [(1, 160), (3, 160), (40, 96), (5, 7)])
def test_words_are_split_along_either_side(bits, rows, columns):
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8)
    for whole in (False, True):
        along = split_words(foreign.word_matrix(codes, bits, whole=whole), bits, 1, whole=whole)
        across = split_words(foreign.word_matrix(codes.T, bits, whole=whole).T.contiguous(), bits, 0, whole=whole)
        assert torch.equal(along[:, :columns], codes)
        assert torch.equal(across[:rows], codes)


def test_settings_that_stand_with_the_text_model_are_read(tmp_path):
    affine = write_layer(tmp_path / "in", 64, 32, GPTQ)
    settings = json.loads((tmp_path / "in" / "config.json").read_text())
    (tmp_path / "in" / "config.json").write_text(json.dumps({"text_config": settings}))
    reader = open_reader(tmp_path / "in")
    torch.testing.assert_close(reader.layer("layer").dequantize(), dequantize(*affine, 32), rtol=0, atol=0)
    assert reader.config() == {"text_config": {}}


def test_streaming_yields_every_tensor_once(tmp_path):
    reference, written = foreign.write_folder(tmp_path / "in", foreign.awq_tensors, AWQ, affines())
    found = dict(read_layers(tmp_path / "in"))
    assert {name for name, value in found.items() if isinstance(value, GroupQuantLinear)} == set(written)
    rest = {name for name, value in found.items() if isinstance(value, torch.Tensor)}
    inside = {f"{name}.{part}" for name in written for part in ("weight", "bias")}
    assert rest == set(reference.state_dict()) - inside


def test_a_quantized_output_head_becomes_float_without_a_loss(tmp_path):
    _reference, _ = foreign.write_folder(tmp_path / "in", partial(foreign.gptq_tensors, bits=4), GPTQ, affines())
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    affine = foreign.random_affine(100, 64, 4, 9)
    tensors |= {f"lm_head.{key}": value.contiguous() for key, value in foreign.gptq_tensors(affine, 4).items()}
    foreign.save_file(tensors, tmp_path / "in" / "model.safetensors")
    assert "lm_head" in describe_checkpoint(tmp_path / "in")["modules_to_not_convert"]
    found = dict(read_layers(tmp_path / "in"))
    assert torch.equal(found["lm_head.weight"], dequantize(*affine, 32))
    assert "lm_head.qweight" not in found


@pytest.mark.parametrize(("columns", "stated", "stored"), [(64, -1, 64), (96, -1, 32), (192, 96, 32), (96, 48, 16)])
def test_groups_of_other_sizes_are_split_into_equal_parts(tmp_path, columns, stated, stored):
    size = columns if stated == -1 else stated
    affine = foreign.random_affine(8, columns, 4, 0, group=size)
    tensors = {f"layer.{key}": value for key, value in foreign.gptq_tensors(affine, 4, group=size).items()}
    (tmp_path / "in").mkdir()
    foreign.save_file(tensors, tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text(json.dumps({"quantization_config": GPTQ | {"group_size": stated}}))
    ((_, layer),) = list(read_layers(tmp_path / "in"))
    assert layer.group_size == stored
    assert torch.equal(layer.dequantize(), dequantize(*affine, size))


def test_hqq_folders_are_known_by_their_tensors_where_the_library_states_no_quantization(tmp_path):
    _, written = foreign.write_folder(
        tmp_path / "in", partial(foreign.hqq_tensors, bits=4), HQQ, affines(zeros="float"), shards=2
    )
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    found = dict(read_layers(tmp_path / "in"))
    assert all(torch.equal(found[name].dequantize(), dequantize(*affine, 32)) for name, affine in written.items())


def test_groups_that_cannot_be_split_are_refused():
    with pytest.raises(CheckpointError, match="groups of 24 weights cannot be split"):
        stored_group_size("layer", 48, 2, 24)


def test_a_zero_point_of_zero_survives_the_borrow_of_version_1(tmp_path):
    def zeros_of_zero(rows, columns, seed):
        affine = foreign.random_affine(rows, columns, 4, seed)
        return affine._replace(zeros=torch.zeros_like(affine.zeros))

    _, written = foreign.write_folder(tmp_path / "in", partial(foreign.gptq_tensors, bits=4), GPTQ, zeros_of_zero)
    found = dict(read_layers(tmp_path / "in"))
    assert all(not found[name].affine().zeros.any() for name in written)


def test_settings_in_the_older_separate_file_are_found(tmp_path):
    foreign.write_folder(tmp_path / "in", foreign.awq_tensors, AWQ, affines())
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    (tmp_path / "in" / "quant_config.json").write_text(json.dumps({"w_bit": 4, "q_group_size": 32, "version": "GEMM"}))
    assert describe_checkpoint(tmp_path / "in")["group_size"] == 32


def test_layers_that_differ_are_named_with_their_difference(tmp_path):
    def mixed(rows, columns, seed):
        return foreign.random_affine(rows, columns, 8 if seed == 3 else 4, seed)

    def tensors(affine):
        return foreign.gptq_tensors(affine, 8 if int(affine.codes.max()) > 15 else 4)

    foreign.write_folder(tmp_path / "in", tensors, GPTQ, mixed)
    described = describe_checkpoint(tmp_path / "in")
    assert described["bits"] == 4
    assert described["layers"] == {"model.layers.0.self_attn.o_proj": {"bits": 8}}
    assert GroupQuantConfig(**described).layer_format("model.layers.0.self_attn.o_proj").bits == 8


def test_layers_that_gptqmodel_names_have_their_own_symmetry(tmp_path):
    def mixed(rows, columns, seed):  # the fourth and eighth layer
        return foreign.random_affine(rows, columns, 4, seed, **({} if seed in (3, 7) else {"zeros": "half"}))

    rules = {"-:.*lm_head": {}, r"+:model\.layers\.0\..*o_proj": {"sym": False}, ".*1.*q_proj": {"sym": False}}
    quantization = GPTQ | {"sym": True, "dynamic": rules}
    _, written = foreign.write_folder(tmp_path / "in", partial(foreign.gptq_tensors, bits=4), quantization, mixed)
    described = describe_checkpoint(tmp_path / "in")
    assert described["zeros"] == "none"
    asymmetric = {"model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.q_proj"}
    assert described["layers"] == {name: {"zeros": "packed"} for name in asymmetric}
    found = dict(read_layers(tmp_path / "in"))
    assert all(torch.equal(found[name].dequantize(), dequantize(*written[name], 32)) for name in written)


def test_an_output_folder_with_files_is_left_alone(tmp_path):
    foreign.write_folder(tmp_path / "in", foreign.awq_tensors, AWQ, affines())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(ConfigError, match="not empty"):
        convert_checkpoint(tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "x"


def test_the_dtype_of_what_is_not_quantized_can_be_chosen(tmp_path):
    foreign.write_folder(tmp_path / "in", foreign.awq_tensors, AWQ, affines())
    file = tmp_path / "in" / "config.json"
    inner = {"audio_config": {"torch_dtype": "float32"}, "vision_config": {}}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "float16"} | inner))
    convert_checkpoint(tmp_path / "in", tmp_path / "out", dtype=torch.bfloat16)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "torch_dtype" not in config  # write_folder wrote one
    assert (config["audio_config"], config["vision_config"]) == ({"dtype": "bfloat16"}, {})
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.0.self_attn.q_proj.bias"].dtype == torch.bfloat16
    assert tensors["model.layers.0.self_attn.q_proj.scales"].dtype == torch.float16


def test_a_large_checkpoint_is_written_in_shards(tmp_path, monkeypatch):
    reference, _ = foreign.write_folder(tmp_path / "in", foreign.awq_tensors, AWQ, affines())
    monkeypatch.setattr("qbl_trl.quant.importers.convert._SHARD_BYTES", 20_000)
    convert_checkpoint(tmp_path / "in", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(model, tokens()), logits(reference, tokens()), rtol=0, atol=1e-5)


def test_a_layer_has_the_group_size_that_the_file_states_for_it(tmp_path):
    settings = AUTO_ROUND | {"packing_format": "auto_round:auto_gptq", "extra_config": {".*yer": {"group_size": 128}}}
    affine = write_layer(tmp_path / "in", 192, 128, settings)
    ((_, layer),) = list(read_layers(tmp_path / "in"))
    assert torch.equal(layer.dequantize(), dequantize(*affine, 128))
    write_layer(tmp_path / "silent", 192, 128, settings | {"extra_config": {}})
    with pytest.raises(CheckpointError, match=r"2 groups over 192 inputs .* may be of several sizes"):
        describe_checkpoint(tmp_path / "silent")


def test_a_quantized_head_is_no_longer_tied(tmp_path):
    foreign.write_folder(tmp_path / "in", partial(foreign.gptq_tensors, bits=4), GPTQ, affines())
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    affine = foreign.random_affine(100, 64, 4, 9)
    tensors |= {f"lm_head.{key}": value.contiguous() for key, value in foreign.gptq_tensors(affine, 4).items()}
    foreign.save_file(tensors, tmp_path / "in" / "model.safetensors")
    config = json.loads((tmp_path / "in" / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    convert_checkpoint(tmp_path / "in", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    with pytest.raises(ConfigError, match="would replace"):
        convert_checkpoint(tmp_path / "in", tmp_path / "in", overwrite=True)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_settings_are_found_under_either_name(tmp_path, key):
    make = partial(foreign.compressed_tensors, bits=4, symmetric=False)
    foreign.write_folder(tmp_path / "in", make, COMPRESSED, affines())
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    (tmp_path / "in" / "config.json").write_text(json.dumps(config | {key: config.pop("quantization_config")}))
    assert describe_checkpoint(tmp_path / "in")["bits"] == 4


def test_code_of_the_model_is_copied_where_its_configuration_names_it(tmp_path):
    foreign.write_folder(tmp_path / "in", foreign.awq_tensors, AWQ, affines())
    (tmp_path / "in" / "modeling_own.py").write_text("")
    convert_checkpoint(tmp_path / "in", tmp_path / "plain")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own"}
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    convert_checkpoint(tmp_path / "in", tmp_path / "own")
    assert not (tmp_path / "plain" / "modeling_own.py").exists()
    assert (tmp_path / "own" / "modeling_own.py").is_file()


def test_settings_of_a_layer_come_before_those_of_a_pattern(tmp_path):
    own = {"model.layers.0.mlp.up_proj": {"bits": 8}, r".*\.mlp\..*": {"bits": 2}, "[": {"bits": 4}}
    foreign.write_folder(
        tmp_path / "in", partial(foreign.gptq_tensors, bits=4), AUTO_ROUND | {"extra_config": own}, affines()
    )
    reader = open_reader(tmp_path / "in")._reader
    found = [reader.own(f"model.layers.0.{name}") for name in ("mlp.up_proj", "mlp.gate_proj", "self_attn.q_proj")]
    assert found == [{"bits": 8}, {"bits": 2}, {}]
