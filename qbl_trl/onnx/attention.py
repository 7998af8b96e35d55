"""Attention placeholders: what each one computes, found in the traced graph, and the two fused operators for it.

| fused | operator | where |
| --- | --- | --- |
| "attention" | Attention and RotaryEmbedding of ONNX | CPU: faster there, takes any mask |
| "gqa" | GroupQueryAttention of ONNX Runtime, rotary inside | CUDA, and whoever shares the cache's buffer |

Where the pattern around a placeholder is not the one expected, `Unfusable` is raised and the caller traces again with
standard operators.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qbl_trl.onnx.graph import MS_DOMAIN, Editor, attribute, constant_of, produced_by
from qbl_trl.onnx.markers import TRACE_DOMAIN
from qbl_trl.onnx.masks import Masks
from qbl_trl.onnx.rotary import table_rows
from qbl_trl.onnx.skeleton import Skeleton, Unfusable


@dataclass(frozen=True)
class Site:
    """One attention of the model.

    Attributes:
        query, key, value: before rotation, (B, S, heads * head_size).
        past_key, past_value: graph inputs (B, kv_heads, P, head_size); present_*: the graph outputs to replace.
        table: the RotaryTable placeholder, or None.
        window: keys a query sees, itself included; 0 for all.
        softcap: 0 for none.
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
    heads: int
    kv_heads: int
    head_size: int
    scale: float
    window: int
    softcap: float


def fuse_attention(editor: Editor, skeleton: Skeleton, kind: str, max_length: int) -> None:
    """Replace every Attention placeholder by the operator of `kind`.

    Raises:
        Unfusable: if one does not match.
    """
    nodes = [node for node in editor.graph if node.op_type == "Attention" and node.domain == TRACE_DOMAIN]
    if not nodes:
        raise Unfusable("the model's attention does not go through transformers' attention interface")
    masks = Masks(editor)
    for node in nodes:
        site = _site(editor, node)
        tables = None if site.table is None else _tables(editor, site.table, skeleton, max_length)
        if kind == "gqa":
            _check_group_query(site, skeleton)
            fused = _group_query(editor, site, masks, tables)
        else:
            fused = _attention(editor, site, masks, tables, skeleton)
        for old, new in zip((site.present_key, site.present_value), fused.outputs[1:], strict=True):
            editor.replace(old, new)
            new.shape = ir.Shape(
                ["batch_size", site.kv_heads, "past_sequence_length + sequence_length", site.head_size]
            )
        _attach_output(editor, site, fused.outputs[0])
    RemoveUnusedNodesPass()(editor.model)
    for node in editor.graph:
        if node.domain == TRACE_DOMAIN and node.op_type in ("Rotary", "RotaryTable"):
            raise Unfusable(f"{node.name}: rotary embedding is used outside attention")


def _attention(
    editor: Editor, site: Site, masks: Masks, tables: tuple[ir.Value, ir.Value] | None, skeleton: Skeleton
) -> ir.Node:
    query, key = site.query, site.key
    if tables is not None and site.table is not None:
        rotary = skeleton.rotary[attribute(site.table, "name")]
        positions = table_rows(editor, site.node, masks.positions(site.table.inputs[1]), rotary)
        width = 2 * int(tables[0].shape[-1])  # type: ignore[index, arg-type]
        partial = {} if width == site.head_size else {"rotary_embedding_dim": width}
        query, key = (
            editor.add(
                site.node, "RotaryEmbedding", [value, *tables, positions], {"num_heads": heads, **partial}, like=value
            ).outputs[0]
            for value, heads in ((query, site.heads), (key, site.kv_heads))
        )
    attributes: dict[str, float | int] = {
        "q_num_heads": site.heads,
        "kv_num_heads": site.kv_heads,
        "scale": site.scale,
    }
    if site.softcap:
        attributes["softcap"] = site.softcap
    inputs = [query, key, site.value, masks.causal(site.window), site.past_key, site.past_value]
    return editor.add(site.node, "Attention", inputs, attributes, outputs=3, like=site.past_value)


def _check_group_query(site: Site, skeleton: Skeleton) -> None:
    """What ONNX Runtime asks of the sizes, and what an operator that counts positions itself cannot do."""
    if site.head_size % 8:
        raise Unfusable(f"{site.node.name}: GroupQueryAttention needs heads of a multiple of 8, not {site.head_size}")
    rotary = None if site.table is None else skeleton.rotary[attribute(site.table, "name")]
    if rotary is not None and rotary.width % 16:
        raise Unfusable(
            f"{site.node.name}: GroupQueryAttention rotates a multiple of 16 features, not {rotary.width} of a head"
        )
    if rotary is not None and rotary.switch:
        raise Unfusable(
            f"{site.node.name}: rotary angles of longrope change once a text is longer than {rotary.switch}"
        )


def _group_query(editor: Editor, site: Site, masks: Masks, tables: tuple[ir.Value, ir.Value] | None) -> ir.Node:
    """Causal by itself; tokens are rotated by their place in the cache.

    Rotation is relative, so a row padded on the left is only shifted as a whole. (The operator has an input for
    positions, but ONNX Runtime 1.32 does not read it on CPU when one token is decoded.) Padding is an attention bias;
    seqlens_k counts all of the cache, padding included.
    """
    attributes: dict[str, float | int] = {
        "num_heads": site.heads,
        "kv_num_heads": site.kv_heads,
        "scale": site.scale,
        "do_rotary": int(tables is not None),
    }
    if site.window:  # both count the token itself
        attributes["local_window_size"] = site.window
    if site.softcap:
        attributes["softcap"] = site.softcap
    cos, sin = tables or (None, None)
    lengths = masks.lengths()
    inputs = [site.query, site.key, site.value, site.past_key, site.past_value, *lengths, cos, sin, None]
    return editor.add(
        site.node,
        "GroupQueryAttention",
        [*inputs, masks.padding()],
        attributes,
        domain=MS_DOMAIN,
        outputs=3,
        like=site.past_value,
    )


def _site(editor: Editor, node: ir.Node) -> Site:
    query, key, value = node.inputs
    if query is None or key is None or value is None:
        raise Unfusable(f"{node.name}: an input is missing")
    past_key, key_now = _cache(node, key)
    past_value, value_now = _cache(node, value)
    query, table = _unrotated(query)
    key_now, key_table = _unrotated(key_now)
    if table is not key_table:
        raise Unfusable(f"{node.name}: queries and keys are rotated differently")
    heads, kv_heads, head_size = attribute(node, "heads"), _size(past_value, 1), _size(past_value, 3)
    if _size(past_key, 3) != head_size:
        raise Unfusable(f"{node.name}: keys and values have heads of different sizes")
    return Site(
        node=node,
        query=_flat(editor, node, query, heads * head_size),
        key=_flat(editor, node, key_now, kv_heads * head_size),
        value=_flat(editor, node, value_now, kv_heads * head_size),
        past_key=past_key,
        past_value=past_value,
        present_key=key,
        present_value=value,
        table=table,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        scale=attribute(node, "scale"),
        window=attribute(node, "window"),
        softcap=attribute(node, "softcap"),
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
    rotary = produced_by(value, "Rotary", TRACE_DOMAIN)
    if rotary is None or rotary.inputs[0] is None:
        return value, None
    table = produced_by(rotary.inputs[1], "RotaryTable", TRACE_DOMAIN)
    if table is None:
        raise Unfusable(f"{rotary.name}: its angles are not those of the model's rotary embedding")
    return rotary.inputs[0], table


def _flat(editor: Editor, node: ir.Node, value: ir.Value, width: int) -> ir.Value:
    """(B, H, S, D) -> (B, S, width = H * D), undoing the model's own reshape where there is one."""
    transpose = produced_by(value, "Transpose")
    if transpose is not None and list(attribute(transpose, "perm")) == [0, 2, 1, 3]:
        split = transpose.inputs[0]
        reshape = produced_by(split, "Reshape")
        source = None if reshape is None else reshape.inputs[0]
        if source is not None and source.shape is not None and len(source.shape) == 3 and source.shape[2] == width:
            return source
    else:
        split = editor.add(node, "Transpose", [value], {"perm": [0, 2, 1, 3]}, like=value).outputs[0]
    return editor.add(node, "Reshape", [split, editor.constant([0, 0, width])], like=value).outputs[0]


def _attach_output(editor: Editor, site: Site, attended: ir.Value) -> None:
    """Users of the placeholder see (B, S, H, D); those that only merge the heads again take the flat result."""
    old = site.node.outputs[0]
    for user, _ in list(old.uses()):
        if user.op_type == "Reshape" and not user.domain and _merges_heads(user):
            editor.replace(user.outputs[0], attended)
    if old.uses():
        target = editor.constant([0, 0, -1, site.head_size])
        editor.replace(old, editor.add(site.node, "Reshape", [attended, target], like=attended).outputs[0])
    editor.remove(site.node)


def _merges_heads(reshape: ir.Node) -> bool:
    """(B, S, H, D) -> a rank 3 shape that ends in -1, or in a known size: the model's own merge of heads."""
    target = produced_by(reshape.inputs[1], "Concat")
    if target is None or len(target.inputs) != 3:
        return False
    last = constant_of(target.inputs[2])
    return last is not None and last.size == 1


def _tables(editor: Editor, table: ir.Node, skeleton: Skeleton, max_length: int) -> tuple[ir.Value, ir.Value]:
    name = attribute(table, "name")
    rotary = skeleton.rotary[name]
    half = rotary.width // 2
    shape = (rotary.rows(max_length), half)

    def read(which: int) -> torch.Tensor:
        return rotary.read(max_length)[which][:, :half]

    cos = editor.weight(f"{name}.cos", shape, editor.dtype, lambda: read(0))
    sin = editor.weight(f"{name}.sin", shape, editor.dtype, lambda: read(1))
    return cos, sin


def _size(value: ir.Value, axis: int) -> int:
    size = None if value.shape is None else value.shape[axis]
    if not isinstance(size, (int, np.integer)):
        raise Unfusable(f"{value.name}: axis {axis} has no fixed size")
    return int(size)
