"""Do two models compute the same function? Compare their logits on the same tokens.

    reference, candidate: a transformers or PEFT model, an ORTModelForCausalLM, a folder of any of these (an ONNX
    folder is recognized by its .onnx file), or any callable (input_ids, attention_mask) -> logits (B, S, V).

Positions masked out are not compared. Nothing here imports ONNX Runtime: a folder with a graph is opened by
`qbl_trl.onnx.session`, looked up by name when it is needed.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qbl_trl.arithmetic import plain_arithmetic, plain_defaults
from qbl_trl.errors import ConfigError, explain_missing
from qbl_trl.loading import load_adapter, open_whole
from qbl_trl.wrapped import evaluating, unpatched_forward, unwrap

Logits = Callable[[Tensor, Tensor], Tensor]

TIE = 1e-3  # logits: what float32 sums in another order may turn round
_ROWS_AT_ONCE = 256  # positions whose distributions are held in float64 at the same time


@dataclass(frozen=True)
class ParityReport:
    """How far two sets of logits are apart.

    Attributes:
        tokens: positions compared.
        max_abs_difference, mean_abs_difference: over all logits of these positions.
        kl_per_token: mean of KL(reference || candidate), nats.
        top1_agreement: share of positions with the same best token.
        ties: positions that disagree where the reference's two best logits are no further apart than TIE. (Wherever two
            models disagree, these are within twice their largest difference: that alone would excuse everything.)
    """

    tokens: int
    max_abs_difference: float
    mean_abs_difference: float
    kl_per_token: float
    top1_agreement: float
    ties: int

    @classmethod
    def joined(cls, reports: Sequence["ParityReport"]) -> "ParityReport":
        """Several comparisons as one: the largest difference of all, and means over all their positions."""
        tokens = sum(report.tokens for report in reports)
        mean, kl, same = (
            sum(getattr(report, name) * report.tokens for report in reports) / tokens
            for name in ("mean_abs_difference", "kl_per_token", "top1_agreement")
        )
        largest = max(report.max_abs_difference for report in reports)
        return cls(tokens, largest, mean, kl, same, sum(report.ties for report in reports))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        ties = f" ({self.ties} ties)" if self.ties else ""
        return (
            f"max difference {self.max_abs_difference:.2e}, mean {self.mean_abs_difference:.2e}, "
            f"KL per token {self.kl_per_token:.2e}, same best token {self.top1_agreement:.2%}{ties}, "
            f"{self.tokens} tokens"
        )


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
    first, second = logits_of(reference)(ids, mask), logits_of(candidate)(ids, mask)
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


def compare(reference: Tensor, candidate: Tensor, attention_mask: Tensor | None = None) -> ParityReport:
    """Compare logits (B, S, V), or (B, C) without a mask; see `ParityReport`.

    Raises:
        ConfigError: if shapes differ or a logit is not finite.
    """
    if reference.shape != candidate.shape:
        raise ConfigError(
            f"logits of shape {tuple(reference.shape)} and {tuple(candidate.shape)} cannot be compared; a graph "
            'exported with logits="last" gives the last position only'
        )
    whole = torch.ones(reference.shape[:-1], dtype=torch.bool, device="cpu")
    kept = whole if attention_mask is None else attention_mask.bool().cpu()
    first, second = reference.detach().cpu()[kept], candidate.detach().cpu()[kept]
    if not first.numel():
        raise ConfigError("no position is left to compare: the attention mask is all zero")
    largest, total, kl, same, gaps = 0.0, 0.0, 0.0, 0, []
    for start in range(0, first.shape[0], _ROWS_AT_ONCE):
        p, q = first[start : start + _ROWS_AT_ONCE].double(), second[start : start + _ROWS_AT_ONCE].double()
        difference = (p - q).abs()
        if not torch.isfinite(difference).all():
            raise ConfigError("logits hold NaN or infinite values; one of the two models is broken")
        largest = max(largest, float(difference.max()))
        total += float(difference.sum())
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        kl += float((log_p.exp() * (log_p - log_q)).sum())
        best = p.topk(min(2, p.shape[-1]), dim=-1)  # a reward is one number
        differs = best.indices[:, 0] != q.argmax(-1)
        same += int((~differs).sum())
        gaps += (best.values[:, 0] - best.values[:, -1])[differs].tolist()
    count = first.shape[0]
    ties = sum(gap <= TIE for gap in gaps)
    return ParityReport(count, largest, total / first.numel(), max(kl / count, 0.0), same / count, ties)


def logits_of(source: Any) -> Logits:
    """A function (input_ids, attention_mask) -> logits for anything `verify` accepts.

    Raises:
        ConfigError: if `source` is none of these.
    """
    if isinstance(source, (str, PathLike)):
        return logits_of(_open(Path(source)))
    if isinstance(source, nn.Module):
        return _torch_logits(source)
    if hasattr(source, "generate") and callable(getattr(source, "forward", None)):  # ORTModelForCausalLM
        with_positions = "position_ids" in getattr(source, "input_names", ())
        return _step_by_step(source, with_positions) if _rounds_cache(source) else _model_logits(source, with_positions)
    if callable(source):
        given: Logits = source
        return given
    raise ConfigError(
        f"verify: a {type(source).__name__} gives no logits; pass a model, a model folder, or a callable "
        "(input_ids, attention_mask) -> logits"
    )


def positions(attention_mask: Tensor) -> Tensor:
    """Position of each token as `generate` counts it: padding on the left does not count, (B, S)."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def _model_logits(model: Any, with_positions: bool, with_decoder: bool = False) -> Logits:
    def run(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        named = {"position_ids": positions(attention_mask)} if with_positions else {}
        if with_decoder:  # what it reads it writes: logits of the same shape as a decoder's
            named["decoder_input_ids"] = input_ids
        logits = getattr(model(input_ids=input_ids, attention_mask=attention_mask, **named), "logits", None)
        if not isinstance(logits, Tensor):
            raise ConfigError(
                f"verify: a {type(model).__name__} of this task gives no logits; pass a callable (input_ids, "
                "attention_mask) -> logits"
            )
        return logits.float()

    return run


def _rounds_cache(model: Any) -> bool:
    """Whether an ORTModelForCausalLM keeps keys and values in 8 bits."""
    session = getattr(model, "session", None)
    return session is not None and any(value.type == "tensor(int8)" for value in session.get_inputs())


def _step_by_step(model: Any, with_positions: bool) -> Logits:
    """Half of a text at once, then token by token over the model's own cache; all of it so where logits are missing."""

    def run(input_ids: Tensor, attention_mask: Tensor, prompt: int | None = None) -> Tensor:
        length, start, cache, parts, places = input_ids.shape[1], 0, None, [], positions(attention_mask)
        first = max(1, length // 2) if prompt is None else prompt
        for end in range(first, length + 1):
            named = {"position_ids": places[:, start:end]} if with_positions else {}
            ids, mask = input_ids[:, start:end], attention_mask[:, :end]
            made = model(input_ids=ids, attention_mask=mask, past_key_values=cache, **named)
            start, cache = end, made.past_key_values
            parts.append(made.logits.float())
        found = torch.cat(parts, 1)
        return found if found.shape[1] == length else run(input_ids, attention_mask, 1)

    return run


def _torch_logits(model: nn.Module) -> Logits:
    inner: Any = unwrap(model)
    if not hasattr(inner, "config") or getattr(inner, "main_input_name", "input_ids") != "input_ids":
        raise ConfigError(
            f"verify: a {type(inner).__name__} reads no token ids; pass a callable (input_ids, attention_mask) -> "
            "logits"
        )
    with_positions = "position_ids" in inspect.signature(inner.forward).parameters
    vocabulary = getattr(inner.config, "vocab_size", None)
    run = _model_logits(model, with_positions, bool(getattr(inner.config, "is_encoder_decoder", False)))

    def logits(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        if vocabulary is not None and int(input_ids.max()) >= vocabulary:
            raise ConfigError(f"token {int(input_ids.max())} is beyond the vocabulary of {vocabulary} tokens")
        device = next(model.parameters()).device
        mixed = any("_original_forward" in vars(part) for part in (model, inner))  # Accelerate's mixed precision
        own = unpatched_forward(inner) if mixed else nullcontext()
        with evaluating(model), torch.no_grad(), own, plain_arithmetic(device.type):
            return run(input_ids.to(device), attention_mask.to(device))

    return logits


@plain_defaults()
def _open(folder: Path) -> Any:
    if not folder.is_dir():
        raise ConfigError(f"verify: {folder} is no folder")
    if any(folder.glob("*.onnx")):
        try:
            session = importlib.import_module("qbl_trl.onnx.session")
        except ModuleNotFoundError as error:
            explain_missing(f"verify: {folder}", error)
            raise
        return session.opened(folder)
    importlib.import_module("qbl_trl")  # registers our quantization config and adapter type
    if (folder / "adapter_config.json").is_file():
        return load_adapter(folder)
    if (folder / "config.json").is_file():
        return open_whole(folder, dtype=torch.float32)  # as adapters open
    raise ConfigError(
        f"verify: {folder} holds neither an ONNX graph (*.onnx), nor an adapter (adapter_config.json), nor a model "
        "(config.json)"
    )
