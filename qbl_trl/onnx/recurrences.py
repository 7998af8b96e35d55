"""Placeholders of convolutions and recurrences -> operators of ONNX Runtime, or standard ones.

| placeholder | fused | standard |
| --- | --- | --- |
| CausalConv over Concat(past, x) | CausalConvWithState | a sum of products |
| Recurrence | LinearAttention | Scan over the tokens |
| UnitLength | RMSNormalization: x / sqrt(sum x^2 + e) = x / sqrt(mean x^2 + e / d) / sqrt(d) | the same |

Padding leaves states as they are, on whichever side of a text it stands. (Where a layer has a bias in front of its
convolution, that is what the convolution reads of padding on the left: in the graph as in torch.)
"""

import numpy as np
import onnx_ir as ir
import torch

from qbl_trl.errors import ExportError
from qbl_trl.onnx.graph import MS_DOMAIN, Editor, attribute, constant_of, produced_by
from qbl_trl.onnx.markers import TRACE_DOMAIN
from qbl_trl.onnx.masks import Masks
from qbl_trl.onnx.shapes import spread

_EPSILON = 1e-6  # of models that norm queries and keys
_GATED = 5  # inputs of a recurrence that only decays; of others, the rate comes behind


def lower_recurrences(editor: Editor, fused: bool, provider: str) -> None:
    """Replace every placeholder.

    Raises:
        ExportError: if a convolution does not go on from a state of the cache.
    """
    nodes = {kind: list[ir.Node]() for kind in ("Text", "CausalConv", "Recurrence", "UnitLength")}
    for node in editor.graph:
        if node.domain == TRACE_DOMAIN and node.op_type in nodes:
            nodes[node.op_type].append(node)
    if not any(nodes.values()):
        return
    masks = Masks(editor)
    # The operator's kernel for CPUs takes twice as long as the products do, which have kernels in float32 alone.
    in_one = fused and not (provider == "cpu" and editor.dtype == torch.float32)
    for node in nodes["Text"]:
        _without_padding(editor, node, masks)
    for node in nodes["CausalConv"]:
        _convolution(editor, node, masks, in_one)
    for node in nodes["Recurrence"]:
        _recurrence(editor, node, masks, fused)
    for node in nodes["UnitLength"]:
        _unit_length(editor, node)


def _without_padding(editor: Editor, node: ir.Node, masks: Masks) -> None:
    x = node.inputs[0]
    zero = editor.constant(0, editor.float_type.numpy())
    kept = editor.add(node, "Where", [masks.is_text(), x, zero], like=x).outputs[0]
    kept.shape = None if x is None else x.shape
    for shape in [use.node for use in node.outputs[0].uses() if use.node.op_type == "Shape"]:
        for size in [use.node for use in shape.outputs[0].uses() if use.node.op_type == "Gather"]:
            index = constant_of(size.inputs[1])
            if index is not None and index.shape == () and index.item() in (0, 1):
                editor.replace(size.outputs[0], masks.sizes()[index.item()])
                editor.remove(size)
    editor.replace(node.outputs[0], kept)
    editor.remove(node)


def _unit_length(editor: Editor, node: ir.Node) -> None:
    width = attribute(node, "width")
    gain = editor.constant(np.full(width, width**-0.5), np.float32)
    norm = {"axis": -1, "epsilon": _EPSILON / width}
    y = editor.add(node, "RMSNormalization", [node.inputs[0], gain], norm, like=node.inputs[0]).outputs[0]
    editor.replace(node.outputs[0], y)
    editor.remove(node)


def _convolution(editor: Editor, node: ir.Node, masks: Masks, in_one: bool) -> None:
    """Tokens before channels, as layers and states have them; the model has them turned, and cuts off the past."""
    joined = produced_by(node.inputs[0], "Concat")
    cuts = [use.node for use in node.outputs[0].uses() if use.node.op_type == "Slice"]
    kept = [] if joined is None else [use.node for use in joined.outputs[0].uses() if use.node is not node]
    if joined is None or len(joined.inputs) != 2 or any(cut.op_type != "Slice" for cut in kept):
        raise ExportError(f"{node.name}: a convolution that does not go on from a cached state; nothing was written")
    past, x = (_turned(editor, node, value) for value in joined.inputs)
    whole = editor.add(node, "Concat", [past, x], {"axis": 1}, like=x).outputs[0]
    latest = _latest(editor, node, masks, whole, past)
    if in_one:
        y, state = _convolution_in_one(editor, node, past, x)
        # Past and present may be one buffer: what is written last has waited for the operator to read it.
        choice = [masks.ends_in_text(), state, latest]
        latest = editor.add(node, "Where", choice, name="state", like=x).outputs[0]
    else:
        y = _sum_of_products(editor, node, whole, x)
    y.type = y.type or node.outputs[0].type or ir.TensorType(editor.float_type)
    y.shape = ir.Shape(["batch_size", "sequence_length", past.shape[2]])  # type: ignore[index]
    following = [use.node for cut in cuts for turned in cut.outputs[0].uses() for use in turned.node.outputs[0].uses()]
    for old, new in (*((cut, y) for cut in cuts), *((cut, latest) for cut in kept)):
        _replace_turned(editor, old, new)
    for user in following:
        spread(user)
    if node.outputs[0].uses():  # an activation comes before the cut, which then leaves all as it is
        editor.replace(node.outputs[0], _turned(editor, node, y))
    editor.remove(node)


def _turned(editor: Editor, node: ir.Node, x: ir.Value | None) -> ir.Value:
    """(B, C, S) -> (B, S, C), as it was before the model turned it round."""
    before = None if x is None else x.producer()
    if before is not None and _turns(before) and before.inputs[0] is not None:
        return before.inputs[0]
    return editor.add(node, "Transpose", [x], {"perm": [0, 2, 1]}, like=x).outputs[0]


def _replace_turned(editor: Editor, old: ir.Node, new: ir.Value) -> None:
    """Put (B, S, C) in the place of what a node makes, (B, C, S)."""
    made = old.outputs[0]
    for user in [use.node for use in made.uses() if _turns(use.node)]:
        editor.replace(user.outputs[0], new)
        editor.remove(user)
    if made.uses():
        editor.replace(made, _turned(editor, old, new))
    editor.remove(old)


def _turns(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and not node.domain and list(attribute(node, "perm")) == [0, 2, 1]


def _latest(editor: Editor, node: ir.Node, masks: Masks, whole: ir.Value, past: ir.Value) -> ir.Value:
    """Of past and new inputs, (B, K - 1 + S, C), the last K - 1 up to the end of each row's text."""
    first = editor.constant(np.arange(_length(past))[None, :, None])
    places = editor.add(node, "Add", [masks.after_text(), first], name="state", like=first).outputs[0]
    return editor.add(node, "GatherND", [whole, places], {"batch_dims": 1}, name="state", like=past).outputs[0]


def _length(past: ir.Value) -> int:
    """K - 1 of a convolution's state."""
    return int(past.shape[1])  # type: ignore[index, arg-type]


def _convolution_in_one(editor: Editor, node: ir.Node, past: ir.Value, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The output and the next state, which does not know of padding."""
    weight = editor.add(node, "Unsqueeze", [node.inputs[1], editor.constant([1])], like=node.inputs[1]).outputs[0]
    attributes = {"activation": "silu" if attribute(node, "silu") else "none", "channels_last": 1}
    inputs = [x, weight, node.inputs[2] if len(node.inputs) > 2 else None, past]
    y, state = editor.add(node, "CausalConvWithState", inputs, attributes, domain=MS_DOMAIN, outputs=2, like=x).outputs
    return y, state


def _sum_of_products(editor: Editor, node: ir.Node, whole: ir.Value, x: ir.Value) -> ir.Value:
    """sum_j w_j x_{t - K + 1 + j}, the earlier tokens cut out of past and new inputs, (B, K - 1 + S, C)."""
    taps = attribute(node, "taps")
    weights, axis, terms = constant_of(node.inputs[1]), editor.constant([1]), list[ir.Value]()
    if weights is None:
        raise ExportError(f"{node.name}: a convolution whose weights are computed has no graph; nothing was written")
    for place in range(taps):
        earlier = x
        if place < taps - 1:
            span = [editor.constant([place]), editor.constant([place - taps + 1]), axis]
            earlier = editor.add(node, "Slice", [whole, *span], like=x).outputs[0]
        column = editor.constant(weights[:, place], weights.dtype)
        terms.append(editor.add(node, "Mul", [earlier, column], like=x).outputs[0])
    terms += node.inputs[2:3]
    while len(terms) > 1:  # in pairs, as sums round least
        pairs = [terms[start : start + 2] for start in range(0, len(terms), 2)]
        terms = [editor.add(node, "Add", pair, like=x).outputs[0] if len(pair) > 1 else pair[0] for pair in pairs]
    if not attribute(node, "silu"):
        return terms[0]
    gate = editor.add(node, "Sigmoid", terms, like=x).outputs[0]
    return editor.add(node, "Mul", [terms[0], gate], like=x).outputs[0]


def _recurrence(editor: Editor, node: ir.Node, masks: Masks, fused: bool) -> None:
    """Padding does not decay a state (e^0 = 1) nor add to it, at a rate of 0 or a value of 0."""
    query, key, value, decay, state, *beta = node.inputs
    text = masks.text()
    if attribute(node, "by_key"):
        decay = _flat(editor, node, decay)
    decay = editor.add(node, "Mul", [decay, text], like=decay).outputs[0]
    packed = [_flat(editor, node, x) for x in (query, key, value)]
    if beta:
        beta = [editor.add(node, "Mul", [beta[0], text], like=beta[0]).outputs[0]]
    else:
        packed[2] = editor.add(node, "Mul", [packed[2], text], like=value).outputs[0]
    y, after = (_linear_attention if fused else _scan)(editor, node, [*packed, state, decay, *beta])
    editor.replace(node.outputs[0], y)
    editor.replace(node.outputs[1], after)
    editor.remove(node)


def _flat(editor: Editor, node: ir.Node, x: ir.Value | None) -> ir.Value:
    """(B, S, heads, D) -> (B, S, heads * D), as it was before the model set heads apart."""
    apart = produced_by(x, "Reshape")
    before = None if apart is None else apart.inputs[0]
    if before is not None and before.shape is not None and len(before.shape) == 3:
        return before
    return editor.add(node, "Reshape", [x, editor.constant([0, 0, -1])], like=x).outputs[0]


def _linear_attention(editor: Editor, node: ir.Node, inputs: list[ir.Value | None]) -> tuple[ir.Value, ir.Value]:
    query_heads, _, heads = attribute(node, "heads")
    attributes = {
        "q_num_heads": query_heads,
        "kv_num_heads": heads,
        "scale": attribute(node, "scale"),
        "update_rule": "gated_delta" if len(inputs) > _GATED else "gated",
    }
    like = node.inputs[2]
    y, after = editor.add(node, "LinearAttention", inputs, attributes, domain=MS_DOMAIN, outputs=2, like=like).outputs
    apart = editor.constant([0, 0, heads, -1])
    return editor.add(node, "Reshape", [y, apart], like=like).outputs[0], after


def _scan(editor: Editor, node: ir.Node, inputs: list[ir.Value | None]) -> tuple[ir.Value, ir.Value]:
    """Token by token, each head for itself."""
    *packed, state, decay = inputs[:_GATED]
    counts, beta = attribute(node, "heads"), inputs[_GATED:]
    heads, like = counts[2], node.inputs[2]
    query, key, value = (_apart(editor, node, x, own, heads) for x, own in zip(packed, counts, strict=True))
    if attribute(node, "by_key"):
        decay = _apart(editor, node, decay, heads, heads)
    grows = editor.add(node, "Exp", [decay], like=like).outputs[0]
    missing = [-1] if attribute(node, "by_key") else [-1, -2]  # of (B, H, d_k, d_v)
    read, taken = [query, key, value, grows, *beta], ("query", "key", "value", "decay", "beta")
    body = _Body(f"{node.name}/token")
    before, *now = (body.input(name) for name in ("state", *taken[: len(read)]))
    q, k, v, kept, *rate = now
    column, row = editor.constant([-1]), editor.constant([-2])
    left = body.add("Mul", before, body.add("Unsqueeze", kept, editor.constant(missing)))
    if rate:  # what the state holds under this key is taken out of the value
        known = body.add("Squeeze", body.add("MatMul", body.add("Unsqueeze", k, row), left), row)
        v = body.add("Mul", body.add("Sub", v, known), body.add("Unsqueeze", rate[0], column))
    added = body.add("Mul", body.add("Unsqueeze", k, column), body.add("Unsqueeze", v, row))
    after = body.add("Add", left, added)
    y = body.add("Squeeze", body.add("MatMul", body.add("Unsqueeze", q, row), after), row)
    attributes = {
        "body": body.graph([after, y]),
        "num_scan_inputs": len(read),
        "scan_input_axes": [1] * len(read),
        "scan_output_axes": [1],
    }
    state, found = editor.add(node, "Scan", [state, *read], attributes, outputs=2, like=like).outputs
    scale = editor.constant(attribute(node, "scale"), np.float32)
    return editor.add(node, "Mul", [found, scale], like=like).outputs[0], state


def _apart(editor: Editor, node: ir.Node, x: ir.Value | None, own: int, heads: int) -> ir.Value:
    """(B, S, own * D) -> (B, S, heads, D): every head as often as others share it."""
    if own != heads:
        shared = editor.add(node, "Reshape", [x, editor.constant([0, 0, own, 1, -1])], like=x).outputs[0]
        often = editor.constant([1, 1, 1, heads // own, 1])
        x = editor.add(node, "Expand", [shared, often], like=x).outputs[0]
    return editor.add(node, "Reshape", [x, editor.constant([0, 0, heads, -1])], like=x).outputs[0]


class _Body:
    """The graph that a Scan runs for each token."""

    def __init__(self, name: str) -> None:
        self._kind, self._name = ir.TensorType(ir.DataType.FLOAT), name
        self._inputs: list[ir.Value] = []
        self._nodes: list[ir.Node] = []

    def input(self, name: str) -> ir.Value:
        self._inputs.append(ir.Value(name=f"{self._name}/{name}", type=self._kind))
        return self._inputs[-1]

    def add(self, op: str, *inputs: ir.Value) -> ir.Value:
        node = ir.node(op, inputs, name=f"{self._name}/{op}_{len(self._nodes)}")
        node.outputs[0].name, node.outputs[0].type = f"{node.name}/out", self._kind
        self._nodes.append(node)
        return node.outputs[0]

    def graph(self, outputs: list[ir.Value]) -> ir.Graph:
        return ir.Graph(self._inputs, outputs, nodes=self._nodes, name=self._name)
