"""Experts of a mixture, which transformers 5 stacks in one tensor: separated, packed, and saved as 4.57 saves them."""

import json

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from qbl_trl import GroupQuantConfig, QBLoRAConfig, merge
from qbl_trl.errors import ConfigError
from qbl_trl.generation import BEFORE_5
from qbl_trl.quant.experts import Experts
from qbl_trl.quant.hf_quantizer import quantize_model_
from qbl_trl.quant.linear import GroupQuantLinear
from qbl_trl.quant.stacks import stack_again_, unstack_
from qbl_trl.quant.targets import routers
from tests.tiny import SIZES, logits, tokens

COMMON = {**SIZES, "pad_token_id": 0, "eos_token_id": 2}
CHOICE = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
DEEPSEEK = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
SETTINGS = {
    "Mixtral": {"num_local_experts": 4},
    "Phimoe": {"num_local_experts": 4},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "Qwen2Moe": {"num_experts": 4, "shared_expert_intermediate_size": 64, **CHOICE},
    "Qwen3Moe": {"num_experts": 4, "head_dim": 16, **CHOICE},
    "DeepseekV3": {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
    | {**DEEPSEEK, **CHOICE},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},  # columns first, biases, interleaved
}
SETTINGS["Llama4Text"] = {"num_local_experts": 4, "head_dim": 16, "intermediate_size_mlp": 96}
SETTINGS["Qwen3VLMoe"] = {"num_experts": 4, "head_dim": 16, **CHOICE}
SETTINGS["GraniteMoe"] = {"num_local_experts": 4, "num_experts_per_tok": 2}
SETTINGS["GraniteMoeShared"] = {**SETTINGS["GraniteMoe"], "shared_intermediate_size": 64}
SETTINGS["GraniteMoeHybrid"] = {**SETTINGS["GraniteMoeShared"], "layer_types": ["attention", "attention"]}
SETTINGS["JetMoe"] = {**SETTINGS["GraniteMoe"], "kv_channels": 16}
DBRX = {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 64}
SETTINGS["Dbrx"] = {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "ffn_config": DBRX}
SETTINGS["Dbrx"] |= {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}}
VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3]}
ALWAYS = [
    "GptOss",
    "Llama4Text",
    "Qwen3VLMoe",
    "GraniteMoe",
    "GraniteMoeShared",
    "GraniteMoeHybrid",
    "JetMoe",
    "Dbrx",
]  # stacked in both versions, and in their files
NAMED = [name for name in SETTINGS if name not in ALWAYS]  # whose files have a tensor for each expert
STACKED = ALWAYS if BEFORE_5 else list(SETTINGS)
stacking = pytest.mark.skipif(BEFORE_5, reason="transformers 4.57 has a layer for each expert")
WEIGHTS = {"Mixtral": ("w1", "w2", "w3"), "Phimoe": ("w1", "w2", "w3")}


def kind_of(name):
    return AutoModelForImageTextToText if name == "Qwen3VLMoe" else AutoModelForCausalLM


def auto_config(name):
    kind = getattr(transformers, f"{name}Config")
    if name == "Qwen3VLMoe":
        rope = {"rope_scaling": ROPE} if BEFORE_5 else {"rope_parameters": {**ROPE, "rope_theta": 1e4}}
        vision = {**VISION, "deepstack_visual_indexes": []}
        return kind(text_config={**COMMON, **SETTINGS[name], **rope}, vision_config=vision)
    return kind(**({"vocab_size": 100, "pad_token_id": 0} if name == "Dbrx" else COMMON), **SETTINGS[name])


def mixture(name, seed=0):
    torch.manual_seed(seed)
    config = auto_config(name)
    model = kind_of(name).from_config(config).eval()
    if not BEFORE_5:
        model.set_experts_implementation("eager")
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.1 if parameter.dim() == 3 else parameter.data
    return model


def modules_of(model, kind):
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


@pytest.mark.parametrize("name", STACKED)
def test_separated_experts_compute_what_stacked_ones_compute(name):
    model = mixture(name)
    expected = logits(model, tokens())
    assert unstack_(model)
    torch.testing.assert_close(logits(model, tokens()), expected, rtol=0, atol=1e-6)  # sums in another order
    stack_again_(model)
    assert not modules_of(model, Experts)
    assert torch.equal(logits(model, tokens()), expected)


@pytest.mark.parametrize("name", STACKED)
def test_experts_are_packed_while_loading_as_in_memory_and_reload_bit_for_bit(name, tmp_path):
    model = mixture(name)
    model.save_pretrained(tmp_path / "float")
    loaded = kind_of(name).from_pretrained(tmp_path / "float", quantization_config=GroupQuantConfig())
    assert not [p for p in loaded.parameters() if p.dim() == 3]
    quantize_model_(model, GroupQuantConfig())
    assert modules_of(loaded, GroupQuantLinear) == modules_of(model, GroupQuantLinear)
    assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))
    loaded.save_pretrained(tmp_path / "packed")
    again = kind_of(name).from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(again, tokens()), logits(loaded, tokens()))


@pytest.mark.parametrize("name", NAMED)
def test_files_name_the_layers_of_each_expert_as_every_version_reads_them(name, tmp_path):
    quantize_model_(mixture(name), GroupQuantConfig()).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    block = "block_sparse_moe" if name in WEIGHTS else "mlp"
    for part in WEIGHTS.get(name, ("gate_proj", "up_proj", "down_proj")):
        assert {f"model.layers.1.{block}.experts.3.{part}.{kind}" for kind in ("weight", "scales", "zeros")} <= set(
            stored
        )


@pytest.mark.parametrize("name", SETTINGS)
def test_routers_stay_in_float_and_get_no_adapter(name):
    model = quantize_model_(mixture(name), GroupQuantConfig())
    model = get_peft_model(model, QBLoRAConfig(r=4))
    touched = [n for n, p in model.named_parameters() if "lora_" in n or p.dtype == torch.uint8]
    assert touched
    assert not [n for n in touched if any(f".{kind}." in n for kind in ("gate", "router", "shared_expert_gate"))]


def test_routers_are_the_linear_layers_beside_experts():
    class Block(nn.Module):
        def __init__(self, gate):
            super().__init__()
            self.gate, self.gate_proj, self.experts = gate, nn.Linear(8, 4), nn.ModuleList([nn.Linear(8, 8)])

    inside = nn.Module()
    inside.wg = nn.Linear(8, 4)
    assert routers(nn.Sequential(Block(nn.Linear(8, 4)), Block(inside), Block(None))) == ["0.gate", "1.gate.wg"]


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_trained_over_experts_is_merged_saved_and_reloaded(name, tmp_path):
    base = quantize_model_(mixture(name), GroupQuantConfig())
    model = get_peft_model(base, QBLoRAConfig(r=4, quantization_aware=True, init_lora_weights=False)).eval()
    assert any("experts.3" in name for name, _ in model.named_parameters() if "lora_A" in name)
    expected = logits(model, tokens())
    merged = merge(model)
    torch.testing.assert_close(logits(merged, tokens()), expected, rtol=0, atol=2e-5)  # float32, width 64
    merged.save_pretrained(tmp_path)
    again = kind_of(name).from_pretrained(tmp_path)
    assert torch.equal(logits(again, tokens()), logits(merged, tokens()))


def test_rows_with_adapters_of_their_own_are_refused_where_experts_have_them():
    model = get_peft_model(quantize_model_(mixture("Qwen3Moe"), GroupQuantConfig()), QBLoRAConfig(r=4)).eval()
    with pytest.raises(ConfigError, match=r"adapter_names: .*mlp.experts.0.\w+ sees tokens of all rows of a batch"):
        model(tokens(), adapter_names=["default", "__base__"])
    only = QBLoRAConfig(r=4, target_modules=["q_proj"])
    model = get_peft_model(quantize_model_(mixture("Qwen3Moe"), GroupQuantConfig()), only).eval()
    with torch.no_grad():
        assert model(tokens(), adapter_names=["default", "__base__"]).logits.shape == (2, 9, 100)


@pytest.mark.parametrize("name", WEIGHTS)
def test_adapters_and_formats_that_the_other_version_named_are_found(name, tmp_path):
    """Mixtral's and PhiMoE's mixtures are `block_sparse_moe` in transformers 4.57 and `mlp` in 5."""
    here, there = (".block_sparse_moe.", ".mlp.") if BEFORE_5 else (".mlp.", ".block_sparse_moe.")
    base = quantize_model_(mixture(name), GroupQuantConfig())
    base.save_pretrained(tmp_path / "packed")
    targets = [layer for layer in modules_of(base, GroupQuantLinear) if "layers.0" in layer]
    config = QBLoRAConfig(r=4, quantization_aware=True, init_lora_weights=False, target_modules=targets)
    model = get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model, tokens())
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({key.replace(here, there): value for key, value in load_file(file).items()}, file)
    text = (tmp_path / "adapter" / "adapter_config.json").read_text()
    (tmp_path / "adapter" / "adapter_config.json").write_text(text.replace(here, there))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(PeftModel.from_pretrained(again, tmp_path / "adapter").eval(), tokens()), expected)

    merged = merge(model)
    merged.save_pretrained(tmp_path / "merged")
    text = (tmp_path / "merged" / "config.json").read_text()
    assert here in text  # the layers without an adapter have another format
    (tmp_path / "merged" / "config.json").write_text(text.replace(here, there))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again, tokens()), logits(merged, tokens()))


@pytest.mark.parametrize("targets", ["all-linear", ["gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"]])
@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "DeepseekV3", "GraniteMoe"])
def test_plain_lora_acts_on_experts_that_are_layers_in_either_version(name, targets, tmp_path):
    """PEFT turns it into one on stacked tensors, which transformers 5 has and this model has not."""
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(quantize_model_(mixture(name), GroupQuantConfig()), config).eval()
    trained = [n for n, _ in model.named_parameters() if ".experts." in n and ".lora_A." in n]
    assert len(trained) == (1 if name == "DeepseekV3" else 2) * 4 * 3
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(quantize_model_(mixture(name), GroupQuantConfig()), tmp_path).eval()
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))


def test_experts_without_an_adapter_are_named():
    with pytest.warns(
        UserWarning, match=r"no adapter acts on the experts of this model \(model.layers.0.mlp.experts and 1"
    ):
        get_peft_model(mixture("GptOss"), QBLoRAConfig(r=4))


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "GptOss", "GraniteMoe"])
@pytest.mark.parametrize("kind", [LoraConfig, QBLoRAConfig])
def test_transformers_itself_loads_an_adapter_of_experts_that_are_layers(name, kind, tmp_path):
    mixture(name).save_pretrained(tmp_path / "float")
    settings = {"quantization_config": GroupQuantConfig()}
    config = kind(r=4, target_modules="all-linear", init_lora_weights=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", **settings)
    model = get_peft_model(model, config).eval()
    assert any(".experts.3." in layer for layer, _ in model.named_parameters() if "lora_A" in layer)
    model.save_pretrained(tmp_path / "adapter")
    later = AutoModelForCausalLM.from_pretrained(tmp_path / "float", **settings)
    later.load_adapter(str(tmp_path / "adapter"))
    at_once = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", **settings)
    for again in (later, at_once):
        assert torch.equal(logits(again.eval(), tokens()), logits(model, tokens()))


@stacking
def test_what_is_not_converted_stays_stacked_and_loads_anywhere(tmp_path):
    model = mixture("Qwen3Moe")
    model.save_pretrained(tmp_path / "float")
    config = GroupQuantConfig(modules_to_not_convert=["down_proj"])
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    experts = packed.model.layers[0].mlp.experts
    assert list(experts.parts) == ["gate_up_proj"]
    assert experts.down_proj.shape == (4, 64, 64)
    packed.save_pretrained(tmp_path / "packed")
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    assert stored["model.layers.0.mlp.experts.3.down_proj.weight"].shape == (64, 64)
    assert stored["model.layers.0.mlp.experts.3.gate_proj.weight"].dtype == torch.uint8
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(again, tokens()), logits(packed, tokens()))

    half = quantize_model_(mixture("Qwen3Moe"), GroupQuantConfig(modules_to_not_convert=["up_proj"]))
    assert isinstance(half.model.layers[0].mlp.experts.get_submodule("0.gate_proj"), GroupQuantLinear)
    assert type(half.model.layers[0].mlp.experts.get_submodule("0.up_proj")) is nn.Linear


@pytest.mark.parametrize("name", ["GptOss"] if BEFORE_5 else ["Mixtral", "GptOss"])
def test_a_model_that_is_dequantized_saves_as_transformers_saves_it(name, tmp_path):
    model = quantize_model_(mixture(name), GroupQuantConfig())
    expected = logits(model, tokens())
    plain = model.dequantize()
    assert not modules_of(plain, Experts)
    plain.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, **({} if BEFORE_5 else {"experts_implementation": "eager"}))
    torch.testing.assert_close(logits(again, tokens()), expected, rtol=0, atol=2e-6)  # another order of sums


@stacking
@pytest.mark.parametrize("algorithm", ["gptq", "hqq"])
def test_other_algorithms_reach_each_expert(algorithm, tmp_path):
    mixture("Qwen3Moe").save_pretrained(tmp_path)
    calibration = [tokens(4, 16, seed) for seed in range(4)] if algorithm == "gptq" else None
    config = GroupQuantConfig(algorithm=algorithm, calibration=calibration)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert len([name for name in modules_of(model, GroupQuantLinear) if ".experts." in name]) == 2 * 4 * 3
    assert torch.isfinite(logits(model, tokens())).all()


@stacking
def test_every_expert_is_asked_while_several_processes_train(monkeypatch):
    model = get_peft_model(quantize_model_(mixture("Qwen3Moe"), GroupQuantConfig()), QBLoRAConfig(r=4))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    experts = model.base_model.model.model.layers[0].mlp.experts
    experts.train()(torch.randn(1, 64), torch.tensor([[0, 3]]), torch.tensor([[0.5, 0.5]])).sum().backward()
    trained = [p for name, p in experts.named_parameters() if "lora_" in name]
    assert trained
    assert all(p.grad is not None for p in trained)


@stacking
def test_every_expert_is_asked_while_its_weights_are_gathered_from_several_processes(monkeypatch):
    """Processes whose tokens ask for different experts would wait for one another, or take other weights for theirs."""
    experts = quantize_model_(mixture("Qwen3Moe"), GroupQuantConfig()).eval().model.layers[0].mlp.experts
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    asked = []
    for index in range(4):
        experts.get_submodule(f"{index}.gate_proj").register_forward_hook(lambda *_, index=index: asked.append(index))
    token = torch.randn(1, 64), torch.tensor([[0, 3]]), torch.tensor([[0.5, 0.5]])
    whole = experts(*token)
    assert asked == [0, 3]
    asked.clear()
    for parameter in experts.parameters():
        parameter.ds_id = 0  # as DeepSpeed ZeRO-3 marks what it spreads
    torch.testing.assert_close(experts(*token), whole, rtol=0, atol=0)
    assert asked == [0, 1, 2, 3]


@pytest.mark.skipif(not BEFORE_5, reason="transformers 5 reads its own names")
def test_the_number_of_experts_that_transformers_5_wrote_is_read(tmp_path):
    model = quantize_model_(mixture("Qwen3Moe"), GroupQuantConfig())
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_local_experts"] = config.pop("num_experts")
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))
    again.save_pretrained(tmp_path / "again")
    assert "num_local_experts" not in json.loads((tmp_path / "again" / "config.json").read_text())


@pytest.mark.skipif(not hasattr(transformers, "HrmTextConfig"), reason="a model of newer transformers")
def test_weights_that_the_files_hold_as_one_are_packed_apart(tmp_path):
    config = transformers.HrmTextConfig(**{**COMMON, "head_dim": 16, "num_key_value_heads": 4})
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "float")
    assert any("gqkv_proj" in name for name in load_file(tmp_path / "float" / "model.safetensors"))
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=GroupQuantConfig())
    quantize_model_(model, GroupQuantConfig())
    assert torch.equal(logits(packed, tokens()), logits(model, tokens()))
    for stored in (packed, model):
        stored.save_pretrained(tmp_path / "packed")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
        assert torch.equal(logits(again, tokens()), logits(packed, tokens()))
