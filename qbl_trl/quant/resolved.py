"""The files that transformers chose for a group-quantized model are checked before any of them is opened."""

import functools
from pathlib import Path
from typing import Any

from transformers import modeling_utils

from qbl_trl.config import QUANT_METHOD
from qbl_trl.quant.checkpoint import read_files


def check_chosen_files() -> None:
    """Have transformers name a file that is cut short or damaged (once): safetensors says only what is wrong with it.

    No quantizer is asked between the choice of the files and the first look into them, so the one function that
    chooses is wrapped. It is told how the model is quantized.
    """
    module: Any = modeling_utils
    choose = getattr(module, "_get_resolved_checkpoint_files", None)
    if choose is None:
        return  # a newer transformers; its own words will have to do

    @functools.wraps(choose)
    def choose_and_check(*args: Any, **kwargs: Any) -> Any:
        found = choose(*args, **kwargs)
        if (kwargs.get("user_agent") or {}).get("quant") == QUANT_METHOD:
            read_files(Path(file) for file in found[0] or () if str(file).endswith(".safetensors"))
        return found

    module._get_resolved_checkpoint_files = choose_and_check
