"""What the traced graph asks of shapes at every step, answered once; and shapes that the tracer forgot.

a width       Gather(Shape(y), -1)                      the layer's own number of outputs
a reshape     Reshape(y, [Shape(x)[0], Shape(x)[1], ...])    0, 0, ...: as in y, where y has the rows of x
two of them   Reshape(Reshape(y, ...), [-1, 64])              Reshape(y, [-1, 64])
the logits    (an axis named by the tracer, ...)        the names of the token ids' axes: runtimes size buffers by them
"""

import numpy as np
import onnx_ir as ir

from qbl_trl.onnx.graph import Editor, attribute, constant_of, produced_by
from qbl_trl.onnx.markers import TRACE_DOMAIN
from qbl_trl.onnx.skeleton import Skeleton

_ROWWISE = {(TRACE_DOMAIN, "Linear"), (TRACE_DOMAIN, "Norm"), ("", "Cast"), ("", "Split"), ("", "Slice")}
_KEPT = {
    (TRACE_DOMAIN, "Norm"),
    (TRACE_DOMAIN, "Gelu"),
    *(("", op) for op in ("LayerNormalization", "Relu", "Sigmoid")),
}
_JOINED = ("Add", "Mul")


def answer_shapes(editor: Editor, skeleton: Skeleton) -> None:
    """Write numbers where the trace asks for what is known, in place."""
    for node in editor.graph:
        if node.domain == TRACE_DOMAIN and node.op_type == "Linear":
            output, width = node.outputs[0], skeleton.linears[attribute(node, "name")].out_features
            if output.shape is not None:  # the tracer forgets it where it is unsure of the layer's input
                output.shape = ir.Shape([*list(output.shape)[:-1], width])
                _answer_for_width(editor, output, len(output.shape), width)
    for node in list(editor.graph):
        spread(node)
        if node.op_type == "Reshape" and not node.domain:
            _answer_for_rows(editor, node)
    named = {value.name: value for value in (*editor.graph.inputs, *editor.graph.outputs)}
    ids, logits = named.get("input_ids"), named.get("logits")
    if ids is not None and logits is not None and ids.shape is not None and logits.shape is not None:
        logits.shape = ir.Shape([*ids.shape, logits.shape[-1]])


def join_reshapes(graph: ir.Graph) -> None:
    """Let what is reshaped twice be reshaped once, where the second shape says nothing of the first (no 0)."""
    for node in graph.all_nodes():
        if node.op_type == "Reshape" and not node.domain:
            target, before = constant_of(node.inputs[1]), produced_by(node.inputs[0], "Reshape")
            if before is not None and target is not None and 0 not in target:
                node.replace_input_with(0, before.inputs[0])


def spread(node: ir.Node) -> None:
    """Tell the outputs of a node their shape where that of its inputs, (B, S, width), says it."""
    values = [value for value in node.inputs if value is not None and constant_of(value) is None]
    whole = values[0].shape if values else None
    if whole is None or len(whole) != 3 or not isinstance(whole[2], int):
        return
    constants = [known for value in node.inputs if (known := constant_of(value)) is not None]
    joined = not node.domain and node.op_type in _JOINED and all(_has_width(value, whole[2]) for value in values)
    joined = joined and all(known.size == 1 or known.shape[-1:] == (known.size,) == (whole[2],) for known in constants)
    if joined or (node.domain, node.op_type) in _KEPT:
        node.outputs[0].shape, node.outputs[0].type = whole, values[0].type
    for output, start, stop in cuts(node):
        output.shape, output.type = ir.Shape([*whole[:2], stop - start]), values[0].type


def cuts(node: ir.Node) -> list[tuple[ir.Value, int, int]]:
    """What a Slice or a Split along the last axis cuts out, from where to where; nothing where that is not known."""
    if node.domain or not node.inputs or node.inputs[0] is None or node.inputs[0].shape is None:
        return []
    if not _along_last_axis(node):
        return []
    if node.op_type == "Slice":
        start, stop, *step = (constant_of(value) for value in (*node.inputs[1:3], *node.inputs[4:]))
        if start is None or stop is None or any(by is None or by.item() != 1 for by in step):
            return []
        width = node.inputs[0].shape[-1]  # type: ignore[union-attr, index]
        end = min(int(stop.item()), width) if isinstance(width, int) else int(stop.item())
        return [(node.outputs[0], int(start.item()), end)] if 0 <= start.item() < end else []
    sizes = constant_of(node.inputs[1]) if node.op_type == "Split" and len(node.inputs) > 1 else None
    if sizes is None:
        return []
    stops = np.cumsum(sizes)
    return [(part, int(b - n), int(b)) for part, b, n in zip(node.outputs, stops, sizes, strict=True)]


def _has_width(value: ir.Value, width: int) -> bool:
    return value.shape is not None and len(value.shape) == 3 and value.shape[2] == width


def _answer_for_width(editor: Editor, output: ir.Value, rank: int, width: int) -> None:
    for turned in [use.node for use in output.uses() if use.node.op_type == "Transpose"]:
        if attribute(turned, "perm")[-1] == rank - 1:
            _answer_for_width(editor, turned.outputs[0], rank, width)
    for shape in [use.node for use in output.uses() if use.node.op_type == "Shape" and not use.node.attributes]:
        for use in list(shape.outputs[0].uses()):
            index = constant_of(use.node.inputs[1]) if use.node.op_type == "Gather" else None
            if index is not None and index.size == 1 and index.item() in (-1, rank - 1):
                editor.replace(use.node.outputs[0], editor.constant(np.full(index.shape, width)))
                editor.remove(use.node)
        if not shape.outputs[0].uses():
            editor.remove(shape)


def _answer_for_rows(editor: Editor, reshape: ir.Node) -> None:
    """A target of known numbers and of sizes that the reshaped value has at the same place becomes a constant."""
    data, target = reshape.inputs[0], produced_by(reshape.inputs[1], "Concat")
    if data is None or target is None:
        return
    numbers: list[int] = []
    for place, part in enumerate(target.inputs):
        known = constant_of(part)
        if known is not None:
            numbers += [int(number) for number in known.reshape(-1)]
        elif place == len(numbers) and _is_size(part, place, data):
            numbers.append(0)
        else:
            return
    if 0 in numbers:  # which means: as it was, as long as no zero is meant
        reshape.attributes.pop("allowzero", None)
        reshape.replace_input_with(1, editor.constant(numbers))
        output, width = reshape.outputs[0], numbers[-1]
        if output.shape is None and width > 0:
            _answer_for_width(editor, output, len(numbers), width)
            output.shape = ir.Shape([number if number > 0 else None for number in numbers])
            output.type = output.type or _type_of(data)


def _type_of(value: ir.Value) -> ir.TypeProtocol | None:
    """The element type of a value, or of what it is moved, cut or chosen from."""
    node = value.producer()
    if value.type is not None or node is None or node.inputs[0] is None or node.op_type == "Cast":
        return value.type
    return _type_of(node.inputs[0])


def _is_size(part: ir.Value | None, axis: int, data: ir.Value) -> bool:
    """Whether `part` is the size of `data` along one of its row axes."""
    unsqueezed = produced_by(part, "Unsqueeze")
    gather = produced_by(part if unsqueezed is None else unsqueezed.inputs[0], "Gather")
    shape = None if gather is None else produced_by(gather.inputs[0], "Shape")
    index = None if gather is None else constant_of(gather.inputs[1])
    if shape is None or shape.attributes or index is None or index.size != 1 or index.item() != axis:
        return False
    source = shape.inputs[0]
    if source is None or source.shape is None or axis >= len(source.shape) - 1:
        return False
    return _has_rows(data, source, axis)


def _has_rows(value: ir.Value | None, source: ir.Value, axis: int) -> bool:
    """Whether `value` is made from `source` by steps that keep all its axes but the last, or all up to `axis`."""
    while value is not None and value is not source:
        node = value.producer()
        if node is None or not (_is_rowwise(node) or (axis < 2 and _keeps_first_two(node))):
            return False
        value = node.inputs[0]
    return value is source


def _is_rowwise(node: ir.Node) -> bool:
    return (node.domain, node.op_type) in _ROWWISE and _along_last_axis(node)


def _keeps_first_two(node: ir.Node) -> bool:
    """Whether a node only moves, chooses from, or splits up what is behind its first two axes."""
    if node.domain:
        return False
    if node.op_type == "Transpose":
        return list(attribute(node, "perm"))[:2] == [0, 1]
    if node.op_type == "Gather":
        return "axis" in node.attributes and attribute(node, "axis") >= 2
    target = constant_of(node.inputs[1]) if node.op_type == "Reshape" and "allowzero" not in node.attributes else None
    return target is not None and target.size > 2 and target[:2].tolist() == [0, 0]


def _along_last_axis(node: ir.Node) -> bool:
    rank = None if node.inputs[0] is None or node.inputs[0].shape is None else len(node.inputs[0].shape)
    last = (-1,) if rank is None else (-1, rank - 1)
    if node.op_type == "Split":
        return "axis" in node.attributes and attribute(node, "axis") in last
    if node.op_type == "Slice":
        axes = constant_of(node.inputs[3]) if len(node.inputs) > 3 else None
        return axes is not None and axes.size == 1 and axes.item() in last
    return True
