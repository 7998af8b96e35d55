"""The merged model's loss on the evaluation data, measured by the trainer's own loop and its own loss."""

import copy
from collections.abc import Mapping

from transformers import Trainer

from qbl_trl.trl.shadow import computing_merged, same_random_state

PREFIX = "eval_merged"
_ACCUMULATED = ("_metrics", "_total_train_tokens")  # running averages TRL's trainers collect while computing a loss


def merged_loss(trainer: Trainer, evaluated: Mapping[str, float], stored: str | None = None) -> dict[str, float]:
    """Run the evaluation loop once more with merged layers, and log the loss under the prefix "eval_merged".

    Neither random state nor what the trainer has accumulated for its own logs is touched.

    Args:
        trainer: with its eval_dataset; nothing is measured where the evaluation was of other data.
        evaluated: the metrics of the evaluation that has just been made; their names tell of which dataset.
        stored: type the merged delta is rounded to, None for float32.
    """
    name = _dataset_name(trainer, evaluated)
    if name is None:
        return {}
    prefix = f"{PREFIX}_{name}" if name else PREFIX
    kept = {key: copy.deepcopy(vars(trainer)[key]) for key in _ACCUMULATED if key in vars(trainer)}
    with computing_merged(trainer.model, stored), same_random_state():
        output = trainer.evaluation_loop(
            trainer.get_eval_dataloader(name or None),
            description="Evaluation of the merged model",
            prediction_loss_only=True,
            metric_key_prefix=prefix,
        )
    vars(trainer).update(kept)
    losses = {key: float(value) for key, value in output.metrics.items() if key == f"{prefix}_loss"}
    Trainer.log(trainer, dict(losses))  # the base class: TRL's own would log its training averages again
    return losses


def _dataset_name(trainer: Trainer, evaluated: Mapping[str, float]) -> str | None:
    """Key of the dataset among several, "" for the only one, None if it is none of the trainer's."""
    datasets = trainer.eval_dataset
    if isinstance(datasets, dict):
        return next((name for name in datasets if f"eval_{name}_loss" in evaluated), None)
    return "" if datasets is not None and "eval_loss" in evaluated else None


__all__ = ["PREFIX", "merged_loss"]
