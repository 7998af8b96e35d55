"""to_lora: plain LoRA files that compute the same in a process which never heard of this package."""

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from safetensors.torch import load_file, save_file

from qbl_trl import GroupQuantConfig, QBLoRAConfig, to_lora
from qbl_trl.adapter.layer import adapter_layers
from qbl_trl.errors import ConfigError
from qbl_trl.quant.hf_quantizer import GroupQuantizer, quantize_model_
from tests.tiny import logits, tiny_gpt2, tiny_llama, tokens

IDS = tokens()
SETTINGS = {
    "q-blora": {},
    "published": {"pooling": "mean", "use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"layers.0.mlp.up_proj": 3}},
    "reduced": {"in_factor": 48, "out_factor": 5, "on_misfit": "reduce"},
    "qa-hira": {"adapter": "block", "in_factor": 8, "out_factor": 4},
    "chosen layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
}

# What stock PEFT does with the files; importing this package would be an error.
STOCK = """
import sys, torch
sys.modules["qbl_trl"] = None
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, ids, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
with torch.no_grad():
    torch.save(model(torch.load(ids)).logits, out)
"""


def adapted(settings, base=tiny_llama):
    torch.manual_seed(3)
    config = QBLoRAConfig(**{"r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM", **settings})
    return get_peft_model(base(), config).eval()


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("route", ["model", "folder"])
def test_stock_lora_computes_the_same_logits(tmp_path, name, route):
    model = adapted(SETTINGS[name])
    model.save_pretrained(tmp_path / "ours")
    to_lora(model if route == "model" else tmp_path / "ours", tmp_path / "lora")
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora").eval()
    assert type(plain.peft_config["default"]) is LoraConfig
    torch.testing.assert_close(logits(plain, IDS), logits(model, IDS), rtol=0, atol=1e-5)  # the bound


def test_stock_peft_reads_the_files_in_a_process_without_this_package(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    model = adapted({"in_factor": 4, "modules_to_save": ["lm_head"]})
    to_lora(model, tmp_path / "lora")
    torch.save(IDS, tmp_path / "ids.pt")
    paths = [str(tmp_path / part) for part in ("base", "lora", "ids.pt", "out.pt")]
    subprocess.run([sys.executable, "-c", STOCK, *paths], check=True, cwd=tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), logits(model, IDS), rtol=0, atol=1e-5)


def test_an_adapter_of_a_4_bit_base_computes_the_same_over_its_dequantized_weights(tmp_path):
    def groups():
        return quantize_model_(tiny_llama(), GroupQuantConfig(bits=4, group_size=32))

    model = adapted({"quantization_aware": True}, groups)
    to_lora(model, tmp_path / "lora")
    dense = GroupQuantizer(GroupQuantConfig(), pre_quantized=True)._dequantize(groups(), torch.float32)
    plain = PeftModel.from_pretrained(dense, tmp_path / "lora").eval()
    torch.testing.assert_close(logits(plain, IDS), logits(model, IDS), rtol=0, atol=1e-5)


def test_transposed_layers_convert_too(tmp_path):
    model = adapted({}, tiny_gpt2)
    to_lora(model, tmp_path / "lora")
    plain = PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(plain, IDS), logits(model, IDS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_configuration_holds_stock_fields_and_one_rank_for_every_layer(tmp_path, name):
    to_lora(adapted(SETTINGS[name]), tmp_path / "lora")
    saved = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert saved["peft_type"] == "LORA"
    assert not {"in_factor", "out_factor", "pooling", "base_quantization", "quantization_aware"} & set(saved)
    assert saved["rank_pattern"] == saved["alpha_pattern"] == {}
    assert saved["r"] == saved["lora_alpha"]
    for key, tensor in load_file(tmp_path / "lora" / "adapter_model.safetensors").items():
        assert tensor.shape[0 if ".lora_A." in key else 1] == saved["r"]


def test_one_of_several_adapters_is_chosen_by_name(tmp_path):
    model = adapted({})
    model.add_adapter("other", QBLoRAConfig(r=2, in_factor=4, init_lora_weights=False))
    model.set_adapter("other")
    to_lora(model, tmp_path / "lora", adapter_name="other")
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(plain, IDS), logits(model, IDS), rtol=0, atol=1e-5)
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ConfigError, match="2 adapters are active; name one of: default, other"):
        to_lora(model, tmp_path / "again")
    with pytest.raises(ConfigError, match=r"no balanced adapter 'third'; adapters here: default, other"):
        to_lora(model, tmp_path / "again", adapter_name="third")


def test_a_folder_that_is_taken_is_not_touched(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        to_lora(adapted({}), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(LoraConfig, "save_pretrained", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        to_lora(adapted({}), tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_balanced_adapter_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no adapter_config\.json"):
        to_lora(tmp_path, tmp_path / "lora")
    get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path / "stock")
    with pytest.raises(ConfigError, match="converts type QBLORA only"):
        to_lora(tmp_path / "stock", tmp_path / "lora")
    with pytest.raises(ConfigError, match="no balanced adapters"):
        to_lora(tiny_llama(), tmp_path / "lora")


def test_an_adapter_that_never_learned_its_factor_says_what_to_set(tmp_path):
    model = adapted({})
    model.save_pretrained(tmp_path / "ours")
    path = tmp_path / "ours" / "adapter_config.json"
    for name in ("in_factor", "out_factor"):
        path.write_text(json.dumps({**json.loads(path.read_text()), name: None, "quantization_aware": True}))
        with pytest.raises(ConfigError, match="does not say in_factor or out_factor; set them"):
            to_lora(tmp_path / "ours", tmp_path / "lora")


def test_an_adapter_that_is_not_finite_is_refused(tmp_path):
    model = adapted({})
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(torch.nan)
    with pytest.raises(ConfigError, match=r"q_proj: the adapter holds NaN or infinite values"):
        to_lora(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_scale_that_was_changed_is_converted(tmp_path):
    config = QBLoRAConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_llama(), config).eval()
    for layer in adapter_layers(model).values():
        layer.set_scale("default", 3.0)
    to_lora(model, tmp_path / "lora")
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(plain, tokens()), logits(model, tokens()), rtol=0, atol=1e-5)


def test_a_file_without_a_balanced_adapter_is_refused(tmp_path):
    model = get_peft_model(tiny_llama(), QBLoRAConfig(r=4))
    model.save_pretrained(tmp_path / "adapter")
    save_file({"base_model.model.lm_head.weight": torch.zeros(2)}, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match="holds no tensor of a balanced adapter"):
        to_lora(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_neither_a_model_nor_a_folder_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match="to_lora takes a model with balanced adapters or the folder of a saved one, not"
    ):
        to_lora(None, tmp_path / "lora")


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_that_peft_saved_with_an_adapted_head_are_no_weights(tmp_path, bits):
    def packed():
        return quantize_model_(tiny_llama(), GroupQuantConfig(bits=bits, quantize_embeddings=True))

    model = adapted({"target_modules": ["q_proj", "lm_head"]}, packed)
    model.save_pretrained(tmp_path / "ours")
    assert any(
        tensor.dtype == torch.uint8 for tensor in load_file(tmp_path / "ours/adapter_model.safetensors").values()
    )
    to_lora(tmp_path / "ours", tmp_path / "lora")
    for folder in ("lora", "ours"):
        plain = PeftModel.from_pretrained(packed().dequantize(), tmp_path / folder).eval()
        torch.testing.assert_close(logits(plain, IDS), logits(model, IDS), rtol=0, atol=1e-5)  # float32 rounding


def test_factors_of_two_ranks_are_refused(tmp_path):
    get_peft_model(tiny_llama(), QBLoRAConfig(r=2)).save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("lora_A.weight"))
    save_file(tensors | {name: tensors[name][:-1].contiguous()}, file)
    with pytest.raises(ConfigError, match="are no two factors of one rank; the adapter file is damaged"):
        to_lora(tmp_path / "a", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_what_trains_beside_the_adapter_may_share_memory(tmp_path):
    model = adapted({"target_modules": ["c_attn"], "bias": "all", "modules_to_save": ["ln_f"]}, tiny_gpt2)
    to_lora(model, tmp_path / "lora")
    plain = PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(plain, IDS), logits(model, IDS), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"r": None}, "holds a rank of"),
        ({"r": 3}, "holds a rank of"),
        ({"rank_pattern": {"q_proj": 9}}, "q_proj: the adapter file holds a rank of"),
        ({"in_factor": 16}, "holds a rank of"),
        ({"target_modules": ["q_proj"]}, "adapter_config.json does not name it in target_modules"),
    ],
)
def test_a_configuration_that_is_not_that_of_the_file_is_refused(tmp_path, changed, message):
    adapted({}).save_pretrained(tmp_path / "ours")
    file = tmp_path / "ours" / "adapter_config.json"
    stored = {**json.loads(file.read_text()), **changed}
    file.write_text(json.dumps({name: value for name, value in stored.items() if (name, value) != ("r", None)}))
    with pytest.raises(ConfigError, match=message):
        to_lora(tmp_path / "ours", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_a_layer_that_the_file_lacks_is_named(tmp_path):
    adapted({"target_modules": "all-linear"}).save_pretrained(tmp_path / "ours")
    file = tmp_path / "ours" / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if ".0.self_attn.q_proj." not in name}, file)
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.q_proj: the adapter file holds no tensor of it"):
        to_lora(tmp_path / "ours", tmp_path / "lora")


def test_names_that_are_meant_for_other_models_are_no_damage(tmp_path):
    model = adapted({"target_modules": ["q_proj", "query_key_value"]})
    model.save_pretrained(tmp_path / "ours")
    to_lora(tmp_path / "ours", tmp_path / "lora")
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(plain, IDS), logits(model, IDS), rtol=0, atol=1e-5)


def test_an_adapter_that_was_padded_to_be_swapped_converts(tmp_path):
    model = adapted({"target_modules": ["q_proj"]})
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    expected = logits(model, IDS)
    model.save_pretrained(tmp_path / "ours")
    to_lora(tmp_path / "ours", tmp_path / "lora")
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(plain, IDS), expected, rtol=0, atol=1e-5)
