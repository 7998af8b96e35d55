"""Do two models compute the same function? Their logits, and how far these are apart.

Positions masked out are not compared.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qbl_trl.arithmetic import plain_arithmetic
from qbl_trl.errors import ConfigError
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
    """A function (input_ids, attention_mask) -> logits of a transformers or PEFT model, an ORTModelForCausalLM, or any
    callable that is one.

    Raises:
        ConfigError: if `source` is none of these.
    """
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
