"""What the files of a float model hold, and do not hold, of the layers that are to be quantized while loading."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForQuestionAnswering, Qwen3MoeConfig, Qwen3MoeForCausalLM

from qbl_trl import GroupQuantConfig
from qbl_trl.errors import CheckpointError
from qbl_trl.quant.linear import GroupQuantLinear
from tests.tiny import SIZES, tiny_llama, tokens

ALGORITHMS = {"rtn": {}, "hqq": {}, "gptq": {"calibration": [tokens()]}}


def folder_with(path, rename=lambda name: name):
    """A float Llama whose tensors are renamed, or left out where the new name is empty."""
    tiny_llama().save_pretrained(path)
    file = path / "model.safetensors"
    renamed = {rename(name): value for name, value in load_file(file).items()}
    save_file({name: value for name, value in renamed.items() if name}, file, metadata={"format": "pt"})
    return path


def settings(algorithm):
    return GroupQuantConfig(algorithm=algorithm, **ALGORITHMS[algorithm])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_files_without_any_of_the_layers_are_refused_with_the_names_they_hold(tmp_path, algorithm):
    folder = folder_with(tmp_path, lambda name: f"module.{name}")
    with pytest.raises(
        CheckpointError, match=r"none of the 14 layers .* such as model\.layers\..* such as module\.model\.layers"
    ):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings(algorithm))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_nor_are_experts_quantized_that_no_file_holds(tmp_path, algorithm):
    settings_of = {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings_of)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({f"module.{name}": value for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"none of the \d+ layers to quantize was loaded"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings(algorithm))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_class_that_calls_its_layers_otherwise_quantizes_no_random_ones(tmp_path, algorithm):
    with pytest.raises(CheckpointError, match=r"such as transformer\.layers\..* Load the class that wrote them"):
        LlamaForQuestionAnswering.from_pretrained(folder_with(tmp_path), quantization_config=settings(algorithm))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_layer_that_the_files_lack_stays_in_float_and_is_recorded(tmp_path, algorithm):
    lost = "model.layers.1.mlp.up_proj"
    folder = folder_with(tmp_path / "float", lambda name: "" if name.startswith(lost) else name)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings(algorithm))
    packed = {name for name, layer in model.named_modules() if isinstance(layer, GroupQuantLinear)}
    assert type(model.get_submodule(lost)) is nn.Linear
    assert len(packed) == 13
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(again.get_submodule(lost).weight, model.get_submodule(lost).weight)
