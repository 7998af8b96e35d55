"""merge: the caller's model untouched, codes untouched, the same function, or a refusal."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from qbl_trl import GroupQuantConfig, QBLoRAConfig, merge, to_lora
from qbl_trl.adapter.layer import adapter_layers
from qbl_trl.errors import ConfigError, MergeError
from qbl_trl.quant.hf_quantizer import quantize_model_
from qbl_trl.quant.linear import GroupQuantLinear
from qbl_trl.wrapped import unwrap
from tests.tiny import logits, tiny_gpt2, tiny_llama, tokens

IDS = tokens()
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # the same float32 sums in another order


def groups(**changes):
    return quantize_model_(tiny_llama(**changes), GroupQuantConfig(bits=4, group_size=32))


def adapted(base=groups, **settings):
    torch.manual_seed(3)
    defaults = {
        "r": 4,
        "out_factor": 2,
        "init_lora_weights": False,
        "task_type": "CAUSAL_LM",
        "quantization_aware": base is groups,
    }
    return get_peft_model(base(), QBLoRAConfig(**{**defaults, **settings})).eval()


def state_of(model):
    return {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict(keep_vars=False).items()}


@pytest.mark.parametrize("base", [groups, tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("settings", [{}, {"adapter": "block", "in_factor": 32}, {"out_factor": 1}])
def test_the_merged_model_computes_the_same_and_the_callers_model_is_left_alone(base, settings):
    model = adapted(base, **settings)
    model.train()
    names, flags = list(dict(model.named_modules())), {n: p.requires_grad for n, p in model.named_parameters()}
    before, state = logits(copy.deepcopy(model).eval(), IDS), state_of(model)
    merged = merge(model)
    torch.testing.assert_close(logits(merged, IDS), before, **CLOSE)
    assert not any("lora" in name for name, _ in merged.named_modules())
    assert list(dict(model.named_modules())) == names
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert model.training
    after = state_of(model)
    assert after.keys() == state.keys()
    assert all(torch.equal(after[n][1], state[n][1]) and after[n][0] == state[n][0] for n in state)


def test_codes_scales_and_zeros_are_shared_not_copied():
    model = adapted()
    merged = merge(model)
    for name, layer in adapter_layers(model.get_base_model()).items():
        base, other = layer.get_base_layer(), merged.get_submodule(name)
        assert isinstance(other, GroupQuantLinear)
        for part in ("weight", "scales", "zeros"):
            assert getattr(other, part).data_ptr() == getattr(base, part).data_ptr()
        assert base.delta is None
        assert other.delta is not None


def test_the_merged_checkpoint_loads_as_any_other(tmp_path):
    model = adapted()
    merged = merge(model)
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, IDS), logits(merged, IDS))


def test_several_active_adapters_are_merged_together():
    model = adapted()
    model.add_adapter("other", QBLoRAConfig(r=2, in_factor=64, init_lora_weights=False, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    expected = logits(model, IDS)
    torch.testing.assert_close(logits(merge(model), IDS), expected, **CLOSE)


def test_tied_embeddings_stay_tied():
    model = adapted(lambda: groups(tie_word_embeddings=True), quantization_aware=True)
    merged = merge(model)
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight


def test_a_half_precision_model_keeps_its_dtype_and_its_deltas_in_float32():
    model = adapted(lambda: groups().to(torch.bfloat16), quantization_aware=True)
    merged = merge(model)
    assert merged.get_input_embeddings().weight.dtype == torch.bfloat16
    assert {m.delta.dtype for m in merged.modules() if isinstance(m, GroupQuantLinear)} == {torch.float32}
    difference = (logits(merged, IDS) - logits(model, IDS)).float().abs().max()
    assert difference < 0.05 * logits(model, IDS).float().abs().max()  # 8 bits of mantissa


def test_modules_trained_whole_and_trained_tokens_come_along_as_copies():
    settings = {"modules_to_save": ["lm_head"], "trainable_token_indices": {"embed_tokens": [1, 2]}}
    model = adapted(**settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.add_(torch.randn_like(parameter))
    expected = logits(model, IDS)
    merged = merge(model)
    torch.testing.assert_close(logits(merged, IDS), expected, rtol=1e-4, atol=1e-3)  # the head was made 50 times larger
    with torch.no_grad():
        merged.lm_head.weight.zero_()
    torch.testing.assert_close(logits(model, IDS), expected)


def test_rows_trained_apart_in_a_tied_pair_come_apart(tmp_path):
    rows = {"trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [1, 3]}}
    model = adapted(lambda: groups(tie_word_embeddings=True), quantization_aware=True, **rows)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(torch.randn_like(parameter))
    expected = logits(model, IDS)
    merge(model).save_pretrained(tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(merged, IDS), expected, rtol=1e-4, atol=1e-4)  # float32 sums
    torch.testing.assert_close(logits(model, IDS), expected)


def test_wrappers_of_training_are_seen_through(tmp_path):
    model = adapted()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert unwrap(wrapped) is model.get_base_model()
        torch.testing.assert_close(logits(merge(wrapped), IDS), logits(model, IDS), **CLOSE)
    finally:
        torch.distributed.destroy_process_group()


def test_an_adapter_added_by_transformers_merges_as_well():
    base = groups()
    base.add_adapter(QBLoRAConfig(r=4, init_lora_weights=False, quantization_aware=True))
    torch.testing.assert_close(logits(merge(base), IDS), logits(base.eval(), IDS), **CLOSE)


def test_a_merged_model_takes_a_second_adapter_and_merges_again():
    once = merge(adapted())
    torch.manual_seed(9)
    twice = get_peft_model(once, QBLoRAConfig(r=4, init_lora_weights=False, quantization_aware=True)).eval()
    torch.testing.assert_close(logits(merge(twice), IDS), logits(twice, IDS), **CLOSE)


def test_a_pooling_that_does_not_fold_is_refused_by_layer_with_the_ways_out():
    with pytest.raises(MergeError, match=r"model\.layers\.0\.self_attn\.q_proj: in_factor=2 .* lossy=\"requantize\""):
        merge(adapted(quantization_aware=False))


def test_the_lossy_route_reports_its_loss(caplog):
    model = adapted(quantization_aware=False)
    with caplog.at_level("WARNING"):
        merged = merge(model, lossy="requantize")
    assert "14 layers were quantized again; relative weight error" in caplog.text
    assert torch.isfinite(logits(merged, IDS)).all()


def test_a_damaged_adapter_does_not_merge():
    model = adapted()
    next(iter(adapter_layers(model).values())).lora_B["default"].weight.data[0, 0] = float("inf")
    with pytest.raises(MergeError, match="NaNs detected"):
        merge(model)


def test_what_has_no_balanced_adapter_is_refused():
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no balanced adapters; place them with"):
        merge(tiny_llama())
    with pytest.raises(ConfigError, match=r"its adapters are of another PEFT method: .* merge_and_unload\(\)"):
        merge(get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules="all-linear")))
    with pytest.raises(ConfigError, match=r'lossy=\'round\' is not known; allowed: None, "requantize"'):
        merge(adapted(), lossy="round")


def test_a_forward_patched_onto_the_trained_model_is_not_carried_into_the_merged_one():
    model = adapted()
    inner = model.get_base_model()
    original = inner.forward
    inner.forward = lambda *args, **kwargs: original(*args, **kwargs)  # as TRL's fused head and Accelerate do
    merged = merge(model)
    merged.lm_head.weight = nn.Parameter(torch.zeros_like(merged.lm_head.weight))
    assert logits(merged, IDS).abs().max() == 0
    assert "forward" in vars(inner)


def test_weights_spread_over_processes_are_refused_with_the_way_out():
    model = adapted()
    next(model.parameters()).ds_id = 0  # as DeepSpeed ZeRO-3 marks them
    with pytest.raises(MergeError, match=r"spread over processes .* merged_output_dir"):
        merge(model)


def tied_groups(**quantization):
    return lambda: quantize_model_(tiny_llama(tie_word_embeddings=True), GroupQuantConfig(**quantization))


def changed(model):
    """As training would leave it: every trained tensor away from where it started."""
    torch.manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.05
    return model.eval()


def unloaded(model):
    return model.merge_and_unload()


@pytest.mark.parametrize("merging", [merge, unloaded])
@pytest.mark.parametrize(
    ("base", "settings"),
    [
        (groups, {}),
        (groups, {"target_modules": ["q_proj"]}),
        (tied_groups(), {"modules_to_save": ["lm_head"], "in_factor": 32}),
        (tied_groups(), {"modules_to_save": ["embed_tokens"], "in_factor": 32}),
        (tied_groups(), {"modules_to_save": ["lm_head", "embed_tokens"], "in_factor": 32}),
        (tied_groups(), {"target_modules": ["q_proj", "lm_head"], "in_factor": 32}),
        (tied_groups(quantize_embeddings=True), {"target_modules": ["q_proj", "lm_head"], "in_factor": 32}),
        (lambda: tiny_llama(tie_word_embeddings=True), {"target_modules": ["q_proj", "lm_head"]}),
        (lambda: tiny_llama(tie_word_embeddings=True), {"modules_to_save": ["lm_head"]}),
    ],
)
def test_what_is_saved_computes_what_was_trained(base, settings, merging, tmp_path):
    model = changed(adapted(base, **settings))
    expected = logits(model, IDS)
    plain = merging(model)
    torch.testing.assert_close(logits(plain, IDS), expected, **CLOSE)
    plain.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded, IDS), expected, **CLOSE)
    if merging is merge:
        torch.testing.assert_close(logits(model, IDS), expected, rtol=0, atol=0)


def test_adapters_in_half_precision_merge_exactly():
    model = adapted().bfloat16().float()  # values that bfloat16 holds
    expected = logits(model, IDS)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    torch.testing.assert_close(logits(merge(model), IDS), expected, **CLOSE)
    assert all(p.dtype == torch.bfloat16 for n, p in model.named_parameters() if "lora_" in n)


def test_disabled_adapters_are_not_merged_by_accident():
    model = adapted()
    with model.disable_adapter(), pytest.raises(MergeError, match="adapters are disabled"):
        merge(model)


def test_replicated_layers_are_refused(tmp_path):
    model = adapted(layer_replication=[(0, 2), (0, 2)])
    with pytest.raises(MergeError, match="replicated layers share weights"):
        merge(model)
    with pytest.raises(ConfigError, match="replicates layers"):
        to_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        (groups, {"modules_to_save": ["down_proj"]}),
        (groups, {"modules_to_save": ["mlp"]}),
        (tied_groups(quantize_embeddings=True), {"modules_to_save": ["embed_tokens"], "in_factor": 32}),
        (tied_groups(quantize_embeddings=True), {"trainable_token_indices": [1, 2], "in_factor": 32}),
        (tied_groups(quantize_embeddings=True), {"trainable_token_indices": {"embed_tokens": [1]}, "in_factor": 32}),
    ],
)
def test_packed_layers_are_not_trained_whole(base, settings):
    with pytest.raises(ConfigError, match="holds packed codes"):
        adapted(base, **settings)


@pytest.mark.parametrize("bits", [8, None])
def test_an_adapter_loaded_on_another_base_than_its_own_is_said(bits, tmp_path):
    adapted(quantization_aware=False, in_factor=2).save_pretrained(tmp_path)
    other = tiny_llama() if bits is None else quantize_model_(tiny_llama(), GroupQuantConfig(bits=bits))
    with pytest.warns(UserWarning, match="its outputs will differ"):
        PeftModel.from_pretrained(other, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*its outputs will differ")
        PeftModel.from_pretrained(groups(), tmp_path)


def test_a_tied_head_merged_in_place_leaves_the_embedding_alone():
    model = changed(adapted(lambda: tiny_llama(tie_word_embeddings=True), target_modules=["lm_head"]))
    expected = logits(model, IDS)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, IDS), expected, **CLOSE)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, IDS), expected, **CLOSE)


@pytest.mark.parametrize("packed", [True, False])
def test_a_tied_head_that_was_merged_in_place_is_one_table_with_the_embedding_again(packed, tmp_path):
    base = tied_groups(quantize_embeddings=True) if packed else lambda: tiny_llama(tie_word_embeddings=True)
    model = adapted(base, target_modules=["lm_head"], in_factor=32, out_factor=1)
    table, head = model.get_input_embeddings(), model.base_model.model.lm_head
    before = {name: tensor.clone() for name, tensor in table.state_dict().items()}
    expected = logits(model, IDS)
    model.merge_adapter()
    assert head.get_base_layer().weight is not table.weight
    with model.disable_adapter():  # takes it out, too
        logits(model, IDS)
    assert head.get_base_layer().weight is table.weight
    model.merge_adapter()
    model.unmerge_adapter()
    assert head.get_base_layer().weight is table.weight
    assert all(torch.equal(tensor, before[name]) for name, tensor in table.state_dict().items())
    assert torch.equal(logits(model, IDS), expected)
    model.unload().save_pretrained(tmp_path)
    assert not any("lm_head" in name for name in load_file(tmp_path / "model.safetensors"))


def test_a_model_that_ties_more_than_head_and_embedding_is_refused():
    torch.manual_seed(0)
    config = T5Config(d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4, vocab_size=100, decoder_start_token_id=0)
    base = T5ForConditionalGeneration(config).eval()
    settings = {"target_modules": ["q"], "modules_to_save": ["lm_head"], "task_type": "SEQ_2_SEQ_LM"}
    model = changed(get_peft_model(base, QBLoRAConfig(r=2, init_lora_weights=False, **settings)))
    with pytest.raises(MergeError, match="ties more than these two"):
        merge(model)
    same = get_peft_model(T5ForConditionalGeneration(config), QBLoRAConfig(r=2, target_modules=["q"]))
    merge(same)


def test_a_folder_is_no_model_to_merge():
    with pytest.raises(ConfigError, match=r"merge takes a model with adapters, not 'run'; .*`qbl-trl merge ADAPTER"):
        merge("run")


@pytest.mark.parametrize("target", ["o_proj", "lm_head"])
def test_adapters_that_are_merged_in_part_merge_whole(target, tmp_path):
    base = tied_groups(quantize_embeddings=True)()
    model = get_peft_model(base, two_targets(target), "a")
    model.add_adapter("b", two_targets(target))
    model.base_model.set_adapter(["a", "b"])
    expected = logits(model.eval(), tokens())
    model.merge_adapter(["b"])
    before = logits(model, tokens())
    merge(model).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded, tokens()), expected, rtol=0, atol=1e-5)
    assert torch.equal(logits(model, tokens()), before)


def two_targets(second):
    return QBLoRAConfig(r=4, target_modules=["q_proj", second], quantization_aware=True, init_lora_weights=False)


def test_a_merged_mixture_generates_though_its_loss_wanted_the_routers():
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=50, num_local_experts=2)
    model = get_peft_model(MixtralForCausalLM(config), QBLoRAConfig(in_factor=1, out_factor=1, r=2))
    model.config.output_router_logits = True  # as TRL sets it
    merged = merge(model)
    ids = tokens(2, 5, vocabulary=50)
    written = merged.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, min_new_tokens=2)
    assert written.shape == (2, 7)
    assert model.config.output_router_logits  # the trained model goes on training


def test_a_model_around_one_of_transformers_is_saved_whole_after_its_merge(tmp_path):
    inner = quantize_model_(tiny_llama(), GroupQuantConfig())
    inner.add_adapter(QBLoRAConfig(r=2, quantization_aware=True, init_lora_weights=False))
    expected = logits(inner, tokens())
    merge(nn.ModuleDict({"inner": inner}))["inner"].save_pretrained(tmp_path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(found, tokens()), expected, rtol=0, atol=1e-5)  # float32 sums


@pytest.mark.parametrize("packed", [True, False])
def test_an_adapter_that_transformers_loaded_leaves_the_names_of_the_merged_model_alone(packed, tmp_path):
    given = {"quantization_config": GroupQuantConfig()} if packed else {}
    tiny_llama().save_pretrained(tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", **given)
    model.add_adapter(QBLoRAConfig(r=2, quantization_aware=packed, init_lora_weights=False), "mine")
    model.save_pretrained(tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", **given)
    model.load_adapter(tmp_path / "adapter", "mine")
    merged = merge(model)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again, IDS), logits(merged, IDS))


def test_a_head_whose_adapter_is_not_merged_stays_tied():
    settings = {"r": 2, "init_lora_weights": False}
    base = tiny_llama(tie_word_embeddings=True)
    model = get_peft_model(base, QBLoRAConfig(target_modules=["q_proj"], **settings), "first")
    model.add_adapter("second", QBLoRAConfig(target_modules=["lm_head"], **settings))
    plain = model.merge_and_unload(adapter_names=["first"])
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
