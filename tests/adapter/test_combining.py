"""Adapters merged, summed, swapped and converted by PEFT's own functions."""

import copy

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import (
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)
from transformers import AutoModelForCausalLM

from qbl_trl import GroupQuantConfig, QBLoRAConfig
from qbl_trl.adapter.layer import adapter_layers
from qbl_trl.errors import ConfigError, MergeError
from qbl_trl.quant.hf_quantizer import quantize_model_
from tests.adapter.models import MODELS, config
from tests.tiny import logits, tiny_llama, tokens

IDS = tokens()


@pytest.mark.parametrize("kind", MODELS)
def test_merge_and_unload_computes_the_same_and_unmerge_restores(kind):
    settings = {"quantization_aware": True} if kind == "groups" else {}
    model = get_peft_model(MODELS[kind](), config(**settings)).eval()
    before, state = logits(model, IDS), {k: v.clone() for k, v in model.state_dict().items()}
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model, IDS), before, rtol=1e-4, atol=1e-5)  # float32 sums in another order
    model.unmerge_adapter()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0 if kind == "groups" else 1e-6)
    merged = model.merge_and_unload(safe_merge=True)
    assert not any("lora" in name for name, _ in merged.named_modules())
    torch.testing.assert_close(logits(merged, IDS), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", ["linear", "cat", "svd", "ties", "dare_linear", "ties_svd", "magnitude_prune_svd"])
def test_weighted_combinations_run_and_the_exact_ones_are_exact(kind, rslora):
    model = get_peft_model(tiny_llama(), config(r=3, in_factor=4, use_rslora=rslora)).eval()
    torch.manual_seed(1)
    model.add_adapter("second", config(r=3, in_factor=4, use_rslora=rslora))
    density = None if kind in ("linear", "cat", "svd") else 0.5
    rank = 200 if kind == "svd" else None  # more than any layer has dimensions: nothing is cut off
    model.add_weighted_adapter(["default", "second"], [0.7, -0.2], "sum", kind, svd_rank=rank, density=density)
    for layer in adapter_layers(model).values():
        total = 0.7 * layer.get_delta_weight("default") - 0.2 * layer.get_delta_weight("second")
        assert torch.isfinite(layer.get_delta_weight("sum")).all()
        if kind in ("cat", "svd"):
            torch.testing.assert_close(layer.get_delta_weight("sum"), total, rtol=1e-4, atol=1e-6)  # SVD in float32
    assert model.peft_config["default"].use_rslora == rslora
    model.set_adapter("sum")
    assert torch.isfinite(logits(model, IDS)).all()


def test_adapters_of_different_ranks_are_not_summed_matrix_by_matrix():
    model = get_peft_model(tiny_llama(), config(r=2, rank_pattern={"q_proj": 3}))
    model.add_adapter("second", config(r=3))
    with pytest.raises(ConfigError, match=r"have ranks .* sums matrices of one shape"):
        model.add_weighted_adapter(["default", "second"], [1, 1], "sum", "ties", density=0.5)
    model.add_weighted_adapter(["default", "second"], [1, 1], "sum", "cat")


def test_adapters_of_different_blocks_do_not_combine():
    model = get_peft_model(tiny_llama(), config(in_factor=4))
    model.add_adapter("second", config(in_factor=2))
    with pytest.raises(ConfigError, match=r"differ in \(in_factor, out_factor, pooling\)"):
        model.add_weighted_adapter(["default", "second"], [1, 1], "sum", "cat")
    model.add_adapter("elsewhere", config(in_factor=2, target_modules=["lm_head"]))
    model.add_adapter("here", config(in_factor=4, target_modules=["q_proj"]))
    model.add_weighted_adapter(["here", "elsewhere"], [1, 1], "apart", "cat")  # no layer holds both
    model.base_model.set_adapter(["here", "elsewhere"])
    expected = logits(model.eval(), IDS)
    model.set_adapter("apart")
    torch.testing.assert_close(logits(model, IDS), expected, rtol=0, atol=1e-5)
    model.add_adapter("pooled", config(in_factor=2, target_modules=["lm_head"], pooling="sum"))
    with pytest.raises(ConfigError, match=r"differ in .* at lm_head.*the same in_factor and out_factor"):
        model.add_weighted_adapter(["here", "pooled"], [1, 1], "sum", "cat")
    model.add_adapter("third", config(in_factor=4, out_factor_pattern={"layers.1.mlp.up_proj": 4}))
    with pytest.raises(ConfigError, match=r"differ in .* at model\.layers\.1\.mlp\.up_proj"):
        model.add_weighted_adapter(["default", "third"], [1, 1], "sum", "cat")
    model.add_adapter("block", config(adapter="block", in_factor=4))
    with pytest.raises(ConfigError, match="adapter='block' has none"):
        model.add_weighted_adapter(["block"], [1], "sum", "linear")


def test_a_hot_swapped_adapter_is_the_other_one(tmp_path):
    for seed in (1, 2):
        torch.manual_seed(seed)
        get_peft_model(tiny_llama(), config(r=2 * seed, lora_alpha=seed)).save_pretrained(tmp_path / str(seed))
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "1").eval()
    hotswap_adapter(model, str(tmp_path / "2"), adapter_name="default", torch_device="cpu")
    expected = PeftModel.from_pretrained(tiny_llama(), tmp_path / "2").eval()
    torch.testing.assert_close(logits(model, IDS), logits(expected, IDS), rtol=1e-5, atol=1e-6)  # zero-padded products


def test_hot_swapping_another_block_shape_is_refused(tmp_path):
    get_peft_model(tiny_llama(), config(in_factor=4)).save_pretrained(tmp_path)
    model = get_peft_model(tiny_llama(), config(in_factor=2))
    with pytest.raises(ValueError, match="in_factor"):
        hotswap_adapter(model, str(tmp_path), adapter_name="default", torch_device="cpu")


def test_a_model_prepared_for_compiled_swapping_keeps_its_shapes_and_its_function(tmp_path):
    torch.manual_seed(1)
    other = get_peft_model(tiny_llama(), config(r=6, lora_alpha=3)).eval()
    other.save_pretrained(tmp_path)
    model = get_peft_model(tiny_llama(), config(r=4, rank_pattern={"q_proj": 5})).eval()
    before = logits(model, IDS)
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    torch.testing.assert_close(logits(model, IDS), before, rtol=1e-5, atol=1e-6)  # zero-padded products
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert shapes == {name: parameter.shape for name, parameter in other.named_parameters()}
    kept = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    state = {name: tensor for name, tensor in other.state_dict().items() if "lora_" in name}
    hotswap_adapter_from_state_dict(model, state, "default", other.peft_config["default"])
    assert kept == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    torch.testing.assert_close(logits(model, IDS), logits(other, IDS), rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match=r"q_proj: adapter 'default' has rank 12, target_rank=5 would be 10"):
        prepare_model_for_compiled_hotswap(model, target_rank=5)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("settings", [{}, {"adapter": "block", "in_factor": 4}])
def test_pefts_conversion_to_lora_computes_the_same_where_its_rank_suffices(kind, settings):
    model = get_peft_model(MODELS[kind](), config(**settings)).eval()
    plain, state = convert_to_lora(model, rank=32)
    lora = get_peft_model(MODELS[kind](), plain).eval()
    set_peft_model_state_dict(lora, state)
    torch.testing.assert_close(logits(lora, IDS), logits(model, IDS), rtol=1e-4, atol=1e-5)  # SVD in float32


def test_equal_factors_of_one_are_lora():
    ours = get_peft_model(tiny_llama(), config(in_factor=1, out_factor=1, lora_alpha=8, pooling="mean")).eval()
    lora = get_peft_model(tiny_llama(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")).eval()
    set_peft_model_state_dict(lora, get_peft_model_state_dict(ours))
    torch.testing.assert_close(logits(ours, IDS), logits(lora, IDS), rtol=1e-5, atol=1e-6)  # fused sums


@pytest.mark.parametrize("operation", ["merge_and_unload", "merge_adapter"])
def test_a_merge_that_one_layer_refuses_changes_no_layer(operation):
    mixed = quantize_model_(tiny_llama(), GroupQuantConfig(modules_to_not_convert=["q_proj"]))
    model = get_peft_model(mixed, QBLoRAConfig(r=2, init_lora_weights=False)).eval()
    expected = logits(model, tokens())
    with pytest.raises(MergeError, match=r"k_proj: in_factor=2 is no multiple"):
        getattr(model, operation)()
    assert not any(layer.merged for layer in adapter_layers(model).values())
    assert torch.equal(logits(model, tokens()), expected)


def test_a_sum_leaves_the_configurations_of_its_parts_alone():
    model = get_peft_model(tiny_llama(), config(in_factor=2, target_modules=["q_proj"]), "one")
    model.add_adapter("two", config(in_factor=4, target_modules=["v_proj"]))
    before = {name: copy.deepcopy(model.peft_config[name].to_dict()) for name in ("one", "two")}
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum", "svd")
    assert {name: model.peft_config[name].to_dict() for name in before} == before
    stated = model.peft_config["sum"].in_factor_pattern
    assert set(stated) == {rf"^model\.layers\.{index}\.self_attn\.v_proj" for index in (0, 1)}
    assert set(stated.values()) == {4}


def test_a_change_is_added_to_weights_of_16_bits_in_float32_and_rounded_once():
    model = get_peft_model(tiny_llama().to(torch.bfloat16), config(init_lora_weights=False))
    layer = adapter_layers(model.get_base_model())["model.layers.0.self_attn.q_proj"]
    expected = (layer.weight.float() + layer.get_delta_weight("default")).bfloat16()
    merged = model.merge_and_unload()
    assert torch.equal(merged.model.layers[0].self_attn.q_proj.weight, expected)


def test_adapters_on_different_layers_combine_by_singular_values():
    model = get_peft_model(tiny_llama(), QBLoRAConfig(r=4, target_modules=["q_proj"], init_lora_weights=False), "a")
    model.add_adapter("b", QBLoRAConfig(r=4, target_modules=["down_proj"], init_lora_weights=False))
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", combination_type="svd")
    model.set_adapter("sum")
    found = logits(model.eval(), tokens())
    model.base_model.set_adapter(["a", "b"])
    torch.testing.assert_close(found, logits(model, tokens()), rtol=0, atol=2e-5)


def partly(*layers, r=1):
    return QBLoRAConfig(r=r, quantization_aware=True, target_modules=list(layers), init_lora_weights=False)


def four_bits():
    return quantize_model_(tiny_llama(), GroupQuantConfig())


def test_an_adapter_of_some_layers_takes_the_place_of_one_of_all(tmp_path):
    for name, layers in (("all", ["q_proj", "k_proj", "down_proj"]), ("some", ["q_proj", "k_proj"])):
        made = get_peft_model(four_bits(), partly(*layers))
        made.save_pretrained(tmp_path / name)
    assert len({made.peft_config["default"].out_factor, 1}) <= 2
    model = PeftModel.from_pretrained(four_bits(), tmp_path / "all").eval()
    hotswap_adapter(model, str(tmp_path / "some"), adapter_name="default", torch_device="cpu")
    expected = PeftModel.from_pretrained(four_bits(), tmp_path / "some").eval()
    torch.testing.assert_close(logits(model, tokens()), logits(expected, tokens()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("order", [["one", "two"], ["two", "one"]])
def test_adapters_of_one_kind_on_different_layers_add_up_in_any_order(order):
    model = get_peft_model(four_bits(), partly("q_proj", "k_proj"), "one")
    model.add_adapter("two", partly("q_proj", "down_proj"))
    model.add_weighted_adapter(order, [1.0, 1.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    summed = logits(model.eval(), tokens())
    model.base_model.set_adapter(["one", "two"])
    torch.testing.assert_close(summed, logits(model, tokens()), rtol=0, atol=1e-5)


def test_what_was_merged_in_place_and_unloaded_saves_what_it_computes(tmp_path):
    tied = {"target_modules": ["q_proj", "lm_head"]}
    for kind, base, settings in (
        ("packed", quantize_model_(tiny_llama(), GroupQuantConfig()), {"in_factor": 32, "target_modules": ["q_proj"]}),
        ("tied", tiny_llama(tie_word_embeddings=True), tied),
    ):
        model = get_peft_model(base, config(**settings)).eval()
        expected = logits(model, IDS)
        model.merge_adapter()
        model.unload().save_pretrained(tmp_path / kind)
        found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / kind), IDS)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # float32 rounding


def test_a_sum_of_adapters_with_ranks_of_their_own_says_them(tmp_path):
    settings = {"r": 8, "rank_pattern": {"q_proj": 2}, "quantization_aware": True}

    def base():
        return quantize_model_(tiny_llama(), GroupQuantConfig())

    model = get_peft_model(base(), config(**settings)).eval()
    model.add_adapter("second", config(**settings))
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "sum", combination_type="linear")
    model.set_adapter("sum")
    for layer in adapter_layers(model).values():
        assert layer.rank["sum"] == layer.rank["default"] == layer.lora_A["sum"].weight.shape[0]
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(base(), tmp_path / "sum").eval()
    assert torch.equal(logits(again, IDS), logits(model, IDS))


def test_the_rank_of_a_sum_is_that_of_its_parts_whatever_else_lies_on_the_layer(tmp_path):
    parts = {"r": 4, "in_factor": 1, "out_factor": 1, "rank_pattern": {"v_proj": 16}}
    model = get_peft_model(tiny_llama(), config(r=2, in_factor=2, out_factor=2), adapter_name="other").eval()
    for name in ("first", "second"):
        model.add_adapter(name, config(**parts))
    model.add_weighted_adapter(["first", "second"], [0.5, 0.5], "sum", combination_type="linear")
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "sum").eval()
    assert torch.equal(logits(again, IDS), logits(model, IDS))


def test_a_sum_over_a_model_in_half_precision_is_as_wide_as_its_parts():
    model = get_peft_model(tiny_llama().to(torch.bfloat16), config())
    model.add_adapter("second", config())
    for layer in adapter_layers(model).values():
        for name in ("default", "second"):
            layer.lora_B[name].weight.data *= 1.1  # what 16 bits do not hold
    model.add_weighted_adapter(["default", "second"], [1, 1], "sum", combination_type="cat")
    for layer in adapter_layers(model).values():
        total = layer.block_delta("default") + layer.block_delta("second")
        torch.testing.assert_close(layer.block_delta("sum"), total, rtol=0, atol=float(total.abs().max()) * 1e-6)


@pytest.mark.parametrize("order", [["first", "second"], ["second", "first"]])
@pytest.mark.parametrize("combination", ["cat", "svd", "linear"])
def test_a_sum_of_adapters_of_which_one_alone_is_quantization_aware(order, combination, tmp_path):
    def base():
        return quantize_model_(tiny_llama(), GroupQuantConfig(group_size=16))

    parts = {
        "first": config(quantization_aware=True, in_factor=16, out_factor=1, target_modules=["q_proj"]),
        "second": config(in_factor=1, out_factor=1, target_modules=["v_proj"]),
    }
    model = get_peft_model(base(), parts["first"], "first").eval()
    model.add_adapter("second", parts["second"])
    model.base_model.set_adapter(list(parts))
    expected = logits(model, IDS)
    model.add_weighted_adapter(order, [1.0, 1.0], "sum", combination_type=combination)
    model.set_adapter("sum")
    torch.testing.assert_close(logits(model, IDS), expected, rtol=0, atol=1e-5)  # float32 rounding
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(base(), tmp_path / "sum").eval()
    torch.testing.assert_close(logits(again, IDS), expected, rtol=0, atol=1e-5)
    assert model.peft_config["first"].quantization_aware


def test_a_sum_that_is_refused_leaves_nothing_under_its_name(monkeypatch):
    model = get_peft_model(tiny_llama(), config())
    model.add_adapter("second", config())

    def refuse(*args, **kwargs):
        raise ConfigError("refused")

    for place in ("inject_adapter", "_generalized_task_arithmetic_weighted_adapter"):
        with monkeypatch.context() as patched:
            patched.setattr(type(model.base_model), place, refuse)
            with pytest.raises(ConfigError, match="refused"):
                model.add_weighted_adapter(["default", "second"], [1, 1], "sum", combination_type="linear")
        assert list(model.peft_config) == ["default", "second"]
        assert not any(".sum." in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("start", ["", "^model.layers.0.self_attn."])
def test_a_hot_swapped_adapter_has_the_scales_of_its_patterns(start, tmp_path):
    patterns = {"alpha_pattern": {start + "q_proj": 3}, "rank_pattern": {start + "k_proj": 2}}
    first = get_peft_model(tiny_llama(), config(**patterns)).eval()
    second = get_peft_model(tiny_llama(), config(lora_alpha=5, **patterns)).eval()
    second.save_pretrained(tmp_path)
    hotswap_adapter(first, tmp_path, "default")
    expected = logits(second, IDS)
    assert torch.equal(logits(first, IDS), expected)
    for layer in adapter_layers(first).values():
        layer.scale_layer(3.0)
        layer.unscale_layer()
    assert torch.equal(logits(first, IDS), expected)
