"""Placeholders of convolutions and recurrences -> operators of ONNX Runtime, or standard ones.

| placeholder | fused | standard |
| --- | --- | --- |
| CausalConv over Concat(past, x) | CausalConvWithState, which gives the next state, too | Conv |
| Recurrence | LinearAttention | Scan over the tokens |
| UnitLength | RMSNormalization: x / sqrt(sum x^2 + e) = x / sqrt(mean x^2 + e / d) / sqrt(d) | the same |
"""

import numpy as np
import onnx_ir as ir

from qbl_trl.errors import ExportError
from qbl_trl.onnx.graph import MS_DOMAIN, Editor, attribute, produced_by
from qbl_trl.onnx.markers import TRACE_DOMAIN

_EPSILON = 1e-6  # of models that norm queries and keys


def lower_recurrences(editor: Editor, fused: bool) -> None:
    """Replace every placeholder.

    Raises:
        ExportError: if a convolution does not go on from a state of the cache.
    """
    for node in [node for node in editor.graph if node.domain == TRACE_DOMAIN]:
        if node.op_type == "CausalConv":
            _convolution(editor, node, fused)
        elif node.op_type == "Recurrence":
            _fused_recurrence(editor, node) if fused else _scan(editor, node)
        elif node.op_type == "UnitLength":
            width = attribute(node, "width")
            gain = editor.constant(np.full(width, width**-0.5), np.float32)
            norm = {"axis": -1, "epsilon": _EPSILON / width}
            y = editor.add(node, "RMSNormalization", [node.inputs[0], gain], norm, like=node.inputs[0]).outputs[0]
            editor.replace(node.outputs[0], y)
            editor.remove(node)


def _convolution(editor: Editor, node: ir.Node, fused: bool) -> None:
    """The model cuts the tokens of the past off what is convolved; the operators never make them."""
    joined = produced_by(node.inputs[0], "Concat")
    cuts = [use.node for use in node.outputs[0].uses()]
    if joined is None or len(joined.inputs) != 2 or any(cut.op_type != "Slice" for cut in cuts):
        raise ExportError(f"{node.name}: a convolution that does not go on from a cached state; nothing was written")
    past, x = joined.inputs
    weight = editor.add(node, "Unsqueeze", [node.inputs[1], editor.constant([1])], like=node.inputs[1]).outputs[0]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if fused:
        activation = {"activation": "silu" if attribute(node, "silu") else "none"}
        made = editor.add(
            node, "CausalConvWithState", [x, weight, bias, past], activation, domain=MS_DOMAIN, outputs=2, like=x
        )
        y = made.outputs[0]
        for use in list(joined.outputs[0].uses()):
            if use.node is not node and use.node.op_type == "Slice":
                editor.replace(use.node.outputs[0], made.outputs[1])
    else:
        channels = {"group": int(node.inputs[1].shape[0])}  # type: ignore[union-attr, index, arg-type]
        inputs = [joined.outputs[0], weight, *([] if bias is None else [bias])]
        y = editor.add(node, "Conv", inputs, channels, like=x).outputs[0]
        if attribute(node, "silu"):
            gate = editor.add(node, "Sigmoid", [y], like=x).outputs[0]
            y = editor.add(node, "Mul", [y, gate], like=x).outputs[0]
    y.shape = x.shape  # type: ignore[union-attr]
    for cut in cuts:
        editor.replace(cut.outputs[0], y)
        editor.remove(cut)
    editor.remove(node)


def _fused_recurrence(editor: Editor, node: ir.Node) -> None:
    """Heads side by side in one axis, as the operator takes them."""
    query, key, value, decay, state, *beta = node.inputs
    flat = editor.constant([0, 0, -1])
    packed = [editor.add(node, "Reshape", [x, flat], like=x).outputs[0] for x in (query, key, value)]
    if attribute(node, "by_key"):
        decay = editor.add(node, "Reshape", [decay, flat], like=decay).outputs[0]
    query_heads, _, heads = attribute(node, "heads")
    attributes = {
        "q_num_heads": query_heads,
        "kv_num_heads": heads,
        "scale": attribute(node, "scale"),
        "update_rule": "gated_delta" if beta else "gated",
    }
    made = editor.add(
        node, "LinearAttention", [*packed, state, decay, *beta], attributes, domain=MS_DOMAIN, outputs=2, like=value
    )
    editor.replace(node.outputs[1], made.outputs[1])
    apart = editor.constant([0, 0, heads, -1])
    editor.replace(node.outputs[0], editor.add(node, "Reshape", [made.outputs[0], apart], like=value).outputs[0])
    editor.remove(node)


def _scan(editor: Editor, node: ir.Node) -> None:
    """Token by token, each head for itself."""
    query, key, value, decay, state, *beta = node.inputs
    query_heads, key_heads, heads = attribute(node, "heads")
    query, key = (_repeated(editor, node, x, own, heads) for x, own in ((query, query_heads), (key, key_heads)))
    grows = editor.add(node, "Exp", [decay], like=decay).outputs[0]
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
    made = editor.add(node, "Scan", [state, *read], attributes, outputs=2, like=value)
    scale = editor.constant(attribute(node, "scale"), np.float32)
    scaled = editor.add(node, "Mul", [made.outputs[1], scale], like=value).outputs[0]
    editor.replace(node.outputs[1], made.outputs[0])
    editor.replace(node.outputs[0], scaled)
    editor.remove(node)


def _repeated(editor: Editor, node: ir.Node, x: ir.Value | None, own: int, heads: int) -> ir.Value | None:
    """(B, S, own, D) -> (B, S, heads, D): every head as often as others share it."""
    if own == heads:
        return x
    apart = editor.add(node, "Unsqueeze", [x, editor.constant([3])], like=x).outputs[0]
    often = editor.constant([1, 1, 1, heads // own, 1])
    spread = editor.add(node, "Expand", [apart, often], like=x).outputs[0]
    return editor.add(node, "Reshape", [spread, editor.constant([0, 0, heads, -1])], like=x).outputs[0]


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
