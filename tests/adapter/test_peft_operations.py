"""What a PEFT user does with LoRA, done with balanced adapters."""

import copy
import warnings

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.helpers import rescale_adapter_scale
from torch import nn
from transformers import MambaConfig, MambaForCausalLM, PhiConfig, PhiForCausalLM

from qbl_trl import GroupQuantConfig, QBLoRAConfig, merge
from qbl_trl.adapter.layer import adapter_layers
from qbl_trl.errors import ConfigError
from qbl_trl.quant.hf_quantizer import quantize_model_
from tests.adapter.models import MODELS, config, groups
from tests.tiny import SIZES, logits, tiny_gpt2, tiny_llama, tokens

IDS = tokens()


@pytest.fixture(params=MODELS)
def model(request):
    return get_peft_model(MODELS[request.param](), config()).eval()


def test_all_linear_adapts_every_linear_layer_but_the_head():
    names = {name.rpartition(".")[2] for name in adapter_layers(get_peft_model(tiny_llama(), config()))}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_saved_adapter_loads_onto_the_same_base(tmp_path, kind, low_cpu_mem_usage):
    model = get_peft_model(MODELS[kind](), config()).eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(MODELS[kind](), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(logits(again, IDS), logits(model, IDS))


@pytest.mark.parametrize("settings", [{"adapter": "block", "in_factor": 4}, {"use_rslora": True}, {"pooling": "mean"}])
def test_every_field_of_ours_survives_saving(tmp_path, settings):
    model = get_peft_model(tiny_llama(), config(**settings)).eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert torch.equal(logits(again, IDS), logits(model, IDS))
    for name, value in settings.items():
        assert getattr(again.peft_config["default"], name) == value


def test_reduced_and_inherited_factors_are_written_down_and_read_back(tmp_path):
    settings = {"in_factor": 48, "out_factor": 5, "on_misfit": "reduce"}
    model = get_peft_model(tiny_llama(), config(**settings)).eval()
    model.save_pretrained(tmp_path)
    saved = QBLoRAConfig.from_pretrained(tmp_path)
    saved.on_misfit = "error"
    for name, layer in adapter_layers(PeftModel.from_pretrained(tiny_llama(), tmp_path, config=saved)).items():
        twin = adapter_layers(model)[name]
        assert (layer.in_factor, layer.out_factor) == (twin.in_factor, twin.out_factor)
    aware = get_peft_model(groups(), config(quantization_aware=True))
    assert aware.peft_config["default"].in_factor == 32


def test_the_automatic_class_and_transformers_own_loader_find_the_adapter(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    base = type(tiny_llama()).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, config()).eval()
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model, IDS)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval(), IDS), expected)
    plain = tiny_llama()
    plain.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(plain.eval(), IDS), expected)


def test_transformers_add_adapter_trains_and_saves(tmp_path):
    model = tiny_llama()
    model.add_adapter(config())
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").is_file()


def test_only_the_adapter_is_trainable_and_gets_gradients(model):
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {n for n, p in model.named_parameters() if "lora_" in n}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(model, reentrant):
    model.train()
    grads = []
    for checkpoint in (False, True):
        if checkpoint:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        torch.manual_seed(0)  # GPT-2 drops out
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)  # recomputed sums, accumulated in another order


def test_adapters_are_added_switched_disabled_and_deleted(model):
    base = copy.deepcopy(model).unload()
    first = logits(model, IDS)
    torch.manual_seed(1)
    model.add_adapter("second", config(in_factor=4, target_modules=None if "GPT2" in str(type(base)) else "all-linear"))
    assert torch.equal(logits(model, IDS), first)
    model.set_adapter("second")
    second = logits(model, IDS)
    assert not torch.allclose(first, second)
    with model.disable_adapter():
        assert torch.equal(logits(model, IDS), logits(base, IDS))
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(logits(model, IDS), first)
    assert all("second" not in layer.rank for layer in adapter_layers(model).values())
    assert not any("second" in name for name in model.state_dict())


def test_a_mixed_batch_gives_each_sample_its_adapter(model):
    torch.manual_seed(1)
    model.add_adapter("second", config(target_modules=sorted({n.rpartition(".")[2] for n in adapter_layers(model)})))
    alone = {name: (model.set_adapter(name), logits(model, IDS))[1] for name in ("default", "second")}
    with torch.no_grad():
        mixed = model(input_ids=IDS, adapter_names=["second", "default"]).logits
    torch.testing.assert_close(mixed[0], alone["second"][0], rtol=1e-5, atol=1e-5)  # a product per sample
    torch.testing.assert_close(mixed[1], alone["default"][1], rtol=1e-5, atol=1e-5)


def test_rank_and_alpha_patterns_set_nominal_values():
    model = get_peft_model(
        tiny_llama(), config(rank_pattern={"q_proj": 8}, alpha_pattern={"layers.1.mlp.up_proj": 32}, lora_alpha=4)
    )
    layers = adapter_layers(model.get_base_model())
    assert layers["model.layers.0.self_attn.q_proj"].lora_A["default"].weight.shape == (16, 32)  # 2 r, K / 2
    assert layers["model.layers.0.mlp.up_proj"].scaling["default"] == 1
    assert layers["model.layers.1.mlp.up_proj"].scaling["default"] == 8


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"target_modules": ["q_proj"]}, 2),
        ({"target_modules": r".*layers\.1\..*(up|down)_proj"}, 2),
        ({"target_modules": None}, 4),
        ({"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}, 2),
        ({"exclude_modules": ["down_proj"]}, 12),
        ({"layers_to_transform": [1]}, 7),
    ],
)
def test_targets_are_chosen_as_for_lora(settings, count):
    layers = adapter_layers(get_peft_model(tiny_llama(), config(**settings)))
    assert len(layers) == count


def test_modules_to_save_and_trainable_tokens_go_with_the_adapter(tmp_path):
    settings = {"modules_to_save": ["lm_head"], "trainable_token_indices": {"embed_tokens": [1, 2]}}
    model = get_peft_model(tiny_llama(), config(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert torch.equal(logits(again, IDS), logits(model, IDS))


def test_scales_are_set_and_put_back(model):
    layer = next(iter(adapter_layers(model).values()))
    delta = layer.get_delta_weight("default")
    layer.scale_layer(2.0)
    torch.testing.assert_close(layer.get_delta_weight("default"), 2 * delta)
    layer.unscale_layer(2.0)
    before = logits(model, IDS)
    with rescale_adapter_scale(model, 0.0):
        scaled = logits(model, IDS)
    assert not torch.equal(scaled, before)
    assert torch.equal(logits(model, IDS), before)


@pytest.mark.parametrize("settings", [{"use_rslora": True}, {"adapter": "block", "in_factor": 4}])
def test_every_kind_of_adapter_is_scaled_and_named_in_a_batch(settings):
    model = get_peft_model(tiny_llama(), config(**settings)).eval()
    adapted = logits(model, IDS)
    with model.disable_adapter():
        plain = logits(model, IDS)
    with torch.no_grad():
        mixed = model(input_ids=IDS, adapter_names=["default", "__base__"]).logits
    torch.testing.assert_close(mixed, torch.stack([adapted[0], plain[1]]), rtol=1e-5, atol=1e-5)  # product per sample
    with rescale_adapter_scale(model, 0.0):
        torch.testing.assert_close(logits(model, IDS), plain, rtol=1e-5, atol=1e-6)  # added zeros
    layers = adapter_layers(model).values()
    for layer in layers:
        layer.scale_layer(3.0)
        layer.scale_layer(0.5)
    assert not torch.allclose(logits(model, IDS), adapted)
    for layer in layers:
        layer.unscale_layer()
    assert torch.equal(logits(model, IDS), adapted)


def test_status_reports_the_method(model):
    status = get_model_status(model)
    assert status.peft_types == {"default": "QBLORA"}
    assert status.active_adapters == ["default"]
    assert all(row.requires_grad == {"default": True} for row in get_layer_status(model))


def test_state_dicts_go_in_and_out(model):
    state = {k: torch.randn_like(v) for k, v in get_peft_model_state_dict(model).items()}
    result = set_peft_model_state_dict(model, state)
    assert not result.unexpected_keys
    for key, value in get_peft_model_state_dict(model).items():
        assert torch.equal(value, state[key])


def test_saving_warns_of_matrices_whose_shards_were_not_gathered(tmp_path):
    model = get_peft_model(tiny_llama(), config())
    next(iter(adapter_layers(model).values())).lora_A["default"].weight.data = torch.zeros(0)
    with pytest.warns(UserWarning, match="shards"):
        model.save_pretrained(tmp_path)


def test_layers_whose_weight_a_fused_kernel_reads_are_refused():
    def mamba() -> nn.Module:
        return MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, state_size=4, vocab_size=100))

    with pytest.raises(ConfigError, match=r"out_proj: the kernels of a mamba model.*exclude_modules=\[\"out_proj\"\]"):
        get_peft_model(mamba(), config(on_misfit="reduce"))
    layers = adapter_layers(get_peft_model(mamba(), config(on_misfit="reduce", exclude_modules=["out_proj"])))
    assert {name.rpartition(".")[2] for name in layers} == {"in_proj", "x_proj", "dt_proj"}


def test_one_adapter_for_a_tied_head_and_its_embedding_is_refused_before_anything_changes():
    base, adapter = tiny_llama(tie_word_embeddings=True), config(target_modules=["q_proj", "lm_head"])
    adapter.ensure_weight_tying = True
    with pytest.raises(ConfigError, match="ensure_weight_tying: lm_head and the embedding are one table"):
        get_peft_model(base, adapter)
    adapter.ensure_weight_tying = False
    layers = adapter_layers(get_peft_model(base, adapter))
    assert {name.rpartition(".")[2] for name in layers} == {"q_proj", "lm_head"}


def test_unloading_draws_no_bar(capfd):
    get_peft_model(tiny_llama(), config()).unload()
    get_peft_model(tiny_llama(), config()).merge_and_unload()
    assert capfd.readouterr().err == ""
    get_peft_model(tiny_llama(), config()).merge_and_unload(progressbar=True)
    assert "Unloading and merging model" in capfd.readouterr().err


def test_what_is_not_supported_is_refused_in_words(tmp_path):
    model = get_peft_model(tiny_llama(), config())
    with pytest.raises(ConfigError, match=r"embed_tokens: Embedding cannot hold a balanced adapter"):
        get_peft_model(tiny_llama(), config(target_modules=["embed_tokens"]))
    with pytest.raises(ConfigError, match="save without this argument"):
        model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    with pytest.raises(ConfigError, match="custom layer classes are not supported"):
        config()._register_custom_module({nn.LSTM: nn.Identity})
    with pytest.raises(ValueError, match=r"QBLORA and PeftType\.LORA"):
        model.add_adapter("plain", LoraConfig())


def test_the_adapter_stays_in_float32_over_a_half_precision_base_unless_told_otherwise():
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        model = get_peft_model(tiny_llama().to(torch.bfloat16), config(), autocast_adapter_dtype=autocast)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}
        assert logits(model, IDS).dtype == torch.bfloat16


def test_ranks_that_pooling_leaves_no_room_for_are_worth_one_warning():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_peft_model(groups(), config(r=16, quantization_aware=True, out_factor=2))
    (warning,) = [str(w.message) for w in caught if "full rank" in str(w.message)]
    assert "on 14 of 14 layers r=16" in warning
    assert "k_proj: rank 85 for 16 x 2 blocks" in warning  # the layer that is over by most
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*full rank")
        get_peft_model(groups(), config(r=1, in_factor=2))  # full rank is far away
        get_peft_model(groups(), config(r=16, quantization_aware=True, adapter="block"))  # has no rank
        get_peft_model(tiny_llama(), config(r=200, in_factor=1, out_factor=1))  # a plain LoRA's own choice


def test_injection_without_a_wrapper_computes_the_same():
    torch.manual_seed(5)
    wrapped = get_peft_model(tiny_llama(), config()).eval()
    bare = inject_adapter_in_model(config(), tiny_llama())
    set_peft_model_state_dict(bare, get_peft_model_state_dict(wrapped))
    state = {k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(wrapped).items()}
    set_peft_model_state_dict(bare, state)
    assert torch.equal(logits(bare.eval(), IDS), logits(wrapped, IDS))


def test_reentrant_checkpointing_trains_over_a_4_bit_base_as_over_a_float_one():
    base = quantize_model_(tiny_llama(), GroupQuantConfig())
    base.gradient_checkpointing_enable({"use_reentrant": True})
    model = get_peft_model(base, QBLoRAConfig(r=2, quantization_aware=True)).train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_placing_and_merging_use_no_name_that_transformers_deprecates():
    base = quantize_model_(tiny_llama(), GroupQuantConfig())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base.gradient_checkpointing_enable()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        model = inject_adapter_in_model(config(quantization_aware=True), base)  # a PeftModel uses such names itself
        merged = merge(model)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert not any(getattr(module, "gradient_checkpointing", False) for module in merged.modules())


def test_peft_prepares_a_4_bit_base_for_checkpointing_that_is_switched_on_later():
    model = get_peft_model(groups(), QBLoRAConfig(r=2, quantization_aware=True)).train()
    model.prepare_model_for_gradient_checkpointing(model)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("kind", "r"), [("low_rank", 4), ("low_rank", 64), ("block", 4)])
def test_an_adapter_that_comes_to_a_model_in_evaluation_drops_nothing(kind, r):
    settings = config(r=r, adapter=kind, lora_dropout=0.5, target_modules=["q_proj", "v_proj"])
    model, ids = get_peft_model(tiny_llama(), settings).eval(), tokens(8, 60)
    model.add_adapter("second", settings)
    model.set_adapter("second")
    assert torch.equal(logits(model, ids), logits(model, ids))


def test_rows_that_train_and_a_tied_head_with_an_adapter_or_a_bias_are_refused():
    rows = {"trainable_token_indices": [1, 5]}
    with pytest.raises(ConfigError, match=r"lm_head is one table with the embedding.*without its adapter"):
        get_peft_model(tiny_llama(tie_word_embeddings=True), config(target_modules=["q_proj", "lm_head"], **rows))
    biased = PhiForCausalLM(PhiConfig(**{**SIZES, "num_key_value_heads": 4, "tie_word_embeddings": True}))
    with pytest.raises(ConfigError, match="without its bias"):
        get_peft_model(biased, config(target_modules=["q_proj"], **rows))
    get_peft_model(tiny_llama(tie_word_embeddings=True), config(target_modules=["q_proj"], **rows))


def test_rows_of_another_embedding_train_beside_an_adapted_tied_head():
    settings = config(target_modules=["c_attn", "lm_head"], trainable_token_indices={"wpe": [1]})
    model = get_peft_model(tiny_gpt2(), settings).eval()
    torch.testing.assert_close(logits(merge(model), IDS), logits(model, IDS), rtol=1e-4, atol=1e-4)
