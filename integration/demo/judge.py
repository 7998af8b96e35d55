"""Judge any model, torch or ONNX Runtime, by the log probability it gives to each label as the completion."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from integration.demo.packages import DemoDataError
from integration.demo.stories import R8_LABELS, Row

LogitsFn = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Classification:
    """What a model thinks of each row: log_probs (rows, labels) float32, gold (rows,) int64, indices into labels."""

    labels: tuple[str, ...]
    log_probs: Tensor
    gold: Tensor

    @property
    def predictions(self) -> list[str]:
        return [self.labels[i] for i in self.log_probs.argmax(dim=1).tolist()]

    @property
    def accuracy(self) -> float:
        return (self.log_probs.argmax(dim=1) == self.gold).double().mean().item()

    @property
    def nll(self) -> float:
        """Mean negative log probability of the right label as scored, over the whole vocabulary, in nats."""
        return -self.log_probs.gather(1, self.gold[:, None]).mean().item()


def logits_of(model: Any) -> LogitsFn:
    """A logits_fn for a torch model (transformers, PEFT, merged) or an ORTModelForCausalLM, in the mode it is in."""

    def logits_fn(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        inputs = {"input_ids": input_ids.to(model.device), "attention_mask": attention_mask.to(model.device)}
        with torch.no_grad():  # not inference_mode: it would poison tensors that the model caches and later trains with
            return model(**inputs).logits

    return logits_fn


def classify(
    logits_fn: LogitsFn,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    labels: Sequence[str] = R8_LABELS,
    *,
    batch_size: int = 8,
    progress: bool = True,
) -> Classification:
    """Give each row the label whose completion the model finds most probable.

        score(label) = log p(first token of label | prompt)             if the labels' first tokens all differ
                     = sum_t log p(token_t | prompt, tokens before t)   otherwise, over the label and the end token

    The first needs one forward per batch of prompts, the second one per batch of (prompt, label) pairs.

    Padding is on the right, whatever the tokenizer's padding_side says. Nothing is generated, so nothing has to end
    at the last column; and with the real tokens first, causal attention never sees the padding, the positions are
    0, 1, 2, ... without position_ids, and ONNX Runtime's GroupQueryAttention, which derives the length of a sequence
    from the sum of its mask, reads the right tokens. With padding on the left each of these would need care.

    Args:
        logits_fn: (input_ids, attention_mask), both (batch, length) int64 -> (batch, length, vocab); see `logits_of`.
        rows: {"prompt", "completion"} of `sft_rows`; the completion is read as the right answer.

    Raises:
        DemoDataError: if there are no rows, a completion is not among the labels, the tokenizer merges prompt and
            label, or logits_fn returns the wrong shape.
    """
    index = {" " + label: i for i, label in enumerate(labels)}
    strangers = sorted({row["completion"] for row in rows} - index.keys())
    if strangers or not rows:
        raise DemoDataError(f"classify: {len(rows)} rows, completions {strangers} not among the labels {list(labels)}")
    answers = _label_tokens(tokenizer, rows[0]["prompt"], list(index))
    first = [answer[0] for answer in answers]
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    if len(set(first)) == len(first):
        jobs = [_Job(ids, [len(ids) - 1] * len(first), first) for ids in prompts]
        log_probs = torch.stack(_score(logits_fn, jobs, batch_size, progress))
    else:
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        pairs = [(ids, answer + end) for ids in prompts for answer in answers]
        jobs = [_Job(ids + a[:-1], list(range(len(ids) - 1, len(ids) + len(a) - 1)), a) for ids, a in pairs]
        sums = [scores.sum() for scores in _score(logits_fn, jobs, batch_size, progress)]
        log_probs = torch.stack(sums).view(len(rows), len(answers))
    return Classification(tuple(labels), log_probs, torch.tensor([index[row["completion"]] for row in rows]))


@dataclass(frozen=True)
class _Job:
    """One sequence to run and the log probabilities wanted: of tokens[i], predicted at positions[i]."""

    ids: list[int]
    positions: list[int]
    tokens: list[int]


def _label_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, completions: list[str]) -> list[list[int]]:
    """The tokens that each completion adds to the prompt: SFTTrainer tokenizes them together, so we do too."""
    start = tokenizer(prompt)["input_ids"]
    whole = tokenizer([prompt + completion for completion in completions])["input_ids"]
    for completion, ids in zip(completions, whole, strict=True):
        if ids[: len(start)] != start or len(ids) == len(start):
            raise DemoDataError(
                f"classify: the tokenizer merges the end of the prompt {prompt[-20:]!r} with the completion "
                f"{completion!r}; end prompts with a character that stays a token of its own, such as ':'"
            )
    return [ids[len(start) :] for ids in whole]


def _score(logits_fn: LogitsFn, jobs: list[_Job], batch_size: int, progress: bool) -> list[Tensor]:
    """Run the jobs in batches of similar length; one (tokens,) float32 of log probabilities per job, in their order."""
    scores: list[Tensor] = [torch.empty(0)] * len(jobs)
    order = sorted(range(len(jobs)), key=lambda i: len(jobs[i].ids))
    with tqdm(total=len(jobs), desc="classifying", unit="sequence", disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            lengths = torch.tensor([len(jobs[i].ids) for i in batch])
            mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
            input_ids = torch.zeros_like(mask)  # any id will do for padding: see classify
            input_ids[mask.bool()] = torch.tensor([token for i in batch for token in jobs[i].ids])
            logits = logits_fn(input_ids, mask)
            if logits.dim() != 3 or logits.shape[:2] != mask.shape:
                raise DemoDataError(
                    f"classify: logits_fn returned {tuple(logits.shape)} for input_ids {tuple(mask.shape)}; expected "
                    f"({mask.shape[0]}, {mask.shape[1]}, vocabulary), one row of logits per input token"
                )
            for row, i in enumerate(batch):
                chosen = logits[row, jobs[i].positions].float().log_softmax(dim=-1)
                scores[i] = chosen[range(len(jobs[i].tokens)), jobs[i].tokens].cpu()
            bar.update(len(batch))
    return scores
