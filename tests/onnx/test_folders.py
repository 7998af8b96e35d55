"""What an export says of a folder's faults, and what it takes from the process: nothing."""

import pytest
import torch
from peft import get_peft_model

from qbl_trl import GroupQuantConfig, QBLoRAConfig, export_onnx
from qbl_trl.errors import CheckpointError, ConfigError
from qbl_trl.quant.hf_quantizer import quantize_model_
from tests.tiny import tiny_llama


def test_an_adapter_folder_takes_no_random_numbers(tmp_path):
    base = quantize_model_(tiny_llama(), GroupQuantConfig())
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    get_peft_model(base, QBLoRAConfig(r=1, quantization_aware=True)).save_pretrained(tmp_path / "adapter")
    state = torch.get_rng_state()
    export_onnx(tmp_path / "adapter", tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), state)


def test_a_shard_that_is_missing_and_a_temperature_that_is_no_number_are_named(tmp_path):
    model = quantize_model_(tiny_llama(), GroupQuantConfig())
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    shard = sorted((tmp_path / "shards").glob("*-00002-*"))[0]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        export_onnx(tmp_path / "shards", tmp_path / "out")
    model.save_pretrained(tmp_path / "hot")
    (tmp_path / "hot/generation_config.json").write_text('{"do_sample": true, "temperature": "hot"}')
    with pytest.raises(ConfigError, match="temperature='hot', which is no number"):
        export_onnx(tmp_path / "hot", tmp_path / "out")
    assert not (tmp_path / "out").exists()
