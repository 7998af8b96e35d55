"""A model's embedding and output head at few bits, for the graph alone (`embedding_bits`).

They are the largest weights of a small model, and the head is read at every step. Trainers want them in float, so they
are packed when the model is exported; the model that was given stays as it is.
"""

import copy
from collections import Counter
from typing import Any

from torch import nn

from qbl_trl.config import GroupQuantConfig
from qbl_trl.errors import ExportError
from qbl_trl.onnx.sources import is_plain
from qbl_trl.quant.embedding import GroupQuantEmbedding, embedding_scale
from qbl_trl.quant.head import input_table, packed_head, packed_table
from qbl_trl.quant.linear import GroupQuantLinear
from qbl_trl.quant.modules import plain_forward_, replace, same_module_name

_USUAL, _SMALLEST = 32, 16  # groups: of a model without packed layers, and what the operators take


def with_packed_tables(model: nn.Module, decoder: nn.Module, bits: int) -> nn.Module:
    """A copy of a model that shares its tensors, but for its embedding and head: these are packed, tied or not.

    Their groups are as wide as those of most layers, or the next smaller that divides the width. Zero points are
    integers, as GatherBlockQuantized needs them, and the range of a group decides its codes: a search over clipped
    ranges (`algorithm="mse"`) takes thirty times as long for 7% of the squared error.

    Args:
        model: with or without adapters.
        decoder: the transformers model inside it.

    Raises:
        ExportError: if one of the two was trained by itself and is not merged, computes something else, or has a width
            that no group divides.
    """
    table, head = input_table(decoder), decoder.get_output_embeddings()  # type: ignore[operator]
    packed = isinstance(table, GroupQuantEmbedding), isinstance(head, GroupQuantLinear)
    if all(packed):
        return model
    scale = 1.0 if packed[0] else None if table is None else embedding_scale(table)
    if table is None or scale is None or not (packed[1] or (isinstance(head, nn.Linear) and is_plain(head))):
        raise ExportError(
            f"embedding_bits={bits}: a {type(table).__name__} and a {type(head).__name__} cannot be packed. Merge an "
            "adapter that holds them first; else leave embedding_bits out"
        )
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    places = {id(table): same_module_name(model, table), id(head): same_module_name(model, head)}
    twin = plain_forward_(copy.deepcopy(model, memo))
    config = GroupQuantConfig(bits=bits, group_size=_group(decoder, table.embedding_dim, bits))  # type: ignore[arg-type]
    tied = head.weight is table.weight
    if isinstance(table, nn.Embedding):
        rows = packed_table(table, config, scale)
        replace(twin, places[id(table)], rows)
    if isinstance(head, nn.Linear):
        replace(twin, places[id(head)], packed_head(head, config, rows if tied else None))
    return twin


def _group(decoder: nn.Module, width: int, bits: int) -> int:
    sizes = Counter(layer.group_size for layer in decoder.modules() if isinstance(layer, GroupQuantLinear))
    group = max(sizes, key=lambda size: sizes[size], default=_USUAL)
    while width % group and group > _SMALLEST:
        group //= 2
    if width % group:
        raise ExportError(
            f"embedding_bits={bits}: the embedding is {width} wide, which no group of {_SMALLEST} or more divides; "
            "leave embedding_bits out"
        )
    return group
