"""A base in several processes or on several GPUs: what is sent between them, and what cannot be done there."""

from typing import Any

from torch import nn
from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from qbl_trl.errors import ConfigError
from qbl_trl.quant.packed import BESIDE_CODES, PackedWeight


def keep_scales_apart_(wrapped: Any) -> None:
    """Leave scales and zero points out of what DistributedDataParallel sends from the first process at every forward
    pass, to keep alike what training changes: these never change, and weigh more than the gradients of an adapter.

    They are sent once, as all else is, when the model is wrapped.
    """
    wrapped = getattr(wrapped, "_orig_mod", wrapped)  # compiled
    if not isinstance(wrapped, nn.parallel.DistributedDataParallel):
        return
    packed = [(name, part) for name, part in wrapped.module.named_modules() if isinstance(part, PackedWeight)]
    wrapped.parameters_to_ignore.update(f"{name}.{buffer}" for name, part in packed for buffer in BESIDE_CODES)


def check_one_device(args: TrainingArguments, wanted: list[str]) -> None:
    """Refuse what keeps tensors of its own on one device, where torch's DataParallel copies the model to several.

    Args:
        wanted: the options that do, as the user wrote them.

    Raises:
        ConfigError: naming them.
    """
    if wanted and args.parallel_mode == ParallelMode.NOT_DISTRIBUTED and args.n_gpu > 1:
        raise ConfigError(
            f"{' and '.join(wanted)} cannot be had from one process that trains on {args.n_gpu} GPUs (DataParallel): "
            "start the script with `accelerate launch`, a process for each, or set CUDA_VISIBLE_DEVICES to one"
        )
