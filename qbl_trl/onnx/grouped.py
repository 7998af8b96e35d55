"""One token over a growing cache: query heads are rows of one product, one for each that shares a key head.

Wherever past and present are two buffers, as in ORTModelForCausalLM, GroupQueryAttention clears the present and copies
the cache once for every query head. For a single token the H query heads are G = H / KV rows to each of the KV key
heads, with nothing between them to hide, so that standard operators do the same with one copy:

    K = [past_K, k]    V = [past_V, v]                       (B, KV, T, D)
    y = softmax(scale * q K' + mask) V                       q, y (B, KV, G, D),  mask (B, 1, 1, T)

An If chooses at every step, by lengths alone: one new token, and a past that is shorter than the text by just that
token. Prompts, and buffers that past and present share, stay with GroupQueryAttention. ONNX Runtime GenAI, which shares
them, reads a graph without the choice (`right_padding.py`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch

from qbl_trl.onnx.choices import GROUPED, WHOLE
from qbl_trl.onnx.gqa import Input
from qbl_trl.onnx.graph import MS_DOMAIN, Editor, attribute
from qbl_trl.onnx.masks import BIASED, Masks


def add_grouped_steps(editor: Editor) -> int:
    """Give every GroupQueryAttention the choice, in place; returns how many there are."""
    found = [node for node in editor.graph if node.op_type == "GroupQueryAttention" and node.domain == MS_DOMAIN]
    if not found:
        return 0
    masks = Masks(editor)
    grows = masks.grows_by_one(_past(found[0])[0])
    for node in found:
        _choose(editor, node, grows, _grouped(editor, node, masks))
    return len(found)


def _past(node: ir.Node) -> tuple[ir.Value, ir.Value]:
    """Keys and values of the cache."""
    key, value = node.inputs[Input.PAST_KEY : Input.PAST_VALUE + 1]
    if key is None or value is None:
        raise TypeError(f"{node.name}: attention without a cache")
    return key, value


class _Body:
    """Nodes of a subgraph, which read the values of the graph around it."""

    def __init__(self, node: ir.Node) -> None:
        self.node, self.nodes = node, list[ir.Node]()

    def add(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        domain: str = "",
        outputs: int = 1,
    ) -> Sequence[ir.Value]:
        label = f"{self.node.name}/step/{op}_{len(self.nodes)}"
        made = ir.node(op, inputs, attributes or {}, domain=domain, num_outputs=outputs, name=label)
        for index, value in enumerate(made.outputs):
            value.name, value.type = f"{label}/out_{index}", self.node.outputs[0].type
        self.nodes.append(made)
        return made.outputs

    def graph(self, name: str, outputs: Sequence[ir.Value]) -> ir.Graph:
        return ir.Graph([], list(outputs), nodes=self.nodes, name=f"{self.node.name}/{name}")


def _grouped(editor: Editor, node: ir.Node, masks: Masks) -> ir.Graph:
    """The branch for one token: output, present keys, present values."""
    body, constant = _Body(node), editor.constant
    past_key, past_value = _past(node)
    heads, kv_heads, size = attribute(node, "num_heads"), attribute(node, "kv_num_heads"), int(past_key.shape[3])  # type: ignore[index, arg-type]
    query, key, value = _heads(editor, body, masks, heads, kv_heads, size)
    query = body.add("Reshape", [query, constant([0, kv_heads, heads // kv_heads, size])])[0]
    keys = body.add("Concat", [past_key, key], {"axis": 2})[0]
    values = body.add("Concat", [past_value, value], {"axis": 2})[0]
    scale, cap = attribute(node, "scale"), _optional(node, "softcap")
    scores = body.add("FusedMatMul", [query, keys], {"transB": 1, "alpha": scale / (cap or 1.0)}, MS_DOMAIN)[0]
    if cap:
        depth = editor.weight(f"attention.softcap.{cap}", (), editor.dtype, lambda: torch.tensor(cap))
        scores = body.add("Mul", [body.add("Tanh", [scores])[0], depth])[0]
    for mask in _masks(editor, body, masks, (kv_heads, heads // kv_heads)):
        scores = body.add("Add", [scores, mask])[0]
    weights = _weights(editor, body, masks, scores, (kv_heads, heads // kv_heads))
    attended = body.add("MatMul", [weights, values])[0]
    flat = body.add("Reshape", [attended, constant([0, 1, heads * size])])[0]
    return body.graph(GROUPED, [flat, keys, values])


def _masks(editor: Editor, body: _Body, masks: Masks, heads: tuple[int, int]) -> list[ir.Value]:
    """What is added to the scores of a single token."""
    window, bias = int(_optional(body.node, "local_window_size")), body.node.inputs[Input.BIAS]
    if bias is None or not (bias.name or "").startswith(BIASED):
        return [masks.step(window)]
    biased = body.add("Reshape", [bias, editor.constant([0, *heads, -1])])[0]  # it holds padding too
    return [biased, masks.step(window)] if window else [biased]


def _weights(editor: Editor, body: _Body, masks: Masks, scores: ir.Value, heads: tuple[int, int]) -> ir.Value:
    """Softmax of scores (B, KV, G, T); beside a sink, where there is one, whose own weight is dropped."""
    sink = body.node.inputs[Input.SINK] if len(body.node.inputs) > Input.SINK else None
    if sink is None:
        return body.add("Softmax", [scores], {"axis": -1})[0]
    column = body.add("Reshape", [sink, editor.constant([1, *heads, 1])])[0]
    column = body.add("Expand", [column, masks.rows()])[0]
    scores = body.add("Concat", [scores, column], {"axis": -1})[0]
    ends = [editor.constant([end]) for end in (0, -1, 3)]
    return body.add("Slice", [body.add("Softmax", [scores], {"axis": -1})[0], *ends])[0]


def _heads(
    editor: Editor, body: _Body, masks: Masks, heads: int, kv_heads: int, size: int
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Rotated query and key, and value, (B, heads of each, 1, D)."""
    node, constant = body.node, editor.constant
    query, key, value = node.inputs[:3]
    if key is None:  # packed
        query = body.add("Reshape", [query, constant([0, heads + 2 * kv_heads, 1, size])])[0]
        if node.inputs[Input.COS] is None:
            parts = constant([heads, kv_heads, kv_heads])
            query, key, value = body.add("Split", [query, parts], {"axis": 1}, outputs=3)
            return query, key, value
        rotated, value = body.add("Split", [query, constant([heads + kv_heads, kv_heads])], {"axis": 1}, outputs=2)
        rotated = _rotate(body, masks, rotated, size)
        query, key = body.add("Split", [rotated, constant([heads, kv_heads])], {"axis": 1}, outputs=2)
        return query, key, value
    query = body.add("Reshape", [query, constant([0, heads, 1, size])])[0]
    key = body.add("Reshape", [key, constant([0, kv_heads, 1, size])])[0]
    value = body.add("Reshape", [value, constant([0, kv_heads, 1, size])])[0]
    return _rotate(body, masks, query, size), _rotate(body, masks, key, size), value


def _rotate(body: _Body, masks: Masks, value: ir.Value, size: int) -> ir.Value:
    cos, sin = body.node.inputs[Input.COS : Input.SIN + 1]
    if cos is None or cos.shape is None:
        return value
    told = body.node.inputs[Input.POSITIONS]
    positions = masks.last_place() if told is None else told  # untold, the operator counts the cache
    width = 2 * int(cos.shape[-1])  # type: ignore[arg-type]
    partial = {} if width == size else {"rotary_embedding_dim": width}
    if _optional(body.node, "rotary_interleaved"):
        partial["interleaved"] = 1
    return body.add("RotaryEmbedding", [value, cos, sin, positions], partial)[0]


def _choose(editor: Editor, node: ir.Node, condition: ir.Value, then: ir.Graph) -> None:
    """If(condition): `then`, else the node as it is."""
    body = _Body(node)
    same = body.add(node.op_type, list(node.inputs), dict(node.attributes), node.domain, outputs=3)
    branches = {"then_branch": then, "else_branch": body.graph(WHOLE, same)}
    chosen = editor.add(node, "If", [condition], branches, name=node.name, outputs=3, like=node.outputs[0])
    for old, new in zip(node.outputs, chosen.outputs, strict=True):
        new.shape = old.shape
        editor.replace(old, new)
    editor.remove(node)


def _optional(node: ir.Node, name: str) -> float:
    held = node.attributes.get(name)
    return 0.0 if held is None else float(held.value)
