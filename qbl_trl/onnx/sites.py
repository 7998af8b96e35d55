"""What an attention placeholder computes, read from the traced graph around it."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qbl_trl.onnx.graph import Editor, attribute, constant_of, produced_by
from qbl_trl.onnx.markers import TRACE_DOMAIN
from qbl_trl.onnx.skeleton import Unfusable


@dataclass(frozen=True)
class Bias:
    """What every head adds to the scores of its keys, `scale` times `value` (B or 1 times heads, 1, T or more).

    Where there are more, the keys are the last of so many.
    """

    value: ir.Value
    heads: int
    scale: float


@dataclass(frozen=True)
class Site:
    """One attention of the model.

    Attributes:
        query, key, value: before rotation, (B, S, heads * head_size), that of values (B, S, kv_heads * value_size).
        past_key, past_value: graph inputs (B, kv_heads, P, size); present_*: the graph outputs to replace.
        table: the RotaryTable placeholder of its cosines, or None.
        interleaved: features are rotated in pairs of neighbours.
        window: keys a query sees, itself included; 0 for all.
        softcap: 0 for none.
        sink: (heads,), a score of each head beside those of the keys, whose weight goes nowhere; None for none.
        bias: of the scores; None for none.
    """

    node: ir.Node
    query: ir.Value
    key: ir.Value
    value: ir.Value
    past_key: ir.Value
    past_value: ir.Value
    present_key: ir.Value
    present_value: ir.Value
    table: ir.Node | None
    interleaved: bool
    heads: int
    kv_heads: int
    head_size: int
    value_size: int
    scale: float
    window: int
    softcap: float
    sink: ir.Value | None
    bias: Bias | None


def read_site(editor: Editor, node: ir.Node) -> Site:
    """The attention of one placeholder.

    Raises:
        Unfusable: if the graph around it is not the one expected.
    """
    query, key, value, *others = node.inputs
    given = dict(zip(str(attribute(node, "given")).split(), others, strict=True))
    bias = given.get("bias")
    if query is None or key is None or value is None:
        raise Unfusable(f"{node.name}: an input is missing")
    past_key, key_now = _cache(node, key)
    past_value, value_now = _cache(node, value)
    (whole_query, rotary), (whole_key, key_rotary) = _unrotated(query), _unrotated(key_now)
    table = _table(rotary)
    if table is _table(key_rotary):
        query, key_now = whole_query, whole_key
    elif table is None or key_rotary is None:  # one is scaled since then (Ministral 3): both are rotated apart
        rotary = table = None
    else:
        raise Unfusable(f"{node.name}: queries and keys are rotated differently")
    heads, kv_heads = attribute(node, "heads"), _size(past_value, 1)
    head_size, value_size = _size(past_key, 3), _size(past_value, 3)
    return Site(
        node=node,
        query=_flat(editor, node, query, heads * head_size),
        key=_flat(editor, node, key_now, kv_heads * head_size),
        value=_flat(editor, node, value_now, kv_heads * value_size),
        past_key=past_key,
        past_value=past_value,
        present_key=key,
        present_value=value,
        table=table,
        interleaved=rotary is not None and bool(attribute(rotary, "interleaved")),
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        value_size=value_size,
        scale=attribute(node, "scale"),
        window=attribute(node, "window"),
        softcap=attribute(node, "softcap"),
        sink=given.get("sink"),
        bias=None if bias is None else Bias(bias, heads, attribute(node, "bias_scale")),
    )


def _cache(node: ir.Node, value: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(past, new) of keys or values: present = Concat(past, new)."""
    concat = produced_by(value, "Concat")
    if concat is None or len(concat.inputs) != 2:
        raise Unfusable(f"{node.name}: keys or values do not come straight from the cache")
    past, now = concat.inputs
    if past is None or now is None or not past.is_graph_input():
        raise Unfusable(f"{node.name}: keys or values do not come straight from the cache")
    return past, now


def _unrotated(value: ir.Value) -> tuple[ir.Value, ir.Node | None]:
    """What is rotated, and the placeholder that does it; the first features of each head alone may be."""
    joined = produced_by(value, "Concat")
    parts = list(joined.inputs) if joined is not None else [value]
    rotary = produced_by(parts[0], "Rotary", TRACE_DOMAIN)
    if rotary is None or rotary.inputs[0] is None:
        return value, None
    if len(parts) == 1:
        return rotary.inputs[0], rotary
    pieces = [produced_by(piece, "Slice") for piece in (rotary.inputs[0], *parts[1:])]
    whole = None if pieces[0] is None else pieces[0].inputs[0]
    if whole is None or attribute(joined, "axis") not in (-1, 3) or not _follow(pieces, whole):  # type: ignore[arg-type]
        raise Unfusable(f"{rotary.name}: what is rotated is not the first part of each head")
    return whole, rotary


def _follow(pieces: list[ir.Node | None], whole: ir.Value) -> bool:
    """Whether slices along the last axis of four, laid end to end, are the value they are cut from."""
    end = 0
    for piece in pieces:
        if piece is None or piece.inputs[0] is not whole:
            return False
        start, stop, axis, *step = (constant_of(value) for value in piece.inputs[1:])
        if start is None or stop is None or axis is None or axis.item() not in (-1, 3) or start.item() != end:
            return False
        if step and (step[0] is None or step[0].item() != 1):
            return False
        end = stop.item()
    size = None if whole.shape is None else whole.shape[-1]
    return end == size or end >= 2**31 - 1


def _table(rotary: ir.Node | None) -> ir.Node | None:
    if rotary is None:
        return None
    table = produced_by(rotary.inputs[1], "RotaryTable", TRACE_DOMAIN)
    if table is None:
        raise Unfusable(f"{rotary.name}: its angles are not those of the model's rotary embedding")
    return table


def _flat(editor: Editor, node: ir.Node, value: ir.Value, width: int) -> ir.Value:
    """(B, H, S, D) -> (B, S, width = H * D), undoing the model's own reshape where there is one."""
    split = _tokens_first(editor, node, value)
    if split is None:
        split = editor.add(node, "Transpose", [value], {"perm": [0, 2, 1, 3]}, like=value).outputs[0]
    reshape = produced_by(split, "Reshape")
    source = None if reshape is None else reshape.inputs[0]
    if source is not None and source.shape is not None and len(source.shape) == 3 and source.shape[2] == width:
        return source
    return editor.add(node, "Reshape", [split, editor.constant([0, 0, width])], like=value).outputs[0]


def swaps_heads(node: ir.Node) -> bool:
    """Whether a node turns (B, S, H, D) to (B, H, S, D), or back."""
    return node.op_type == "Transpose" and not node.domain and list(attribute(node, "perm")) == [0, 2, 1, 3]


def _tokens_first(editor: Editor, node: ir.Node, value: ir.Value) -> ir.Value | None:
    """(B, S, H, D) of what was turned to (B, H, S, D); where each head was normed or cut since, that is done again."""
    turned = value.producer()
    if turned is None or turned.inputs[0] is None:
        return None
    if swaps_heads(turned):
        return turned.inputs[0]
    axes = constant_of(turned.inputs[3]) if turned.op_type == "Slice" and len(turned.inputs) > 3 else None
    if (turned.domain, turned.op_type) != (TRACE_DOMAIN, "Norm") and (axes is None or axes.tolist() not in ([-1], [3])):
        return None
    whole = _tokens_first(editor, node, turned.inputs[0])
    if whole is None:
        return None
    inputs = [whole, *turned.inputs[1:]]
    return editor.add(node, turned.op_type, inputs, turned.attributes, domain=turned.domain, like=value).outputs[0]


def _size(value: ir.Value, axis: int) -> int:
    size = None if value.shape is None else value.shape[axis]
    if not isinstance(size, (int, np.integer)):
        raise Unfusable(f"{value.name}: axis {axis} has no fixed size")
    return int(size)
