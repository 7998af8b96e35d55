"""What a merged model owns, and the models that merge beside those of transformers."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    T5Config,
    T5EncoderModel,
)

from qbl_trl import GroupQuantConfig, QBLoRAConfig, merge, to_lora, verify
from qbl_trl.errors import MergeError
from qbl_trl.quant.algorithms import quantize
from qbl_trl.quant.apply import quantize_layer_
from qbl_trl.quant.hf_quantizer import quantize_model_
from qbl_trl.quant.linear import GroupQuantLinear
from tests.tiny import logits, tiny_gpt2, tiny_llama, tokens

IDS = tokens()
SIDE = {"layers": 1, "attention_heads": 4, "ffn_dim": 96}


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_training_on_does_not_move_the_biases_of_a_merged_model(bias):
    model = get_peft_model(tiny_gpt2(), QBLoRAConfig(r=2, bias=bias, task_type="CAUSAL_LM"))
    merged = merge(model)
    before = logits(merged, IDS)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, 1.0)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert torch.equal(logits(merged, IDS), before)
    assert model.get_input_embeddings().weight.data_ptr() == merged.get_input_embeddings().weight.data_ptr()


def sequence(quantized):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    for name in ("0", "2") if quantized else ():
        quantize_layer_(model, name, model.get_submodule(name).weight.data, GroupQuantConfig())
    return model


@pytest.mark.parametrize("quantized", [False, True])
def test_a_model_of_torch_alone_merges(quantized):
    settings = {"target_modules": ["0", "2"], "init_lora_weights": False}
    model = get_peft_model(sequence(quantized), QBLoRAConfig(r=2, in_factor=32, **settings))
    x = torch.randn(3, 64)
    with torch.no_grad():
        expected, merged = model(x), merge(model)
        torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-4)  # float32 sums in another order
    assert type(merged) is nn.Sequential
    assert isinstance(merged[0], GroupQuantLinear) == quantized


def test_a_model_of_torch_alone_is_refused_by_layer_like_any_other():
    model = get_peft_model(sequence(True), QBLoRAConfig(r=2, target_modules=["0"], out_factor=1))
    with pytest.raises(MergeError, match=r"0: in_factor=2 is no multiple"):
        merge(model)


BERT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 100}


@pytest.mark.parametrize("quantized", [False, True])
def test_a_head_that_no_embedding_is_tied_to_is_nobodys_business(quantized):
    config = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**BERT), BertConfig(**BERT))
    model = EncoderDecoderModel(config).eval()
    if quantized:
        quantize_model_(model, GroupQuantConfig())
    adapted = get_peft_model(model, QBLoRAConfig(r=4, in_factor=32, out_factor=1, init_lora_weights=False)).eval()
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS}
    with torch.no_grad():
        expected = adapted(**inputs).logits
        torch.testing.assert_close(merge(adapted)(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


def test_an_encoder_that_keeps_no_cache_runs_when_it_is_merged():
    config = T5Config(vocab_size=100, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4)
    model = quantize_model_(T5EncoderModel(config).eval(), GroupQuantConfig())
    adapted = get_peft_model(model, QBLoRAConfig(quantization_aware=True, r=4, init_lora_weights=False)).eval()
    with torch.no_grad():
        expected = adapted(IDS).last_hidden_state
        torch.testing.assert_close(merge(adapted)(IDS).last_hidden_state, expected, rtol=1e-4, atol=1e-4)


def test_a_layer_that_is_quantized_again_keeps_its_own_format():
    model = quantize_model_(tiny_llama(), GroupQuantConfig())
    layer = model.model.layers[0].mlp.down_proj
    fine = quantize(
        layer.dequantize(), bits=8, group_size=16, symmetric=True, algorithm="rtn", scale_dtype=torch.float32
    )
    settings = {"bits": 8, "group_size": 16, "symmetric": True}
    model.model.layers[0].mlp.down_proj = GroupQuantLinear.from_affine(fine, **settings)
    config = QBLoRAConfig(r=4, in_factor=2, out_factor=2, target_modules=["down_proj"], init_lora_weights=False)
    merged = merge(get_peft_model(model, config), lossy="requantize")
    stored = [merged.model.layers[index].mlp.down_proj.format for index in (0, 1)]
    assert [(f.bits, f.group_size, f.zeros, f.scale_dtype) for f in stored] == [
        (8, 16, "none", "float32"),
        (4, 32, "packed", "float16"),
    ]


@pytest.mark.parametrize("settings", [{"quantization_aware": True, "adapter": "block"}, {"quantization_aware": True}])
def test_what_is_the_callers_default_for_new_tensors_is_no_matter(tmp_path, settings):
    base = quantize_model_(tiny_llama(), GroupQuantConfig())
    model = get_peft_model(base, QBLoRAConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **settings)).eval()
    expected = logits(model, IDS)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            merged = merge(model)
            to_lora(model, tmp_path / "lora")
            report = verify(model, merged, IDS)
            assert torch.zeros(1).is_meta
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert report.max_abs_difference < 1e-5
    torch.testing.assert_close(logits(merged, IDS), expected, rtol=0, atol=1e-5)


def test_a_model_in_data_parallel_is_seen_through():
    model = get_peft_model(tiny_llama(), QBLoRAConfig(r=2, init_lora_weights=False)).eval()
    merged = merge(nn.DataParallel(model))
    torch.testing.assert_close(logits(merged, IDS), logits(model, IDS), rtol=0, atol=1e-5)  # float32 rounding


def test_what_is_merged_in_inference_mode_trains_on():
    settings = {"r": 1, "quantization_aware": True}
    model = get_peft_model(quantize_model_(tiny_llama(), GroupQuantConfig()), QBLoRAConfig(**settings))
    with torch.inference_mode():
        merged = merge(model)
    again = get_peft_model(merged, QBLoRAConfig(**settings)).train()
    again(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None for p in again.parameters() if p.requires_grad)


def test_a_tied_head_of_a_model_of_torch_alone_leaves_its_embedding_as_it_is():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.table(ids))

    torch.manual_seed(0)
    model = get_peft_model(Tied(), QBLoRAConfig(r=2, target_modules=["head"], init_lora_weights=False)).eval()
    ids = torch.arange(20)[None]
    torch.testing.assert_close(merge(model)(ids), model(ids), rtol=1e-4, atol=1e-5)
    expected = model(ids)
    torch.testing.assert_close(model.merge_and_unload()(ids), expected, rtol=1e-4, atol=1e-5)


def sharing():
    base = tiny_llama()
    first, second = (layer.self_attn.q_proj for layer in base.model.layers)
    second.weight = first.weight
    return base, QBLoRAConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


@pytest.mark.parametrize("merging", [merge, lambda m: m.merge_and_unload(), lambda m: m.merge_adapter()])
def test_a_weight_that_another_layer_computes_with_too_takes_no_change(merging):
    base, config = sharing()
    model = get_peft_model(base, config)
    weight = base.model.layers[0].self_attn.q_proj.weight
    before = weight.clone()
    with pytest.raises(MergeError, match=r"layers\.0\.\S+q_proj computes with the weight of \S*layers\.1\.\S+q_proj,"):
        merging(model)
    assert torch.equal(weight, before)


def test_what_shares_a_weight_and_is_not_merged_is_no_matter():
    base, config = sharing()
    model = get_peft_model(base, config)
    model.add_adapter("apart", QBLoRAConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    model.merge_adapter(["apart"])
    model.unmerge_adapter()
    model.set_adapter("apart")
    with pytest.raises(MergeError, match="computes with the weight of"):
        model.merge_adapter(["default"])


@pytest.mark.parametrize("kind", ["bart", "mbart", "t5"])
def test_a_head_that_is_tied_to_several_embeddings_is_merged_in_place_by_itself(kind):
    widths = {"d_model": 64, "vocab_size": 100, "max_position_embeddings": 64}
    sides = {f"{side}_{name}": number for side in ("encoder", "decoder") for name, number in SIDE.items()}
    own = {"d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4} if kind == "t5" else sides
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(kind, **widths, **own))
    model = get_peft_model(model, QBLoRAConfig(r=2, target_modules=["lm_head", "k_proj", "k"], init_lora_weights=False))
    read = {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}
    with torch.no_grad():
        expected = model.eval()(**read).logits
        model.merge_adapter()
        torch.testing.assert_close(model(**read).logits, expected, rtol=1e-4, atol=1e-4)


def test_what_a_model_remembers_of_its_last_batch_is_no_obstacle():
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
    recurrent = RecurrentGemmaConfig(**sizes, num_key_value_heads=2, lru_width=64, vocab_size=100)
    base = quantize_model_(RecurrentGemmaForCausalLM(recurrent), GroupQuantConfig())
    model = get_peft_model(base, QBLoRAConfig(quantization_aware=True, r=2, init_lora_weights=False))
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    model.base_model.model.kept = [model.get_input_embeddings()(IDS) * model.get_input_embeddings().weight.sum()]
    merged = merge(model)
    torch.testing.assert_close(
        logits(merged, IDS), logits(model.eval(), IDS), rtol=1e-4, atol=1e-5
    )  # sums in another order
