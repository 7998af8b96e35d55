import json
import os

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import qbl_trl  # noqa: F401  (registers the quantizer)
from qbl_trl.config import GroupQuantConfig
from qbl_trl.errors import ConfigError, FoldError, PackageError
from qbl_trl.quant.affine import dequantize
from qbl_trl.quant.algorithms import quantize
from qbl_trl.quant.float_offsets import folded
from qbl_trl.quant.importers import convert_checkpoint, read_layers
from qbl_trl.quant.linear import GroupQuantLinear
from qbl_trl.quant.writers import check_request, write_checkpoint
from tests.quant import foreign
from tests.quant.foreign_gguf import write_gguf
from tests.tiny import logits, tiny_gpt2, tiny_llama, tokens


def packed_llama(*, bits=4, group_size=32, merged=True, algorithm="rtn", **changes):
    """A tiny llama of packed layers, with a block delta on each as `merge` leaves it."""
    model = tiny_llama(**{"tie_word_embeddings": False, **changes})
    for seed, (name, layer) in enumerate(foreign.linear_layers(model).items()):
        affine = quantize(layer.weight.data, bits=bits, group_size=group_size, symmetric=False, algorithm=algorithm)
        packed = GroupQuantLinear.from_affine(affine, bits=bits, group_size=group_size, bias=layer.bias)
        if merged:
            generator = torch.Generator().manual_seed(seed)
            rows, columns = packed.out_features // 2, packed.in_features // group_size
            packed.set_delta(torch.randn(rows, columns, generator=generator) * 1e-3, group_size, 2)
        model.set_submodule(name, packed)
    return model


def template(path, **changes):
    pytest.importorskip("gguf", reason="the GGUF writer needs the package gguf")
    model = tiny_llama(tie_word_embeddings=False, **changes)
    write_gguf(path, model, {}, default="F32")
    return path


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_merged_model_survives_hqq_exactly(tmp_path, bits):
    model = packed_llama(bits=bits)
    model.generation_config.eos_token_id = [7, 9]
    report = write_checkpoint(model, tmp_path / "hqq", "hqq")
    assert GenerationConfig.from_pretrained(tmp_path / "hqq").eos_token_id == [7, 9]
    assert report.layers == 14
    assert report.largest_rounding == 0
    config = json.loads((tmp_path / "hqq" / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert "torch_dtype" not in config
    found = dict(read_layers(tmp_path / "hqq"))
    for name, layer in ((n, m) for n, m in model.named_modules() if isinstance(m, GroupQuantLinear)):
        codes, scales, zeros = found[name].affine()
        own = layer.affine()
        assert torch.equal(codes, own.codes)
        assert torch.equal(scales, own.scales.float())
        for row in (0, 1, 5):
            for group in range(scales.shape[1]):
                shift = layer.delta[row // 2, group].double() / own.scales[row, group].double()
                exact = own.zeros[row, group].double() - shift
                assert abs(float(zeros[row, group]) - float(exact)) <= abs(float(exact)) * 2**-24 + 1e-12
    convert_checkpoint(tmp_path / "hqq", tmp_path / "ours")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    torch.testing.assert_close(logits(loaded, tokens()), logits(model, tokens()), rtol=0, atol=1e-5)  # float32 sums


def test_a_merged_model_becomes_gguf_with_its_offsets_rounded_to_float16(tmp_path):
    model = packed_llama()
    report = write_checkpoint(model, tmp_path / "out.gguf", "gguf", template=template(tmp_path / "template.gguf"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="out.gguf", dtype=torch.float32)
    largest = 0.0
    for name, layer in ((n, m) for n, m in model.named_modules() if isinstance(m, GroupQuantLinear)):
        wrong = (loaded.get_submodule(name).weight - layer.dequantize()).abs()
        largest = max(largest, float(wrong.max()))
        offset = float((layer.scales.float() * layer.zero_points().float()).abs().max()) + 1e-2
        assert float(wrong.max()) <= offset * 2**-11 + 1e-7, name
    assert largest > 0
    assert abs(report.largest_rounding - largest) <= 1e-7
    torch.testing.assert_close(logits(loaded, tokens()), logits(model, tokens()), rtol=0, atol=5e-3)


def test_a_gguf_file_that_was_imported_and_written_again_holds_the_same_bytes(tmp_path):
    gguf = pytest.importorskip("gguf", reason="the GGUF writer needs the package gguf")
    write_gguf(tmp_path / "in.gguf", tiny_llama(tie_word_embeddings=False), {"embed": "Q8_0"})
    convert_checkpoint(tmp_path / "in.gguf", tmp_path / "ours")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    report = write_checkpoint(model, tmp_path / "out.gguf", "gguf", template=tmp_path / "in.gguf")
    assert report.largest_rounding < 1e-7  # float32 zero points give back every float16 offset
    first, second = (gguf.GGUFReader(tmp_path / name) for name in ("in.gguf", "out.gguf"))
    for one, other in zip(first.tensors, second.tensors, strict=True):
        assert one.name == other.name
        assert one.tensor_type == other.tensor_type
        assert (one.data == other.data).all(), one.name
    ours = {name: field.contents() for name, field in second.fields.items()}
    for name, field in first.fields.items():
        if not name.startswith("GGUF."):
            assert ours[name] == field.contents(), name


def test_trained_norms_and_embeddings_are_written_in_float(tmp_path):
    file = template(tmp_path / "template.gguf")
    model = packed_llama()
    model.model.norm.weight.data += 0.5
    model.model.embed_tokens.weight.data *= 2
    write_checkpoint(model, tmp_path / "out.gguf", "gguf", template=file)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="out.gguf", dtype=torch.float32)
    assert torch.equal(loaded.model.norm.weight, model.model.norm.weight)
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_the_template_ties_is_written_where_the_model_has_one_of_its_own(tmp_path, tied):
    pytest.importorskip("gguf", reason="the GGUF writer needs the package gguf")
    write_gguf(tmp_path / "tied.gguf", tiny_llama(tie_word_embeddings=True), {}, default="F32")
    model = packed_llama(tie_word_embeddings=tied)
    write_checkpoint(model, tmp_path / "out.gguf", "gguf", template=tmp_path / "tied.gguf")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="out.gguf", dtype=torch.float32)
    assert loaded.config.tie_word_embeddings == tied
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("packed", [False, True])
def test_a_tensor_that_the_template_lacks_is_not_lost(tmp_path, packed):
    model = packed_llama(attention_bias=not packed)
    layer = model.model.layers[1].mlp.up_proj if packed else model.model.layers[1].self_attn.q_proj
    layer.bias = torch.nn.Parameter(torch.zeros(layer.out_features))
    file = template(tmp_path / "template.gguf")
    write_checkpoint(model, tmp_path / "zeros.gguf", "gguf", template=file)  # which change nothing
    layer.bias.data[3] = 1.0
    name = "mlp.up_proj" if packed else "self_attn.q_proj"
    with pytest.raises(ConfigError, match=rf"no tensor for model.layers.1.{name}.bias, which the model was given"):
        write_checkpoint(model, tmp_path / "out.gguf", "gguf", template=file)
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rms_norm_eps": 1e-2}, "rms_norm_eps=1e-06, and .* would be run with 0.01"),
        ({"num_attention_heads": 2, "num_key_value_heads": 1}, "num_attention_heads=4, and .* would be run with 2"),
        ({"num_hidden_layers": 3}, "num_hidden_layers=2, and .* would be run with 3"),
    ],
)
def test_a_template_with_other_numbers_for_the_same_shapes_is_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        write_checkpoint(
            packed_llama(), tmp_path / "out.gguf", "gguf", template=template(tmp_path / "template.gguf", **changes)
        )


def test_a_template_that_stretches_rotary_angles_otherwise_is_refused(tmp_path):
    pytest.importorskip("gguf", reason="the GGUF writer needs the package gguf")
    write_gguf(tmp_path / "in.gguf", tiny_llama(tie_word_embeddings=False), {}, default="F32", rope=4.0)
    with pytest.raises(ConfigError, match=r"rotary scaling.*it is another model's file"):
        write_checkpoint(packed_llama(), tmp_path / "out.gguf", "gguf", template=tmp_path / "in.gguf")


def test_a_head_with_the_values_of_the_embedding_is_not_written_twice(tmp_path):
    gguf = pytest.importorskip("gguf", reason="the GGUF writer needs the package gguf")
    write_gguf(tmp_path / "tied.gguf", tiny_llama(tie_word_embeddings=True), {}, default="F32")
    model = packed_llama()
    model.lm_head.weight.data = model.model.embed_tokens.weight.data.clone()
    write_checkpoint(model, tmp_path / "out.gguf", "gguf", template=tmp_path / "tied.gguf")
    assert "output.weight" not in {tensor.name for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}


def test_folding_is_adding_the_delta_to_the_weight():
    layer = packed_llama().model.layers[0].mlp.up_proj
    torch.testing.assert_close(dequantize(*folded(layer), 32), layer.dequantize(), rtol=0, atol=1e-7)  # float32


def test_a_template_of_another_shape_is_refused_and_leaves_nothing(tmp_path):
    file = template(tmp_path / "template.gguf", intermediate_size=128)
    with pytest.raises(ConfigError, match=r"is \((96, 64|64, 96)\); it is another model's file"):
        write_checkpoint(packed_llama(), tmp_path / "new" / "out.gguf", "gguf", template=file)
    assert not (tmp_path / "new").exists()


def test_larger_groups_are_repeated_in_gguf(tmp_path):
    model = packed_llama(group_size=64, merged=False, intermediate_size=128)
    file = template(tmp_path / "template.gguf", intermediate_size=128)
    write_checkpoint(model, tmp_path / "out.gguf", "gguf", template=file)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="out.gguf", dtype=torch.float32)
    name = "model.layers.0.mlp.down_proj"
    ours = model.get_submodule(name).dequantize()
    torch.testing.assert_close(loaded.get_submodule(name).weight, ours, rtol=0, atol=1e-4)  # float16 offsets


@pytest.mark.parametrize("format", ["gptq", "awq", "auto-round", "compressed-tensors", "q4_0"])
def test_formats_with_integer_zero_points_are_refused_with_the_lossy_route(tmp_path, format):
    with pytest.raises(ConfigError, match=r"integer zero points.*Lossy: model\.dequantize"):
        write_checkpoint(packed_llama(), tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


def test_a_delta_that_varies_inside_a_group_is_refused(tmp_path):
    model = packed_llama(merged=False)
    layer = model.model.layers[0].mlp.up_proj
    layer.set_delta(torch.zeros(48, 32), 2, 2)
    with pytest.raises(FoldError, match="in_factor=2 varies inside groups of 32"):
        write_checkpoint(model, tmp_path / "out", "hqq")


@pytest.mark.parametrize(
    ("make", "format", "message"),
    [
        (packed_llama, "exl2", "format='exl2' is not known"),
        (packed_llama, "gguf", "needs template="),
        (tiny_llama, "hqq", "no group-quantized layer"),
        (lambda: packed_llama(group_size=64, merged=False), "hqq", "no HQQ layout"),
    ],
)
def test_models_and_formats_that_do_not_fit_are_refused(tmp_path, make, format, message):
    with pytest.raises(ConfigError, match=message):
        write_checkpoint(make(), tmp_path / "out", format)


def test_gguf_without_its_package_is_refused_before_the_model_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PackageError, match=r'pip install "qbl-trl\[gguf\]"'):
        check_request(tmp_path / "out.gguf", "gguf", tmp_path / "template.gguf")


def test_a_template_is_not_ignored_where_the_format_has_no_use_for_it(tmp_path):
    with pytest.raises(ConfigError, match="template= is for"):
        write_checkpoint(packed_llama(), tmp_path / "out", "hqq", template=tmp_path / "template.gguf")
    assert not (tmp_path / "out").exists()


def test_layers_of_gpt2_are_refused_for_hqq_which_cannot_load_them(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=GroupQuantConfig())
    with pytest.raises(ConfigError, match=r"c_attn is a Conv1D layer of GPT2LMHeadModel, where transformers loads no"):
        write_checkpoint(model, tmp_path / "out", "hqq")
    assert not (tmp_path / "out").exists()


def test_layers_that_q4_1_cannot_hold_are_refused(tmp_path):
    file = template(tmp_path / "template.gguf")
    with pytest.raises(ConfigError, match=r"8 bits.*Q4_1 holds 4 bits"):
        write_checkpoint(packed_llama(bits=8), tmp_path / "out.gguf", "gguf", template=file)


def test_a_template_of_another_model_is_refused(tmp_path):
    file = template(tmp_path / "template.gguf", num_hidden_layers=1)
    with pytest.raises(ConfigError, match="has no tensor for"):
        write_checkpoint(packed_llama(), tmp_path / "out.gguf", "gguf", template=file)


def test_an_output_that_exists_is_left_alone_unless_it_may_be_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(ConfigError, match="is not empty"):
        write_checkpoint(packed_llama(), tmp_path / "out", "hqq")
    assert (tmp_path / "out" / "mine").is_file()
    write_checkpoint(packed_llama(), tmp_path / "out", "hqq", overwrite=True)
    assert not (tmp_path / "out" / "mine").exists()

    file, target = template(tmp_path / "template.gguf"), tmp_path / "out.gguf"
    target.write_text("x")
    with pytest.raises(ConfigError, match="exists already"):
        write_checkpoint(packed_llama(), target, "gguf", template=file)
    write_checkpoint(packed_llama(), target, "gguf", template=file, overwrite=True)
    assert target.stat().st_size > 1000
    with pytest.raises(ConfigError, match="is the template itself"):
        write_checkpoint(packed_llama(), file, "gguf", template=file, overwrite=True)
    with pytest.raises(ConfigError, match="is a folder; name a new GGUF file"):
        write_checkpoint(packed_llama(), tmp_path / "out", "gguf", template=file, overwrite=True)


@pytest.mark.parametrize("part", ["scales", "delta"])
@pytest.mark.parametrize("format", ["hqq", "gguf"])
def test_what_is_no_number_is_not_written(tmp_path, format, part):
    model = packed_llama()
    getattr(model.model.layers[0].self_attn.q_proj, part).data[0, 0] = float("nan")
    given = {"template": template(tmp_path / "template.gguf")} if format == "gguf" else {}
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.q_proj holds NaN or infinite values"):
        write_checkpoint(model, tmp_path / "out", format, **given)
    assert not (tmp_path / "out").exists()


def test_a_pipe_or_a_file_of_the_model_is_not_replaced_and_what_lies_behind_a_link_is_written(tmp_path):
    file = template(tmp_path / "template.gguf")
    options = {"template": file, "overwrite": True}
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="pipe is no file"):
        write_checkpoint(packed_llama(), tmp_path / "pipe", "gguf", **options)
    packed_llama().save_pretrained(tmp_path / "model")
    model = packed_llama()
    model.config._name_or_path = str(tmp_path / "model")
    with pytest.raises(ConfigError, match="is a file of the model itself"):
        write_checkpoint(model, tmp_path / "model" / "model.safetensors", "gguf", **options)
    for _ in range(2):
        write_checkpoint(model, tmp_path / "model" / "model.gguf", "gguf", **options)
    (tmp_path / "real.gguf").write_text("old")
    (tmp_path / "link.gguf").symlink_to("real.gguf")
    write_checkpoint(model, tmp_path / "link.gguf", "gguf", **options)
    assert (tmp_path / "link.gguf").is_symlink()
    (tmp_path / "dangling.gguf").symlink_to("none/real.gguf")
    write_checkpoint(model, tmp_path / "dangling.gguf", "gguf", **options)
    for written in (tmp_path / "real.gguf", tmp_path / "none" / "real.gguf"):
        assert written.read_bytes()[:4] == b"GGUF"


def test_a_full_disk_is_named_with_the_file(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("6400 requested and 4320 written")  # as NumPy says it

    file = template(tmp_path / "template.gguf")
    monkeypatch.setattr("gguf.GGUFWriter.write_tensors_to_file", full)
    with pytest.raises(ConfigError, match=r"out\.gguf: No space left on device; it was not written"):
        write_checkpoint(packed_llama(), tmp_path / "out.gguf", "gguf", template=file)
    assert [path.name for path in tmp_path.iterdir()] == ["template.gguf"]
