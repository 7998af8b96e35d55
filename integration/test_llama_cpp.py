"""A merged adapter as a GGUF file, run by llama.cpp: its logits are those of the merged torch model.

    python -m pytest integration/test_llama_cpp.py

llama.cpp rounds activations to 8 bits, so the yardstick is what that costs on the file as published. Needs
llama-cpp-python and gguf.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from integration.demo.smollm2 import smollm2, smollm2_gguf
from qbl_trl import QBLoRAConfig, merge
from qbl_trl.adapter.layer import adapter_layers
from qbl_trl.cli import main
from qbl_trl.quant.importers import convert_checkpoint
from tests.tiny import logits

llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python (it is compiled)")
pytest.importorskip("gguf", reason="pip install gguf")

TEXT = (
    "A good harvest, a quiet sea and an honest scale: with these three a small harbour town can feed itself, and sell "
    "what is left to the ships which come in from the north every other week of the summer."
)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return AutoTokenizer.from_pretrained(smollm2())(TEXT, return_tensors="pt")["input_ids"]


def llama_logits(file: Path, ids: Tensor) -> Tensor:
    """(tokens, vocabulary) float32, from llama.cpp."""
    model = llama_cpp.Llama(str(file), n_ctx=256, n_threads=2, logits_all=True, verbose=False)
    model.eval(ids[0].tolist())
    return torch.from_numpy(np.array(model.scores[: ids.shape[1]], dtype=np.float32))


def divergence(reference: Tensor, other: Tensor) -> float:
    """Mean KL per token, nats."""
    first, second = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((first.exp() * (first - second)).sum(-1).mean())


def test_llama_cpp_runs_the_merged_model(tmp_path, ids):
    convert_checkpoint(smollm2_gguf(), tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    before = logits(base, ids)[0]
    cost_of_rounding = divergence(before, llama_logits(smollm2_gguf(), ids))

    torch.manual_seed(0)
    adapted = get_peft_model(base, QBLoRAConfig(r=8, quantization_aware=True))
    for layer in adapter_layers(adapted).values():
        nn.init.normal_(layer.lora_B["default"].weight, std=4e-2)
    expected = logits(adapted.eval(), ids)[0]
    merge(adapted).save_pretrained(tmp_path / "merged")
    command = ["convert", str(tmp_path / "merged"), str(tmp_path / "merged.gguf"), "--to", "gguf"]
    assert main([*command, "--template", str(smollm2_gguf())]) == 0
    found = llama_logits(tmp_path / "merged.gguf", ids)

    assert divergence(expected, before) > 20 * cost_of_rounding  # the adapter says something
    assert divergence(expected, found) <= 2 * cost_of_rounding  # other weights, the same rounding of activations
    assert (expected.argmax(-1) == found.argmax(-1)).float().mean() >= 0.95
