"""The models that PEFT's operations are tried on, and their adapter."""

from torch import nn

from qbl_trl import GroupQuantConfig, QBLoRAConfig
from qbl_trl.quant.hf_quantizer import quantize_model_
from tests.tiny import tiny_gpt2, tiny_llama


def config(**settings) -> QBLoRAConfig:
    return QBLoRAConfig(**{"r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM", **settings})


def groups() -> nn.Module:
    return quantize_model_(tiny_llama(), GroupQuantConfig(bits=4, group_size=32))


MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "groups": groups}
