"""Going on from a checkpoint: with the base and the adapter that it was trained with, or not at all.

PEFT loads the tensors of a checkpoint into the adapter that is there. Under other settings of the same shapes they
compute something else; tensors that have no place are dropped, or loaded into what is frozen and never saved again.
"""

from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from qbl_trl.adapter.layer import adapter_layers
from qbl_trl.adapter.misplaced import layers_left_out, layers_with
from qbl_trl.adapter.recorded import check_same_adapter, check_same_base, quantization
from qbl_trl.config import QBLoRAConfig
from qbl_trl.errors import ConfigError
from qbl_trl.folders import is_adapter
from qbl_trl.loading import saved_adapter
from qbl_trl.quant.checkpoint import read_files
from qbl_trl.trl.inject import variables_of
from qbl_trl.trl.layers import active
from qbl_trl.wrapped import unwrap


def asked_for(args: TrainingArguments) -> str | bool | None:
    """What `resume_from_checkpoint` of a command line asks `train` for: a folder, True for the last one, or None.

    Raises:
        ConfigError: if it is not there.
    """
    given = args.resume_from_checkpoint
    word = str(given or None).lower()
    if word in ("none", "false"):
        return None
    if word != "true":
        if not Path(str(given)).is_dir():
            raise ConfigError(
                f"resume_from_checkpoint={given} is no folder; name one, or true for the last one of a run"
            )
        return str(given)
    folder = str(args.output_dir)
    if not Path(folder).is_dir() or get_last_checkpoint(folder) is None:
        raise ConfigError(
            f"resume_from_checkpoint=true, and {folder} holds no checkpoint to go on from; leave it out to begin anew"
        )
    return True


def check_resumed(trainer: Trainer | None, model: nn.Module, folder: Any = None) -> None:
    """Refuse to go on from a checkpoint of another base or another adapter: only tensors of its adapter are loaded.

    Args:
        folder: the checkpoint; by default the one that the trainer is resuming from, if any.

    Raises:
        ConfigError: naming what differs.
    """
    named = (variables.get("resume_from_checkpoint") for variables in variables_of(trainer))
    found = (Path(name) for name in (folder, *named) if isinstance(name, str | PathLike))
    folder = next(found, None)
    if folder is None:
        return
    trained = {name for layer in adapter_layers(model).values() for name in active(layer)}
    name = next(iter(trained)) if len(trained) == 1 else "default"
    own = folder if name == "default" else folder / name  # as PEFT saves it
    if not is_adapter(own):
        if (own / "adapter_model.safetensors").is_file():
            raise ConfigError(
                f"{own} holds an adapter without adapter_config.json, so its settings are unknown; put that file back, "
                "or resume from another checkpoint"
            )
        return
    saved, present = saved_adapter(own), getattr(model, "peft_config", {}).get(name)
    if not isinstance(saved, QBLoRAConfig):
        return
    check_same_base(saved, quantization(unwrap(model)), own)
    if len(trained) != 1 or not isinstance(present, QBLoRAConfig):
        return
    layers, file = layers_with(model, name), own / "adapter_model.safetensors"
    check_same_adapter(saved, present, layers, own)
    left_out = layers_left_out(layers, read_files([file])) if file.is_file() else []
    if left_out:
        raise ConfigError(
            f"{own} holds no adapter for {len(left_out)} of the layers that this run adapts ({left_out[0]}, ...): "
            "set target_modules as it was, or train anew"
        )


def check_before_loading_(trainer: Trainer) -> None:
    """Have the trainer ask `check_resumed` before it loads a checkpoint, which fails on tensors that do not fit.

    What trains keeps its type: over bitsandbytes TRL has made it bfloat16.
    """
    load = trainer._load_from_checkpoint
    if hasattr(load, "checks_adapter"):
        return

    def checked(folder: Any, *args: Any, **kwargs: Any) -> Any:
        check_resumed(trainer, trainer.model, folder)
        trained = {name: p.dtype for name, p in trainer.model.named_parameters() if p.requires_grad}  # type: ignore[union-attr]
        result = load(folder, *args, **kwargs)
        for name, parameter in trainer.model.named_parameters():  # type: ignore[union-attr]
            if parameter.dtype != trained.get(name, parameter.dtype):  # PEFT makes adapters float32 as it loads them
                parameter.data = parameter.data.to(trained[name])
        return result

    checked.checks_adapter = True  # type: ignore[attr-defined]
    trainer._load_from_checkpoint = checked  # type: ignore[method-assign]
