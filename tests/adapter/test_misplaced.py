"""What an adapter is meant for and a model has no layer for is said: tensors of its file, experts that are stacked."""

import warnings

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from qbl_trl import GroupQuantConfig, QBLoRAConfig
from qbl_trl.adapter.misplaced import check_every_layer_is_here
from qbl_trl.errors import ConfigError
from qbl_trl.generation import BEFORE_5
from qbl_trl.quant.hf_quantizer import quantize_model_
from tests.adapter.models import config
from tests.quant.test_experts import STACKED, mixture, stacking
from tests.tiny import logits, tiny_llama, tokens

EXPERTS = {  # targets that mean experts: by the names of the files, by a part of a name, by a regular expression
    "Mixtral": (
        ["q_proj", "w2"],
        [f"model.layers.1.mlp.experts.2.{part}" for part in ("w1", "w3")],
        r".*(q_proj|\.w\d)",
    ),
    "Qwen3Moe": (["q_proj", "up_proj"], ["experts.3.down_proj"], r".*experts\.\d+\.gate_proj|.*v_proj"),
    "GptOss": (["q_proj", "gate_up_proj"], ["down_proj"], r".*(o|down)_proj"),
    "GraniteMoe": (["q_proj", "up_proj"], ["experts.3.down_proj"], r".*experts\.\d+\.gate_proj|.*v_proj"),
    "JetMoe": (["kv_proj", "up_proj"], ["experts.3.down_proj"], r".*\.experts\.\d+\.o_proj|.*kv_proj"),
}


def test_tensors_that_find_no_layer_are_refused_wherever_they_come_from(tmp_path):
    """PEFT drops them without a word."""
    whole = get_peft_model(tiny_llama(), config(modules_to_save=["lm_head"]))
    whole.save_pretrained(tmp_path)
    fewer = QBLoRAConfig.from_pretrained(tmp_path)
    fewer.exclude_modules = r".*layers\.1\..*"
    message = r"'default': 14 tensors for layers that have no adapter \(base_model.*layers\.1\..*, .*base that it was"
    with pytest.raises(ConfigError, match=message):
        PeftModel.from_pretrained(tiny_llama(), tmp_path, config=fewer)
    bare = inject_adapter_in_model(config(adapter="block", in_factor=4), tiny_llama())
    with pytest.raises(ConfigError, match=r"'default': 28 tensors for layers that have no adapter"):
        set_peft_model_state_dict(bare, get_peft_model_state_dict(whole))
    smaller = tiny_llama(num_hidden_layers=1)
    expected = logits(smaller, tokens())
    with pytest.raises(ConfigError, match=r"'second': 14 tensors for layers that have no adapter"):
        smaller.load_adapter(str(tmp_path), "second")
    if not BEFORE_5:  # loaded by transformers itself, and taken out again
        assert not smaller._hf_peft_config_loaded
        assert torch.equal(logits(smaller, tokens()), expected)


def test_adapters_are_loaded_beside_others_in_parts_and_inside_wrappers():
    beside = {"modules_to_save": ["lm_head"], "trainable_token_indices": {"embed_tokens": [1, 2]}}
    model = get_peft_model(tiny_llama(), config(target_modules=["q_proj"], **beside))
    model.add_adapter("second", config(adapter="block", in_factor=4, **beside))
    states = {name: get_peft_model_state_dict(model, adapter_name=name) for name in ("default", "second")}
    for name, state in states.items():
        assert not set_peft_model_state_dict(model, state, adapter_name=name).unexpected_keys
    half = {name: tensor for name, tensor in states["default"].items() if "layers.1." not in name}
    assert not set_peft_model_state_dict(model, half).unexpected_keys
    apply_activation_checkpointing(model, check_fn=lambda module: type(module).__name__ == "LlamaDecoderLayer")
    check_every_layer_is_here(model, "default", states["default"])


@pytest.mark.parametrize(("name", "targets"), [(n, t) for n in EXPERTS if n in STACKED for t in EXPERTS[n]])
def test_experts_that_targets_name_are_said_to_get_no_adapter(name, targets):
    adapter, said = QBLoRAConfig(r=4, target_modules=targets), "no adapter acts on the experts of this model"
    if isinstance(targets, str) or {"q_proj", "kv_proj"} & {*targets}:
        with pytest.warns(UserWarning, match=said):
            get_peft_model(mixture(name), adapter)
    else:  # no other layer is left
        with pytest.raises(ConfigError, match=f"not found in the base model.* Note: {said}.*with a GroupQuantConfig"):
            get_peft_model(mixture(name), adapter)


@pytest.mark.parametrize("targets", [["q_proj", "o_proj"], r".*self_attn.*_proj", None])
def test_experts_that_no_target_names_are_not_spoken_of(targets):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="no adapter acts on the experts")
        get_peft_model(mixture("Mixtral" if targets is None else "GptOss"), QBLoRAConfig(r=4, target_modules=targets))
        packed = quantize_model_(mixture("GptOss"), GroupQuantConfig())
        get_peft_model(packed, QBLoRAConfig(r=4, target_modules=["down_proj"]))


@stacking
def test_an_adapter_of_experts_that_were_layers_is_refused_where_they_are_stacked(tmp_path):
    over_layers = quantize_model_(mixture("Mixtral"), GroupQuantConfig())
    targets = ["w1", "w2", "w3", "q_proj"]
    get_peft_model(over_layers, QBLoRAConfig(r=4, target_modules=targets)).save_pretrained(tmp_path)
    message = r"48 tensors for layers that have no adapter \(.*experts\.0\.w1\.lora_A.*with a GroupQuantConfig"
    with pytest.raises(ConfigError, match=message), pytest.warns(UserWarning, match="trained over a base with"):
        PeftModel.from_pretrained(mixture("Mixtral"), tmp_path)
    message = r"tensors for layers that have no adapter \(.*experts\..*lora_A.*with a GroupQuantConfig"
    with pytest.raises(ConfigError, match=message), pytest.warns(UserWarning, match="no adapter acts on the experts"):
        mixture("Mixtral").load_adapter(str(tmp_path))
