"""Attention placeholders -> one of two fused operators.

| fused | operator | where |
| --- | --- | --- |
| "gqa" | GroupQueryAttention of ONNX Runtime, rotary inside | the faster one, and it can share the cache's buffer |
| "attention" | Attention and RotaryEmbedding of ONNX | any size of heads, any mask, any runtime |

Where the pattern around a placeholder is not the one expected, `Unfusable` is raised and the caller traces again with
standard operators.
"""

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qbl_trl.onnx.graph import Editor, attribute, constant_of, produced_by
from qbl_trl.onnx.group_query import check_group_query, group_query, takes_query_lengths, told_positions
from qbl_trl.onnx.markers import TRACE_DOMAIN
from qbl_trl.onnx.masks import Masks
from qbl_trl.onnx.rotary import table_rows
from qbl_trl.onnx.sites import Site, read_site, swaps_heads
from qbl_trl.onnx.skeleton import Skeleton, Unfusable

_SPARE_ROWS = 1024


def fuse_attention(
    editor: Editor, skeleton: Skeleton, kinds: tuple[str, ...], max_length: int, provider: str
) -> tuple[str, str]:
    """Replace every Attention placeholder by one operator, the first of `kinds` that fits all of them.

    Args:
        provider: whose GroupQueryAttention it would be: it may have to be told queries and positions.

    Returns:
        The kind taken, and why not the first.

    Raises:
        Unfusable: if none fits.
    """
    nodes = [node for node in editor.graph if node.op_type == "Attention" and node.domain == TRACE_DOMAIN]
    if not nodes:
        raise Unfusable("no attention of the model goes through transformers' attention interface")
    masks = Masks(editor)
    _turn_once(editor)
    sites = [read_site(editor, node) for node in nodes]
    query_lengths = takes_query_lengths(provider)
    kind, reason = _first_fitting(sites, skeleton, kinds, provider)
    for site in sites:
        tables = None if site.table is None else _tables(editor, site.table, skeleton, max_length)
        if kind == "gqa":
            told = query_lengths and told_positions(site)
            rows = _rows(editor, site.node, site.table, masks, skeleton) if told else None
            fused = group_query(editor, site, masks, tables, rows, query_lengths)
        else:
            fused = _attention(editor, site, masks, tables, skeleton)
        presents, sizes = (site.present_key, site.present_value), (site.head_size, site.value_size)
        for old, new, size in zip(presents, fused.outputs[1:], sizes, strict=True):
            editor.replace(old, new)  # once: layers that share keys and values have them from the same cache each
            new.shape = ir.Shape(["batch_size", site.kv_heads, "past_sequence_length + sequence_length", size])
        _attach_output(editor, site, fused.outputs[0])
    RemoveUnusedNodesPass()(editor.model)
    _rotate_apart(editor, masks, skeleton, max_length)
    RemoveUnusedNodesPass()(editor.model)
    for node in editor.graph:
        if node.domain == TRACE_DOMAIN and node.op_type in ("Rotary", "RotaryTable"):
            raise Unfusable(f"{node.name}: rotary embedding is used outside attention")
    return kind, reason


def _turn_once(editor: Editor) -> None:
    """Take away what swaps tokens and heads twice: a model that rotates before it does, and the placeholder after."""
    for node in [node for node in editor.graph if swaps_heads(node)]:
        before = produced_by(node.inputs[0], "Transpose")
        if before is not None and swaps_heads(before) and before.inputs[0] is not None:
            editor.replace(node.outputs[0], before.inputs[0])


def _first_fitting(sites: list[Site], skeleton: Skeleton, kinds: tuple[str, ...], provider: str) -> tuple[str, str]:
    """The first kind that fits every place, and why those before it do not; Unfusable if none does."""
    reasons: list[str] = []
    for kind in kinds:
        try:
            for site in sites:
                if kind == "gqa":
                    check_group_query(site, skeleton, provider)
                else:
                    _check_attention(site, [other for other in sites if other.present_key is site.present_key])
        except Unfusable as refusal:
            reasons.append(str(refusal))
        else:
            return kind, "; ".join(reasons)
    raise Unfusable("; ".join(reasons))


def _check_attention(site: Site, sharing: list[Site]) -> None:
    if len(sharing) > 1:
        raise Unfusable(f"{site.node.name}: the Attention operator has no keys and values of another layer")
    if site.sink is not None:
        raise Unfusable(f"{site.node.name}: the Attention operator has no attention sinks")


def _rotate_apart(editor: Editor, masks: Masks, skeleton: Skeleton, max_length: int) -> None:
    """Rotations that no attention has taken in, because something lies between (norms of the heads, in HunYuan)."""
    for node in [node for node in editor.graph if node.domain == TRACE_DOMAIN and node.op_type == "Rotary"]:
        table = produced_by(node.inputs[1], "RotaryTable", TRACE_DOMAIN)
        if table is None:
            raise Unfusable(f"{node.name}: rotary embedding is used outside attention")
        tables = _tables(editor, table, skeleton, max_length)
        rows = _rows(editor, node, table, masks, skeleton)
        # All features are turned: those that are not were cut off before.
        pairs = {"interleaved": int(attribute(node, "interleaved"))}
        turned = editor.add(node, "RotaryEmbedding", [node.inputs[0], *tables, rows], pairs, like=node.outputs[0])
        turned.outputs[0].shape = node.outputs[0].shape
        editor.replace(node.outputs[0], turned.outputs[0])
        editor.remove(node)


def _attention(
    editor: Editor, site: Site, masks: Masks, tables: tuple[ir.Value, ir.Value] | None, skeleton: Skeleton
) -> ir.Node:
    query, key = site.query, site.key
    if tables is not None:
        positions = _rows(editor, site.node, site.table, masks, skeleton)
        width = 2 * int(tables[0].shape[-1])  # type: ignore[index, arg-type]
        partial = {} if width == site.head_size else {"rotary_embedding_dim": width}
        if site.interleaved:
            partial["interleaved"] = 1
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
    inputs = [query, key, site.value, masks.causal(site.window, site.bias), site.past_key, site.past_value]
    return editor.add(site.node, "Attention", inputs, attributes, outputs=3, like=site.past_value)


def _rows(editor: Editor, at: ir.Node, table: ir.Node | None, masks: Masks, skeleton: Skeleton) -> ir.Value:
    """Which rows of the rotary tables the new tokens read, (B, S)."""
    if table is None:
        raise Unfusable(f"{at.name}: nothing is rotated")
    rotary = skeleton.rotary[attribute(table, "name")]
    return table_rows(editor, at, masks.positions(table.inputs[1]), rotary)


def _attach_output(editor: Editor, site: Site, attended: ir.Value) -> None:
    """Users of the placeholder see (B, S, H, D); those that only merge the heads again take the flat result."""
    old = site.node.outputs[0]
    for there in [user for user, _ in old.uses() if swaps_heads(user)]:  # and back: the model wants heads first
        for back in [user for user, _ in there.outputs[0].uses() if swaps_heads(user)]:
            editor.replace(back.outputs[0], old)
    for user, _ in list(old.uses()):
        if user.op_type == "Reshape" and not user.domain and _merges_heads(user):
            editor.replace(user.outputs[0], attended)
    if old.uses():
        target = editor.constant([0, 0, -1, site.value_size])
        editor.replace(old, editor.add(site.node, "Reshape", [attended, target], like=attended).outputs[0])
    editor.remove(site.node)


def _merges_heads(reshape: ir.Node) -> bool:
    """(B, S, H, D) -> a rank 3 shape that ends in -1, or in a known size: the model's own merge of heads."""
    known, target = constant_of(reshape.inputs[1]), produced_by(reshape.inputs[1], "Concat")
    if known is not None:
        return known.size == 3
    if target is None or len(target.inputs) != 3:
        return False
    last = constant_of(target.inputs[2])
    return last is not None and last.size == 1


def _tables(editor: Editor, table: ir.Node, skeleton: Skeleton, max_length: int) -> tuple[ir.Value, ir.Value]:
    name = attribute(table, "name")
    rotary = skeleton.rotary[name]
    # GroupQueryAttention wants a row for every place of the cache, padding included.
    length = max_length + min(max_length, _SPARE_ROWS)
    shape = (rotary.rows(length), rotary.width // 2)

    def read(which: int) -> torch.Tensor:
        return rotary.angles(length)[which]

    cos = editor.weight(f"{name}.cos", shape, editor.dtype, lambda: read(0))
    sin = editor.weight(f"{name}.sin", shape, editor.dtype, lambda: read(1))
    return cos, sin
