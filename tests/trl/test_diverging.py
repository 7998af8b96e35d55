"""A run whose weights are lost stops, and says where to go back to."""

import pytest
import torch
from transformers import TrainerCallback

from qbl_trl.errors import MergeError
from qbl_trl.trl.callback import QBLoRACallback
from qbl_trl.trl.report import write_report
from tests.trl.runs import adapter, sft


def test_an_adapter_that_is_no_longer_finite_stops_the_run_and_says_where(tmp_path):
    class Poison(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            layer = model.get_submodule("base_model.model.model.layers.1.mlp.up_proj")
            layer.lora_B["default"].weight.data[0, 0] = torch.nan

    trainer = sft(tmp_path, QBLoRACallback(adapter()), callbacks=[Poison()])
    with pytest.raises(MergeError, match=r"step 1: the adapter of .*layers\.1\.mlp\.up_proj is no longer finite"):
        trainer.train()


class Diverging(TrainerCallback):
    """Loses the weights of an adapter in one step."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            next(p for name, p in model.named_parameters() if "lora_B" in name).data[0, 0] = float("nan")


@pytest.mark.parametrize("saving", [{"save_strategy": "steps", "save_steps": 1}, {"save_strategy": "no"}])
def test_weights_that_are_lost_reach_no_checkpoint_whatever_is_logged(saving, tmp_path):
    back = "checkpoint-2" if saving["save_strategy"] == "steps" else "the start"
    trainer = sft(tmp_path, QBLoRACallback(adapter()), callbacks=[Diverging()], logging_steps=100, **saving)
    with pytest.raises(MergeError, match=rf"is no longer finite.* resume from .*{back}$"):
        trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*"))[-1:] in ([], ["checkpoint-2"])


def test_a_record_from_before_the_first_log_has_its_page(tmp_path):
    saving = {"logging_steps": 100, "save_strategy": "steps", "save_steps": 1}
    trainer = sft(tmp_path, QBLoRACallback(adapter()), callbacks=[Diverging()], **saving)
    with pytest.raises(MergeError):
        trainer.train()
    assert "q_proj" in write_report(tmp_path).read_text()
