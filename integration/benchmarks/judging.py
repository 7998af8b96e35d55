"""The judge of the quality benchmark: log probabilities of every choice, with the frozen lower layers run once.

    score(choice) = sum_t log p(token_t | prompt, tokens before t)      over the choice's own tokens
                  = log p(first token | prompt)                         for r8, whose topics differ in the first token

The answer given is the choice with the highest score. Prompts and choices are tokenized together with the space in
front of the choice, as a trainer of completions tokenizes them.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from integration.benchmarks.tasks import Item


@dataclass(frozen=True)
class Judgement:
    """scores[i]: one per choice of question i, natural logarithms; lengths[i]: tokens of its right choice."""

    scores: list[Tensor]
    gold: list[int]
    classes: int | None  # number of classes if the choices are the same for every question
    lengths: list[int] = dataclasses.field(default_factory=list)

    @property
    def measures(self) -> dict[str, float]:
        """nll: of the right answer over the whole vocabulary; choice_nll: over the choices; both in nats.

        Where there is one choice, perplexity: exp of the nats per token.
        """
        if all(len(scores) == 1 for scores in self.scores):
            total = -float(torch.cat(self.scores).sum())
            nll = total / len(self.scores)
            return {"rows": len(self.scores), "nll": nll, "perplexity": math.exp(total / sum(self.lengths))}
        answers = [int(scores.argmax()) for scores in self.scores]
        right = [answer == gold for answer, gold in zip(answers, self.gold, strict=True)]
        result = {
            "rows": len(right),
            "nll": -_mean([float(s[g]) for s, g in zip(self.scores, self.gold, strict=True)]),
            "choice_nll": -_mean([float(s.log_softmax(0)[g]) for s, g in zip(self.scores, self.gold, strict=True)]),
            "accuracy": _mean(right),
        }
        if self.classes:
            of_class = [[r for r, g in zip(right, self.gold, strict=True) if g == c] for c in range(self.classes)]
            result["macro_recall"] = _mean([_mean(rows) for rows in of_class if rows])
        return result


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@dataclass(frozen=True)
class Query:
    """One sequence, and the log probabilities wanted of it: of tokens[i], predicted at positions[i]."""

    ids: list[int]
    positions: list[int]
    tokens: list[int]


def answer_query(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, *, end: bool) -> Query:
    """Every token of the answer given the prompt and the tokens before it; with `end`, the end token too.

    Raises:
        ValueError: if the tokenizer merges the end of the prompt with the answer.
    """
    start, whole = tokenizer(prompt)["input_ids"], tokenizer(prompt + answer)["input_ids"]
    if whole[: len(start)] != start or len(whole) == len(start):
        raise ValueError(f"the tokenizer merges the prompt's end {prompt[-20:]!r} with the answer {answer!r}")
    wanted = whole[len(start) :] + [tokenizer.eos_token_id] * end
    ids = start + wanted[:-1]
    return Query(ids, list(range(len(start) - 1, len(ids))), wanted)


class Split:
    """A causal model in two: the lower layers, frozen and run once per sequence, and the upper ones, to be adapted.

    What the lower layers make of a sequence is kept, so a cell costs only its upper layers. With `layers` equal to
    the model's own number the lower part is the embedding alone.

    Attributes:
        upper: a causal model of the upper `layers` layers, norm and head, called with inputs_embeds.
    """

    def __init__(self, model: PreTrainedModel, layers: int) -> None:
        cut = len(model.model.layers) - layers
        self.upper = sharing_copy(model)
        self.upper.model.layers = self.upper.model.layers[cut:]
        self.upper.config.num_hidden_layers, self.upper.config.use_cache = layers, False  # a cache counts from layer 0
        self._lower = sharing_copy(model).model
        self._lower.layers, self._lower.norm = self._lower.layers[:cut], nn.Identity()
        self._lower.config.num_hidden_layers = cut
        self._lower.eval()
        self._known: dict[tuple[int, ...], Tensor] = {}

    def hidden(self, sequences: Sequence[list[int]]) -> list[Tensor]:
        """(tokens, hidden_size) for each sequence of ids, from the cache where it was seen before."""
        missing = [ids for ids in sequences if tuple(ids) not in self._known]
        if missing:
            ids, mask = padded(missing)
            with torch.no_grad():
                found = self._lower(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            self._known.update({tuple(ids): row[: len(ids)] for ids, row in zip(missing, found, strict=True)})
        return [self._known[tuple(ids)] for ids in sequences]

    def log_probs(self, upper: nn.Module, queries: Sequence[Query]) -> list[Tensor]:
        """The log probabilities that each query wants, float32, with `upper` (adapted, merged) above the lower part.

        Only the wanted positions go through the output head. Padding is on the right, where causal attention never
        sees it.
        """
        states = self.hidden([query.ids for query in queries])
        _, mask = padded([query.ids for query in queries])
        inputs = nn.utils.rnn.pad_sequence(states, batch_first=True)
        hidden = upper.model(inputs_embeds=inputs, attention_mask=mask, use_cache=False).last_hidden_state  # type: ignore[operator]
        rows = torch.tensor([row for row, query in enumerate(queries) for _ in query.tokens])
        positions = torch.tensor([position for query in queries for position in query.positions])
        tokens = torch.tensor([token for query in queries for token in query.tokens])
        chosen = upper.lm_head(hidden[rows, positions]).float().log_softmax(-1)  # type: ignore[operator]
        return list(chosen.gather(1, tokens[:, None])[:, 0].split([len(query.tokens) for query in queries]))


def sharing_copy(model: nn.Module) -> Any:
    """New modules over the same tensors."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, memo)


def padded(sequences: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask, (rows, longest) int64, padded on the right."""
    lengths = torch.tensor([len(ids) for ids in sequences])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    ids = torch.zeros_like(mask)
    ids[mask.bool()] = torch.tensor([token for sequence in sequences for token in sequence])
    return ids, mask


def judge(
    split: Split,
    upper: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    *,
    by_first_token: bool = False,
    batch_size: int = 16,
    progress: Callable[[str], None] | None = None,
) -> Judgement:
    """Score every choice of every question with `upper` above the split's lower layers; leaves it in eval mode."""
    queries: list[Query] = []
    owners: list[int] = []
    lengths: list[int] = []
    for number, item in enumerate(items):
        answers = [answer_query(tokenizer, item.prompt, choice, end=False) for choice in item.choices]
        if by_first_token:
            position = answers[0].positions[0]
            first = [answer.tokens[0] for answer in answers]
            answers = [Query(answers[0].ids[: position + 1], [position] * len(first), first)]
        lengths.append(1 if by_first_token else len(answers[item.gold].tokens))
        queries += answers
        owners += [number] * len(answers)
    upper.eval()
    found: list[Tensor] = [torch.empty(0)] * len(queries)
    order = sorted(range(len(queries)), key=lambda i: len(queries[i].ids))  # little padding
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        with torch.no_grad():
            for i, values in zip(batch, split.log_probs(upper, [queries[i] for i in batch]), strict=True):
                found[i] = values
        if progress:
            progress(f"{min(start + batch_size, len(order))}/{len(order)} sequences judged")
    scores: list[list[Tensor]] = [[] for _ in items]
    for i, number in enumerate(owners):
        scores[number] += [found[i]] if by_first_token else [found[i].sum()[None]]
    classes = len(items[0].choices) if by_first_token else None
    return Judgement([torch.cat(s) for s in scores], [item.gold for item in items], classes, lengths)
