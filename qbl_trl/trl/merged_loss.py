"""The merged model's loss on the evaluation data, measured by the trainer's own loop and its own loss."""

import copy
from collections.abc import Mapping
from typing import Any

from torch.utils.data import DataLoader
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer_callback import ProgressCallback

from qbl_trl.errors import ConfigError
from qbl_trl.random_state import same_random_state
from qbl_trl.trl.shadow import computing_merged

# What TRL's trainers collect while computing a loss: running averages (ORPO and CPO: stored), and tables of texts.
_ACCUMULATED = ("_metrics", "_stored_metrics", "_total_train_tokens", "_logs")


def merged_loss(
    trainer: Trainer, evaluated: Mapping[str, float], data: DataLoader[Any] | None, stored: str | None = None
) -> dict[str, float]:
    """Run the evaluation loop once more with merged layers, and log the loss: `eval_loss` becomes `eval_merged_loss`.

    Neither random state nor what the trainer has accumulated for its own logs is touched.

    Args:
        evaluated: the metrics of the evaluation that has just been made, with their prefix.
        data: what it was made on.
        stored: type the merged delta is rounded to, None for float32.
    """
    prefixes = (key.removesuffix("_runtime") for key in evaluated if key.endswith("_runtime"))  # a metric may, too
    measured = next((prefix for prefix in prefixes if f"{prefix}_loss" in evaluated), None)
    if data is None or measured is None:
        return {}
    first, *rest = measured.split("_", 1)
    prefix = "_".join([first, "merged", *rest])
    _close_bar(trainer)
    kept = {key: copy.deepcopy(vars(trainer)[key]) for key in _ACCUMULATED if key in vars(trainer)}
    if isinstance(trainer, Seq2SeqTrainer):  # its evaluation counts what fills a last batch up, and forgets so again
        trainer.gather_function = trainer.accelerator.gather
    with computing_merged(trainer.model, stored), same_random_state():
        output = trainer.evaluation_loop(
            data,
            description="Evaluation of the merged model",
            prediction_loss_only=True,
            metric_key_prefix=prefix,
        )
    vars(trainer).update(kept)
    losses = {key: float(value) for key, value in output.metrics.items() if key == f"{prefix}_loss"}
    Trainer.log(trainer, dict(losses))  # the base class: TRL's own would log its training averages again
    return losses


def check_merged_loss(trainer: Trainer | None, measured: bool) -> None:
    """Refuse a merged loss that cannot be measured, and a best model that is chosen by a figure nobody will.

    Raises:
        ConfigError: saying what to set.
    """
    if measured and (trainer is None or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ConfigError(
            "QBLoRACallback: eval_merged_loss needs a trainer with the whole model on every process; leave it out "
            "under FSDP and DeepSpeed"
        )
    metric = "" if trainer is None else trainer.args.metric_for_best_model or ""
    named = metric.removeprefix("eval_")
    parts = list(trainer.eval_dataset) if trainer is not None and isinstance(trainer.eval_dataset, dict) else []
    losses = [f"merged_{part}_loss" for part in parts] or ["merged_loss"]
    if named in losses and not measured:
        raise ConfigError(f"metric_for_best_model={metric!r} is measured with QBLoRACallback(eval_merged_loss=True)")
    if parts and named in ("merged_loss", *(f"{part}_merged_loss" for part in parts)):
        raise ConfigError(
            f"metric_for_best_model={metric!r}: the merged losses here are {', '.join(losses)}, with "
            "QBLoRACallback(eval_merged_loss=True)"
        )
    if named.startswith("qbl/"):
        raise ConfigError(
            f"metric_for_best_model={metric!r} is logged while training, and an evaluation has no such figure; "
            '"merged_loss" is one, with QBLoRACallback(eval_merged_loss=True)'
        )


def _close_bar(trainer: Trainer) -> None:
    """The evaluation's own bar is full; another is drawn for the merged model, not this one beyond its end."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ProgressCallback):
            ProgressCallback.on_evaluate(callback, trainer.args, trainer.state, trainer.control)
