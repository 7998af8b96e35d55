"""Several processes or GPUs with a copy of the model each."""

import pytest
import torch
from peft import get_peft_model
from torch import distributed, nn

from qbl_trl import QBLoRACallback
from qbl_trl.errors import ConfigError
from qbl_trl.trl.replicas import keep_scales_apart_
from tests.tiny import tokens
from tests.trl import runs


@pytest.fixture
def one_process(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_scales_and_zero_points_are_not_sent_at_every_step(one_process, monkeypatch):
    wrapped = nn.parallel.DistributedDataParallel(get_peft_model(runs.base(), runs.adapter()))
    sent, send = [], distributed._broadcast_coalesced
    monkeypatch.setattr(distributed, "_broadcast_coalesced", lambda g, t, *a: sent.extend(t) or send(g, t, *a))
    ids = tokens(vocabulary=32)
    wrapped(input_ids=ids)
    assert any(tensor.shape == (64, 2) for tensor in sent)  # scales of a layer of 64 x 64
    del sent[:]
    compiled = nn.Module()
    compiled._orig_mod = wrapped
    keep_scales_apart_(compiled)
    expected = wrapped(input_ids=ids).logits
    assert sent  # the angles of the model's positions
    assert all(tensor.dim() == 1 for tensor in sent)
    torch.testing.assert_close(wrapped.module(input_ids=ids).logits, expected)


@pytest.mark.parametrize("options", [{"stored_delta": "float16"}, {"eval_merged_loss": True}])
def test_tensors_of_one_device_and_copies_on_several_do_not_go_together(tmp_path, monkeypatch, options):
    monkeypatch.setattr("transformers.TrainingArguments.n_gpu", property(lambda _: 2))
    with pytest.raises(ConfigError, match=r"trains on 2 GPUs \(DataParallel\)"):
        runs.sft(tmp_path, QBLoRACallback(runs.adapter(), **options), eval_strategy="no")
