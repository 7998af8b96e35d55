"""Do two models compute the same function? Compare their logits on the same tokens.

reference, candidate: a transformers or PEFT model, an ORTModelForCausalLM, a folder of any of these (an ONNX
folder is recognized by its .onnx file), or any callable (input_ids, attention_mask) -> logits (B, S, V).
"""

import importlib
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qbl_trl.arithmetic import plain_defaults
from qbl_trl.errors import ConfigError, explain_missing
from qbl_trl.loading import open_folder
from qbl_trl.parity import ParityReport, compare, logits_of


def verify(reference: Any, candidate: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> ParityReport:
    """Compare two models on the same tokens; of a graph exported with logits="last", the last position only.

    Of classifiers, whose logits are (B, C), a row is what a position is elsewhere.

    A graph over a cache of 8 bits is run as it generates: half of the text as a prompt, the rest token by token, which
    reads what was rounded. One that was exported with logits="last" reads all of it token by token.

    Args:
        reference, candidate: see the module's description.
        input_ids: (B, S) or (S,) integers.
        attention_mask: (B, S), 1 on real tokens; None means all are real.

    Returns:
        The differences, over all positions that are no padding.

    Raises:
        ConfigError: if an argument is nothing that gives logits, no token ids or no mask of them, or the logits do not
            fit each other.
    """
    ids, mask = _tokens(input_ids, attention_mask)
    first, second = logits_of(opened(reference))(ids, mask), logits_of(opened(candidate))(ids, mask)
    if first.dim() == 3 and 1 in (first.shape[1], second.shape[1]) and ids.shape[1] > 1:  # a graph of last logits
        first, second = _last(first, mask), _last(second, mask)
        mask = mask.amax(1, keepdim=True)  # a row of padding alone has no last token
    return compare(first, second, mask if first.dim() == 3 else None)


def _tokens(input_ids: Any, attention_mask: Any) -> tuple[Tensor, Tensor]:
    """Ids and mask, (B, S) int64: what every model and graph takes."""
    ids = _tensor("input_ids", input_ids)
    ids = ids.unsqueeze(0) if ids.dim() == 1 else ids
    if ids.dim() != 2 or not ids.numel() or ids.is_floating_point() or ids.dtype == torch.bool or bool((ids < 0).any()):
        raise ConfigError(
            f"verify: input_ids of {tuple(ids.shape)} {ids.dtype}; give token ids of (batch, tokens), at least one"
        )
    mask = torch.ones_like(ids) if attention_mask is None else _tensor("attention_mask", attention_mask)
    mask = mask.unsqueeze(0) if mask.dim() == 1 else mask
    if mask.shape != ids.shape:
        raise ConfigError(f"verify: an attention_mask of {tuple(mask.shape)} does not cover ids of {tuple(ids.shape)}")
    return ids.long(), mask.long()


def _tensor(name: str, given: Any) -> Tensor:
    try:
        return given if isinstance(given, Tensor) else torch.as_tensor(given, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"verify: {name} is {given!r:.40}; give a tensor of (batch, tokens) integers") from error


def _last(logits: Tensor, mask: Tensor) -> Tensor:
    """Logits of each row's last token that is no padding, (B, 1, V)."""
    if logits.shape[1] == 1:
        return logits
    places = torch.arange(mask.shape[1], device="cpu") * mask.cpu()
    return logits[torch.arange(len(logits), device="cpu"), places.argmax(1)].unsqueeze(1)


@plain_defaults()
def opened(source: Any) -> Any:
    """The model or graph of a folder, in float32 as adapters open; anything else as it is.

    Raises:
        ConfigError: if the folder holds neither.
    """
    if not isinstance(source, str | PathLike):
        return source
    folder = Path(source)
    if not any(folder.glob("*.onnx")):
        return open_folder(folder, dtype=torch.float32)
    try:
        session = importlib.import_module("qbl_trl.onnx.session")  # here: models alone are compared without it
    except ModuleNotFoundError as error:
        explain_missing(f"verify: {folder}", error)
        raise
    return session.opened(folder)
