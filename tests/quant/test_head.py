"""The embedding and the head under quantize_embeddings: what is named stays in float, and comes back so."""

import json

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)
from transformers.models.biogpt.modeling_biogpt import BioGptScaledWordEmbedding

from qbl_trl import GroupQuantConfig
from qbl_trl.errors import ConfigError
from qbl_trl.generation import BEFORE_5
from qbl_trl.quant.embedding import GroupQuantEmbedding, embedding_scale
from qbl_trl.quant.head import quantize_embeddings_
from qbl_trl.quant.hf_quantizer import quantize_model_
from qbl_trl.quant.linear import GroupQuantLinear
from tests.tiny import logits, tiny_llama, tokens

IDS = tokens()


def kinds(model):
    return type(model.get_input_embeddings()), type(model.get_output_embeddings())


@pytest.mark.parametrize(
    ("tied", "kept", "expected"),
    [
        (False, ["lm_head", "embed_tokens"], (nn.Embedding, nn.Linear)),
        (False, ["lm_head"], (GroupQuantEmbedding, nn.Linear)),
        (False, ["model.embed_tokens"], (nn.Embedding, GroupQuantLinear)),
        (False, ["down_proj"], (GroupQuantEmbedding, GroupQuantLinear)),
        (True, ["lm_head"], (nn.Embedding, nn.Linear)),
        (True, ["embed_tokens"], (nn.Embedding, nn.Linear)),
        (True, ["down_proj"], (GroupQuantEmbedding, GroupQuantLinear)),
    ],
)
def test_what_is_named_stays_in_float_and_a_tied_pair_stays_one(tmp_path, tied, kept, expected):
    tiny_llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "float")
    settings = GroupQuantConfig(quantize_embeddings=True, modules_to_not_convert=kept)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=settings)
    assert kinds(model) == expected
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert kinds(again) == expected
    assert (again.get_input_embeddings().weight is again.get_output_embeddings().weight) == tied
    assert torch.equal(logits(again, IDS), logits(model, IDS))


def test_an_embedding_that_does_more_than_look_rows_up_can_be_left_in_float():
    model = tiny_llama()
    table = model.model.embed_tokens
    model.model.embed_tokens = nn.Sequential(table)
    model.get_input_embeddings = lambda: model.model.embed_tokens
    with pytest.raises(ConfigError, match="LlamaForCausalLM has Sequential and Linear; set quantize_embeddings=False"):
        quantize_embeddings_(model, GroupQuantConfig(quantize_embeddings=True))
    kept = GroupQuantConfig(quantize_embeddings=True, modules_to_not_convert=["embed_tokens"])
    quantize_model_(model, kept)
    assert isinstance(model.lm_head, GroupQuantLinear)


@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_that_holds_them_packed_opens_whatever_its_configuration_keeps(tmp_path, tied):
    model = quantize_model_(tiny_llama(tie_word_embeddings=tied), GroupQuantConfig(quantize_embeddings=True))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = ["lm_head"]  # an older version packed it all the same
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert kinds(again) == (GroupQuantEmbedding, GroupQuantLinear)
    assert torch.equal(logits(again, IDS), logits(model, IDS))


@pytest.mark.parametrize("tied", [False, True])
def test_gptq_rounds_the_head_to_what_it_reads(tied):
    def packed(algorithm, calibration=None):
        torch.manual_seed(0)
        model = tiny_llama(tie_word_embeddings=tied)
        # a few features are much larger than the others, as in real models
        model.model.norm.weight.data[::16] = 20.0
        float_head = model.lm_head.weight.detach().clone()
        config = GroupQuantConfig(quantize_embeddings=True, algorithm=algorithm, calibration=calibration)
        return quantize_model_(model, config), float_head

    def head_error(model, float_head):
        seen = []
        with model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach())):
            logits(model, IDS)
        return (seen[0] @ (model.lm_head.dequantize() - float_head).T).square().mean()

    calibrated, rounded = packed("gptq", [tokens(8, 32, seed=3)]), packed("rtn")
    assert kinds(calibrated[0]) == (GroupQuantEmbedding, GroupQuantLinear)
    assert (calibrated[0].lm_head.weight is calibrated[0].get_input_embeddings().weight) == tied
    assert head_error(*calibrated) < 0.7 * head_error(*rounded)


def test_a_table_that_an_encoder_and_a_decoder_share_is_refused_before_work(tmp_path):
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4, "vocab_size": 100}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    settings = GroupQuantConfig(quantize_embeddings=True)
    message = r"reads the same table as shared, encoder\.embed_tokens, decoder\.embed_tokens; set quantize_embeddings"
    with pytest.raises(ConfigError, match=message):
        quantize_model_(model, settings)
    assert not any(isinstance(module, GroupQuantLinear) for module in model.modules())
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message):
        T5ForConditionalGeneration.from_pretrained(tmp_path, quantization_config=settings)


def test_a_model_without_an_embedding_is_told_so():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    convolutions = {"conv_dim": (32,), "conv_stride": (5,), "conv_kernel": (10,), "num_conv_pos_embeddings": 16}
    model = Wav2Vec2ForCTC(Wav2Vec2Config(**sizes, **convolutions, num_conv_pos_embedding_groups=2, vocab_size=20))
    with pytest.raises(ConfigError, match="Wav2Vec2ForCTC has NoneType"):
        quantize_model_(model, GroupQuantConfig(quantize_embeddings=True))


@pytest.mark.parametrize(("tied", "kept"), [(True, None), (False, None), (False, ["embed_tokens"])])
def test_resizing_a_packed_table_is_refused_before_anything_changes_with_what_works(tied, kept):
    settings = GroupQuantConfig(quantize_embeddings=True, modules_to_not_convert=kept)
    model = quantize_model_(tiny_llama(tie_word_embeddings=tied), settings)
    expected = logits(model, IDS)
    for asked in ({"new_num_tokens": 120}, {"new_num_tokens": 90}, {"pad_to_multiple_of": 64}):
        with pytest.raises(ConfigError, match=r"is packed .* keeps its 100 tokens\. .*model\.dequantize\(\)"):
            model.resize_token_embeddings(**asked)
    assert model.resize_token_embeddings(100, pad_to_multiple_of=4) is model.get_input_embeddings()
    assert torch.equal(logits(model, IDS), expected)
    larger = model.dequantize()
    larger.resize_token_embeddings(120)
    assert logits(quantize_model_(larger, settings), IDS).shape[-1] == 120


def test_a_tied_packed_pair_loads_under_a_map_of_devices_and_is_offloaded_whole(tmp_path):
    tied = tiny_llama(tie_word_embeddings=True)
    quantize_model_(tied, GroupQuantConfig(quantize_embeddings=True)).save_pretrained(tmp_path)
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path), tokens())
    for places in ("auto", {"": "cpu"}):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places)
        assert torch.equal(logits(model, tokens()), expected)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.lm_head.scales is model.model.embed_tokens.scales
    model = cpu_offload(
        AutoModelForCausalLM.from_pretrained(tmp_path), execution_device=torch.device("cpu"), offload_buffers=True
    )
    assert torch.equal(logits(model, tokens()), expected)


SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100, "max_position_embeddings": 64}
WIDTHS = {"hidden_size": 64, "intermediate_size": 96}
SCALED = {
    "gemma3_text": SIZES | WIDTHS | {"head_dim": 16},
    "gemma2": SIZES | WIDTHS | {"head_dim": 16},  # with transformers 4.57 it scales what a plain table gives
    "biogpt": SIZES | WIDTHS,
    "xglm": {"d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4, "vocab_size": 100},
}


@pytest.mark.parametrize("family", SCALED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tables_that_scale_what_is_looked_up_are_packed_opened_and_made_float_again(tmp_path, family, dtype):
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SCALED[family]))
    plain.save_pretrained(tmp_path / "float")
    settings = GroupQuantConfig(bits=8, group_size=16, quantize_embeddings=True)
    options = {"dtype": dtype, "quantization_config": settings}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", **options).eval()
    expected = logits(model, IDS)
    table = model.get_input_embeddings()
    assert isinstance(table, GroupQuantEmbedding)
    found, stated = table(IDS).float(), plain.get_input_embeddings()(IDS)
    assert (found - stated).abs().max() < 0.02 * stated.abs().max()  # 8 bits
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=dtype).eval()
    assert torch.equal(logits(again, IDS), expected)
    again.dequantize()
    assert type(again.get_input_embeddings()) is type(plain.get_input_embeddings())
    again.save_pretrained(tmp_path / "wide")
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype=dtype).eval()
    assert torch.equal(logits(wide, IDS), logits(again, IDS))
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert (logits(wide, IDS) - expected).abs().max() <= tolerance * expected.abs().max()


def test_scaled_tables_of_an_encoder_and_a_decoder_apart_are_refused():
    settings = {"d_model": 64, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "vocab_size": 100, "scale_embedding": True}
    settings |= {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    model = BartForConditionalGeneration(BartConfig(**settings, tie_word_embeddings=False))
    with pytest.raises(ConfigError, match="set quantize_embeddings=False"):
        quantize_model_(model, GroupQuantConfig(quantize_embeddings=True))


@pytest.mark.skipif(BEFORE_5, reason="transformers 4.57 has no such model")
def test_tables_of_which_a_model_reads_rows_itself_are_refused():
    text = {**SIZES, **WIDTHS, "head_dim": 16, "num_key_value_heads": 2, "hidden_size_per_layer_input": 16}
    text["vocab_size_per_layer_input"] = 100
    config = AutoConfig.for_model("gemma4", text_config=text, vision_config=None, audio_config=None)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError, match="set quantize_embeddings=False"):
        quantize_model_(model, GroupQuantConfig(quantize_embeddings=True))


def test_a_table_with_rows_of_its_own_is_none_that_scales():
    class WithRow(BioGptScaledWordEmbedding):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            self.own = nn.Parameter(torch.ones(4))

    assert embedding_scale(BioGptScaledWordEmbedding(9, 4, None, embed_scale=2.0)) == 2
    assert embedding_scale(WithRow(9, 4, None, embed_scale=2.0)) is None
