"""A model's embedding and output head at few bits, for the graph alone (`embedding_bits`).

They are the largest weights of a small model, and the head is read at every step. Trainers want them in float, so they
are packed when the model is exported; the model that was given stays as it is.

Rounding a head to its weights alone costs several times as much as rounding it to what it computes: a few features of
what it reads are far larger than the rest. So a head, and an embedding that is one table with it, is rounded by GPTQ:

    min over codes of  tr((W - Wq) (H + m I) (W - Wq)^T),    H = mean of x x^T over what the head reads, see
                                                             `quant.gptq.head_hessian` for m

Tokens without meaning are text enough. SmolLM2 at 4 bits, KL per token on news: 0.155 rounded to nearest in groups of
32, 0.05 to 0.08 so, and 0.06 to 0.08 in groups of 64, whose scales take half the bytes: every step reads them. The rows
of an embedding that is no head are looked up one by one, and keep groups of 32.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qbl_trl.config import GroupQuantConfig
from qbl_trl.errors import ExportError
from qbl_trl.onnx.sources import is_plain
from qbl_trl.parity import logits_of
from qbl_trl.quant.embedding import GroupQuantEmbedding, embedding_scale
from qbl_trl.quant.gptq import head_hessian
from qbl_trl.quant.head import input_table, packed_head, packed_table
from qbl_trl.quant.linear import GroupQuantLinear
from qbl_trl.quant.modules import copied, itself, plain_forward_, replace, same_module_name

_HEAD, _ROWS_ALONE, _SMALLEST = 64, 32, 16  # groups: unless layers have larger ones, and what the operators take
_TEXTS, _LENGTH = 4, 64  # without meaning


def check_tables(decoder: nn.Module, bits: int) -> None:
    """Raise ExportError if the embedding or the head of a transformers model cannot be packed.

    That is where one of the two was trained by itself and is not merged, computes something else, or has a width that
    no group divides.
    """
    table, head = input_table(decoder), decoder.get_output_embeddings()  # type: ignore[operator]
    packed = isinstance(table, GroupQuantEmbedding), isinstance(head, GroupQuantLinear)
    if all(packed):
        return
    known = packed[0] or (table is not None and embedding_scale(table) is not None)
    if not known or not (packed[1] or (isinstance(head, nn.Linear) and is_plain(head))):
        raise ExportError(
            f"embedding_bits={bits}: a {type(table).__name__} and a {type(head).__name__} cannot be packed. Merge an "
            "adapter that holds them first; else leave embedding_bits out"
        )
    width: int = table.embedding_dim  # type: ignore[assignment, union-attr]
    if width % _SMALLEST:
        raise ExportError(
            f"embedding_bits={bits}: the embedding is {width} wide, which no group of {_SMALLEST} or more divides; "
            "leave embedding_bits out"
        )


def has_packed_head(decoder: nn.Module) -> bool:
    """Whether the head of a transformers model is packed already."""
    return isinstance(decoder.get_output_embeddings(), GroupQuantLinear)  # type: ignore[operator]


def head_inputs(
    model: nn.Module, decoder: PreTrainedModel, longest: int, texts: Sequence[Tensor] | None = None
) -> Tensor:
    """What to round a float head for, (K, K) float32.

    Args:
        model: in float32, with or without adapters.
        decoder: the transformers model inside it.
        longest: tokens it reads.
        texts: token ids (B, S) without padding; None for tokens without meaning.
    """
    head: Any = decoder.get_output_embeddings()
    if texts is None:
        generator, vocabulary = torch.Generator().manual_seed(1), decoder.config.get_text_config().vocab_size
        texts = [torch.randint(0, vocabulary, (_TEXTS, min(_LENGTH, longest)), generator=generator)]  # type: ignore[arg-type]
    run = logits_of(model)
    return head_hessian(head, [partial(run, ids, torch.ones_like(ids)) for ids in texts])


@dataclass(frozen=True)
class Tables:
    """What takes the places of an embedding and a head; None for what is packed already."""

    embedding: GroupQuantEmbedding | None
    head: GroupQuantLinear | None


def packed_tables(decoder: nn.Module, bits: int, hessian: Tensor | None = None) -> Tables:
    """The embedding and the head of a decoder that `check_tables` has passed, tied or not.

    Zero points are integers, as GatherBlockQuantized needs them.

    Args:
        hessian: see `head_inputs`.
    """
    table, head = input_table(decoder), decoder.get_output_embeddings()  # type: ignore[operator]
    tied, rows, output = head.weight is table.weight, None, None  # type: ignore[union-attr]

    def config(usual: int) -> GroupQuantConfig:
        return GroupQuantConfig(bits=bits, group_size=_group(decoder, usual, table.embedding_dim))  # type: ignore[arg-type, union-attr]

    if isinstance(table, nn.Embedding):
        settings = config(_HEAD if tied else _ROWS_ALONE)
        rows = packed_table(table, settings, embedding_scale(table) or 1.0, hessian if tied else None)
    if not isinstance(head, GroupQuantLinear):
        output = packed_head(head, config(_HEAD), rows if tied else None, hessian)
    return Tables(rows, output)


def with_tables(model: nn.Module, decoder: nn.Module, tables: Tables) -> nn.Module:
    """A copy of a model that shares its tensors, but for its embedding and head.

    Args:
        model: with or without adapters.
        decoder: the transformers model inside it.
    """
    places = {
        same_module_name(model, old): new
        for old, new in (
            (input_table(decoder), tables.embedding),
            (decoder.get_output_embeddings(), tables.head),  # type: ignore[operator]
        )
        if old is not None and new is not None
    }
    twin = plain_forward_(copied(model, itself))
    for name, new in places.items():
        replace(twin, name, new)
    return twin


def _group(decoder: nn.Module, usual: int, width: int) -> int:
    """The usual group, or that of most layers if it is larger; or the next smaller one that divides the width."""
    sizes = Counter(layer.group_size for layer in decoder.modules() if isinstance(layer, GroupQuantLinear))
    group = max(usual, max(sizes, key=lambda size: sizes[size], default=usual))
    while width % group:
        group //= 2
    return group
