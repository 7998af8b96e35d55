import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperForAudioClassification,
)

from qbl_trl import GroupQuantConfig
from qbl_trl.errors import CheckpointError, ConfigError
from qbl_trl.generation import BEFORE_5
from qbl_trl.quant.device_map import bytes_per_weight
from qbl_trl.quant.hf_quantizer import quantize_model_
from qbl_trl.quant.linear import GroupQuantLinear
from tests.quant.test_experts import mixture
from tests.tiny import SIZES, logits, tiny_gpt2, tiny_llama, tokens


@pytest.fixture(params=[tiny_llama, lambda: tiny_llama(tie_word_embeddings=True, attention_bias=True), tiny_gpt2])
def saved(request, tmp_path):
    model = request.param()
    model.save_pretrained(tmp_path / "float")
    return model, tmp_path


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"symmetric": True},
        {"quantize_embeddings": True},
        {"bits": 8},
        {"algorithm": "hqq"},
        {"algorithm": "mse", "scale_dtype": "bfloat16"},
    ],
)
def test_a_quantized_model_reloads_bit_for_bit(saved, dtype, changes):
    _, folder = saved
    first = load(folder / "float", quantization_config=GroupQuantConfig(**changes), dtype=dtype)
    first.save_pretrained(folder / "packed")
    second = load(folder / "packed", dtype=dtype)
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        assert torch.equal(ours[name], theirs[name]), name
    assert torch.equal(logits(first, tokens()), logits(second, tokens()))


def test_quantizing_while_loading_equals_quantizing_in_memory(saved):
    model, folder = saved
    loaded = load(folder / "float", quantization_config=GroupQuantConfig())
    assert torch.equal(logits(loaded, tokens()), logits(quantize_model_(model, GroupQuantConfig()), tokens()))


def test_8_bits_stay_close_to_the_float_model(saved):
    model, folder = saved
    loaded = load(folder / "float", quantization_config=GroupQuantConfig(bits=8))
    torch.testing.assert_close(logits(loaded, tokens()), logits(model, tokens()), rtol=0, atol=0.02)


def test_the_head_and_what_is_named_stay_in_float(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    model = load(tmp_path, quantization_config=GroupQuantConfig(modules_to_not_convert=["down_proj"]))
    kinds = {name: type(m) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert kinds["lm_head"] is nn.Linear
    assert kinds["model.layers.1.mlp.down_proj"] is nn.Linear
    assert kinds["model.layers.1.mlp.up_proj"] is GroupQuantLinear


def test_a_fresh_classification_head_stays_in_float_and_reloads(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "float")
    settings = GroupQuantConfig()
    model = LlamaForSequenceClassification.from_pretrained(
        tmp_path / "float", quantization_config=settings, pad_token_id=0
    )
    assert type(model.score) is nn.Linear
    model.save_pretrained(tmp_path / "packed")
    again = LlamaForSequenceClassification.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(model, tokens()), logits(again, tokens()))


def test_a_tied_embedding_is_saved_once(tmp_path):
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "float")
    model = load(tmp_path / "float", quantization_config=GroupQuantConfig(quantize_embeddings=True))
    model.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert again.lm_head.scales is again.model.embed_tokens.scales


def test_the_saved_configuration_names_the_format_in_full(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "float")
    load(tmp_path / "float", quantization_config=GroupQuantConfig(group_size=16)).save_pretrained(tmp_path / "packed")
    stored = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "group_quant"
    assert (stored["bits"], stored["group_size"], stored["zeros"]) == (4, 16, "packed")


def test_dequantize_gives_a_plain_float_model(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    model = load(tmp_path, quantization_config=GroupQuantConfig())
    before = logits(model, tokens())
    plain = model.dequantize()
    assert not any(isinstance(m, GroupQuantLinear) for m in plain.modules())
    torch.testing.assert_close(logits(plain, tokens()), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("field", "value"),
    [("bits", 3), ("group_size", 33), ("algorithm", "magic"), ("scale_dtype", "int8"), ("symmetric", "yes")],
)
def test_bad_settings_are_refused_with_what_is_allowed(field, value):
    with pytest.raises(ConfigError, match=field):
        GroupQuantConfig(**{field: value})


def test_a_module_to_keep_that_is_not_there_is_named(tmp_path, caplog):
    tiny_llama().save_pretrained(tmp_path)
    load(tmp_path, quantization_config=GroupQuantConfig(modules_to_not_convert=["down_proj", "donw_proj"]))
    assert "donw_proj names no module of LlamaForCausalLM" in caplog.text
    caplog.clear()
    load(tmp_path, quantization_config=GroupQuantConfig(modules_to_not_convert=["down_proj", "layers.1", "lm_head"]))
    assert "names no module" not in caplog.text


def test_a_model_without_a_layer_to_quantize_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no linear layer to quantize"):
        load(tmp_path, quantization_config=GroupQuantConfig(modules_to_not_convert=["model"]))


@pytest.mark.parametrize("packed", [False, True])
def test_layers_on_disk_are_refused_by_name(tmp_path, packed):
    model = quantize_model_(tiny_llama(), GroupQuantConfig()) if packed else tiny_llama()
    model.save_pretrained(tmp_path)
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb"), "cpu")
    quantize = {} if packed else {"quantization_config": GroupQuantConfig()}
    with pytest.raises(ConfigError, match=r"'model\.layers\.1' on disk"):
        load(tmp_path, device_map={**places, "lm_head": "cpu", "model.layers.1": "disk"}, **quantize)


@pytest.mark.parametrize("packed", [False, True])
def test_so_are_those_that_a_map_puts_there_by_itself(tmp_path, packed):
    model = quantize_model_(tiny_llama(), GroupQuantConfig()) if packed else tiny_llama()
    model.save_pretrained(tmp_path)
    quantize = {} if packed else {"quantization_config": GroupQuantConfig()}
    room = {"cpu": "45KB"}
    with pytest.raises(ConfigError, match=r"'.+' on disk"):
        load(tmp_path, device_map="auto", max_memory=room, offload_folder=str(tmp_path / "disk"), **quantize)


def test_a_map_that_is_made_by_itself_counts_the_bytes_that_layers_will_have(tmp_path):
    """Room for the packed model, which is a third of the float one."""
    tiny_llama(num_hidden_layers=8, hidden_size=128).save_pretrained(tmp_path)
    model = load(tmp_path, quantization_config=GroupQuantConfig())
    largest = sum(tensor.nbytes for tensor in model.lm_head.parameters())  # accelerate keeps as much free for it
    room = {"cpu": f"{(model.get_memory_footprint() * 1.2 + largest) // 1000:.0f}KB"}
    settings = {"device_map": "auto", "max_memory": room, "offload_folder": str(tmp_path / "disk")}
    placed = load(tmp_path, quantization_config=GroupQuantConfig(), **settings)
    assert torch.equal(logits(placed, tokens()), logits(model, tokens()))


@pytest.mark.parametrize("algorithm", ["rtn", "hqq"])
@pytest.mark.parametrize("settings", [{"group_size": 16}, {"scale_dtype": "float32"}, {"bits": 2}])
def test_what_a_map_counts_for_a_weight_is_what_it_takes(algorithm, settings):
    config = GroupQuantConfig(algorithm=algorithm, **settings)
    layer = quantize_model_(tiny_llama(hidden_size=128), config).model.layers[0].self_attn.q_proj
    taken = sum(tensor.nbytes for tensor in (layer.weight, layer.scales, layer.zeros))
    assert taken / (layer.in_features * layer.out_features) == bytes_per_weight(config)


def test_a_weight_of_another_shape_than_the_configuration_says_is_not_quantized(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"proj: the file holds a weight of .*96.*, and config.json .*128"):
        load(tmp_path, quantization_config=GroupQuantConfig(), intermediate_size=128)


@pytest.mark.parametrize("stacked", [False, True])
def test_a_weight_of_another_shape_that_is_to_be_ignored_is_drawn_in_float_alone(tmp_path, stacked):
    """transformers 4.57 would have memory quantized that nothing was loaded into."""
    model = mixture("GptOss") if stacked else tiny_llama()
    model.save_pretrained(tmp_path)
    settings = {"ignore_mismatched_sizes": True, "intermediate_size": 128}
    with pytest.raises(CheckpointError, match=r"(down|up)_proj: the file holds .*; .* modules_to_not_convert"):
        load(tmp_path, quantization_config=GroupQuantConfig(), **settings)
    kept = GroupQuantConfig(modules_to_not_convert=["experts" if stacked else "mlp"])
    drawn = load(tmp_path, quantization_config=kept, **settings).model.layers[1].mlp
    down = drawn.experts.down_proj if stacked else drawn.down_proj.weight
    assert 128 in down.shape
    assert 0.01 < down.std() < 0.03


def in_float8(model, part):
    for name, parameter in model.named_parameters():
        if part in name:
            parameter.data = parameter.data.to(torch.float8_e4m3fn)
    return model


@pytest.mark.parametrize(
    "settings", [{}, {"quantize_embeddings": True}, {"algorithm": "gptq", "calibration": tokens()}]
)
@pytest.mark.parametrize("part", ["proj", ""])
def test_a_file_in_float8_is_quantized_in_the_type_of_the_model_and_a_model_in_memory_is_refused(
    tmp_path, part, settings
):
    narrow = in_float8(tiny_llama(), part)
    narrow.save_pretrained(tmp_path / "narrow")
    with pytest.raises(ConfigError, match=r"\.weight is in float8, .*model\.to\(torch\.bfloat16\)"):
        quantize_model_(narrow, GroupQuantConfig(**settings))
    narrow.to(torch.float32).save_pretrained(tmp_path / "wide")
    found, expected = (
        load(tmp_path / kind, dtype=torch.float32, quantization_config=GroupQuantConfig(**settings)).state_dict()
        for kind in ("narrow", "wide")
    )
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_classifier_without_a_base_model_keeps_its_head_in_float():
    sizes = {
        "d_model": 64,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "decoder_layers": 1,
    }
    config = WhisperConfig(**sizes, num_mel_bins=16, vocab_size=100, pad_token_id=0, decoder_attention_heads=2)
    model = quantize_model_(WhisperForAudioClassification(config), GroupQuantConfig())
    assert type(model.classifier) is type(model.projector) is nn.Linear
    assert isinstance(model.encoder.layers[0].fc1, GroupQuantLinear)


def test_a_folder_says_which_layers_it_holds_packed(tmp_path):
    """Another version of transformers, or of this package, may have left other layers in float."""
    model = tiny_llama()
    quantize_model_(model, GroupQuantConfig(group_size=16, modules_to_not_convert=["down_proj"]))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = ["up_proj"]  # what this version would leave in float
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = load(tmp_path)
    assert type(again.model.layers[0].mlp.down_proj) is nn.Linear
    assert isinstance(again.model.layers[0].mlp.up_proj, GroupQuantLinear)
    torch.testing.assert_close(logits(again, tokens()), logits(model, tokens()), rtol=0, atol=0)


def test_experts_packed_one_by_one_are_refused_where_they_are_one_tensor(tmp_path):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **SIZES, num_local_experts=2))
    quantize_model_(model, GroupQuantConfig(group_size=16))
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    packed = {
        k.replace("0.block_sparse_moe.experts.0.w1", "0.block_sparse_moe.experts.0.other"): v
        for k, v in load_file(file).items()
    }
    save_file(packed, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'model\.layers\.0\.\w+\.experts\.0\.other' is packed by itself"):
        load(tmp_path)


def test_layers_whose_weight_others_read_stay_in_float():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 50, "state_size": 8, "time_step_rank": 16}
    model = MambaForCausalLM(MambaConfig(**sizes))
    quantize_model_(model, GroupQuantConfig(group_size=16))
    mixer = model.backbone.layers[0].mixer
    assert isinstance(mixer.in_proj, GroupQuantLinear)  # called
    assert all(type(layer) is nn.Linear for layer in (mixer.x_proj, mixer.dt_proj, mixer.out_proj))  # read by kernels

    attention = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    convolutions = {"conv_dim": (32,), "conv_stride": (5,), "conv_kernel": (10,), "num_conv_pos_embeddings": 16}
    speech = WavLMModel(WavLMConfig(**attention, **convolutions, num_conv_pos_embedding_groups=2)).eval()
    quantize_model_(speech, GroupQuantConfig())
    block = speech.encoder.layers[0]
    assert isinstance(block.feed_forward.output_dense, GroupQuantLinear)
    assert type(block.attention.q_proj) is nn.Linear
    assert torch.isfinite(speech(torch.randn(1, 400)).last_hidden_state).all()


@pytest.mark.skipif(not BEFORE_5, reason="transformers 5 writes safetensors only")
def test_a_pickle_that_nobody_could_open_is_not_written(tmp_path):
    model = quantize_model_(tiny_llama(), GroupQuantConfig())
    with pytest.raises(
        ConfigError, match=r"safe_serialization=False would write files that no packed model loads from"
    ):
        model.save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.glob("*.bin"))


def test_a_layer_that_cannot_be_quantized_is_named(tmp_path):
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1e-7)
    model.save_pretrained(tmp_path)
    for quantized in (
        lambda: load(tmp_path, quantization_config=GroupQuantConfig()),
        lambda: quantize_model_(model, GroupQuantConfig()),
    ):
        with pytest.raises(ConfigError, match=r"^model\.layers\.1\.mlp\.up_proj: quantize: weights of at most"):
            quantized()
