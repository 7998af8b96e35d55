"""Every recipe runs from its flags, on a tiny model and a local dataset, with every flag of its own given."""

import dataclasses
import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.test_recipes import load
from tests.tiny import tiny_llama
from tests.trl import data
from tests.trl.runs import settings

ADAPTER = {"r": 2, "lora_alpha": 4, "out_factor": 4}
FLAGS = {
    "sft_qablora": {
        **ADAPTER,
        "dtype": "float32",
        "attn_implementation": "eager",
        "bits": 8,
        "group_size": 16,
        "algorithm": "hqq",
        "lora_dropout": 0.1,
        "in_factor": 32,
        "overwrite": True,
        "export_onnx": importlib.util.find_spec("onnx") is not None,
        "provider": "cpu",
    },
    "sft_qblora": {
        **ADAPTER,
        "dtype": "float32",
        "attn_implementation": "eager",
        "double_quant": False,
        "lora_dropout": 0.1,
        "in_factor": 4,
    },
    "dpo_qblora": {**ADAPTER, "dtype": "float32", "group_size": 16, "algorithm": "mse", "overwrite": True},
}
ROWS = {"sft_qablora": data.completions, "sft_qblora": data.texts, "dpo_qblora": data.preferences}


@pytest.mark.parametrize("recipe", FLAGS)
def test_a_recipe_runs_with_every_flag_of_its_own(recipe, tmp_path):
    if recipe == "sft_qblora":
        pytest.importorskip("bitsandbytes", reason="the [bnb] extra is not installed")
    module = load(recipe)
    tiny_llama(vocab_size=32).save_pretrained(tmp_path / "model")
    data.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "rows").mkdir()
    ROWS[recipe](8).to_json(tmp_path / "rows" / "train.jsonl")
    given = {
        **settings(tmp_path / "run", max_steps=2),
        **FLAGS[recipe],
        "model_name_or_path": tmp_path / "model",
        "dataset_name": tmp_path / "rows",
    }
    arguments = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    *rest, own = module.make_parser().parse_args_and_config(arguments)
    assert {field.name for field in dataclasses.fields(own)} == {*FLAGS[recipe], "model_name_or_path"}
    module.main(*rest, own)
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    if recipe == "sft_qblora":
        return
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged")
    assert torch.isfinite(merged(torch.tensor([[1, 2, 3]])).logits).all()
    assert (tmp_path / "run" / "onnx" / "model.onnx").is_file() == bool(FLAGS[recipe].get("export_onnx"))
