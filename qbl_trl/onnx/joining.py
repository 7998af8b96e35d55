"""Layers that read one input become one layer: q, k and v; gate and up.

One operator instead of three quantizes its activations once, wakes the threads once, and needs one correction. Queries,
keys and values go into GroupQueryAttention as they are; other results are cut apart again by one Split.
"""

import math
from collections.abc import Sequence

import onnx_ir as ir

from qbl_trl.onnx.graph import MS_DOMAIN, Editor, attribute
from qbl_trl.onnx.layers import BlockDelta, Branch, GroupBase, LinearSource, Made, Stack, TensorRef
from qbl_trl.onnx.markers import TRACE_DOMAIN
from qbl_trl.onnx.shapes import cuts


def join_projections(editor: Editor, sources: dict[str, LinearSource]) -> dict[str, LinearSource]:
    """Join Linear placeholders that share their input, in place; returns the sources with the joined ones added."""
    known = dict(sources)
    for node in [node for node in editor.graph if node.op_type == "GroupQueryAttention" and node.domain == MS_DOMAIN]:
        joined = _cut_from(node.inputs[:3])
        if joined is not None:  # joined by the model itself
            for index, value in enumerate((joined, None, None)):
                node.replace_input_with(index, value)
            continue
        markers = [_marker(value) for value in node.inputs[:3]]
        found = [marker for marker in markers if marker is not None]
        if len(found) == 3 and len(set(found)) == 3 and all(len(marker.outputs[0].uses()) == 1 for marker in found):
            joined = _join(editor, found, known)
            if joined is not None:
                node.replace_input_with(0, joined)
                node.replace_input_with(1, None)
                node.replace_input_with(2, None)
                _remove(editor, found)
    for group in _sharing(editor):
        joined = _join(editor, group, known)
        if joined is not None:
            sizes = editor.constant([known[attribute(node, "name")].out_features for node in group])
            split = editor.add(group[-1], "Split", [joined, sizes], {"axis": -1}, outputs=len(group))
            for node, part in zip(group, split.outputs, strict=True):
                part.type, part.shape = node.outputs[0].type, node.outputs[0].shape
                editor.replace(node.outputs[0], part)
            _remove(editor, group)
    return known


def _cut_from(values: Sequence[ir.Value | None]) -> ir.Value | None:
    """The value that others are cut from, if they are all of it, one behind the other."""
    producers = [None if value is None else value.producer() for value in values]
    whole, end = None if producers[0] is None else producers[0].inputs[0], 0
    for value, node in zip(values, producers, strict=True):
        found = [] if node is None or node.inputs[0] is not whole else cuts(node)
        ends = next(((start, stop) for output, start, stop in found if output is value), None)
        if ends is None or ends[0] != end:
            return None
        end = ends[1]
    return whole if whole is not None and whole.shape is not None and whole.shape[-1] == end else None


def _marker(value: ir.Value | None) -> ir.Node | None:
    node = None if value is None else value.producer()
    is_linear = node is not None and node.domain == TRACE_DOMAIN and node.op_type == "Linear"
    return node if is_linear else None


def _sharing(editor: Editor) -> list[list[ir.Node]]:
    by_input: dict[ir.Value, list[ir.Node]] = {}
    for node in editor.graph:
        if node.domain == TRACE_DOMAIN and node.op_type == "Linear" and node.inputs[0] is not None:
            by_input.setdefault(node.inputs[0], []).append(node)
    return [group for group in by_input.values() if len(group) > 1]


def _join(editor: Editor, nodes: list[ir.Node], known: dict[str, LinearSource]) -> ir.Value | None:
    """A placeholder for the joined layer before the first of `nodes`, or None if they do not fit together."""
    if len({node.inputs[0] for node in nodes}) != 1:
        return None
    names = [attribute(node, "name") for node in nodes]
    joined = join([known[name] for name in names])
    if joined is None:
        return None
    known[joined.name] = joined
    made = editor.add(
        nodes[0], "Linear", [nodes[0].inputs[0]], {"name": joined.name}, domain=TRACE_DOMAIN, like=nodes[0].outputs[0]
    )
    shape = nodes[0].outputs[0].shape
    if shape is not None:
        made.outputs[0].shape = ir.Shape([*list(shape)[:-1], joined.out_features])
    return made.outputs[0]


def _remove(editor: Editor, nodes: list[ir.Node]) -> None:
    for node in nodes:
        editor.remove(node)


def join(sources: list[LinearSource]) -> LinearSource | None:
    """Stack layers along their outputs, or return None if their formats differ."""
    bases = [source.base for source in sources if isinstance(source.base, GroupBase)]
    if len(bases) != len(sources) or len({(base.bits, base.group_size, _kind(base.zeros)) for base in bases}) != 1:
        return None
    if len({source.bias is None for source in sources}) != 1:
        return None
    branches = _join_branches([source.branches for source in sources])
    if branches is None:
        return None
    first = bases[0]
    base = GroupBase(
        first.bits,
        first.group_size,
        _stack([item.weight for item in bases]),
        _stack([item.scales for item in bases]),
        None if first.zeros is None else _stack([item.zeros for item in bases if item.zeros is not None]),
    )
    biases = [source.bias for source in sources if source.bias is not None]
    prefix, _, _ = sources[0].name.rpartition(".")
    name = f"{prefix}.{'_'.join(source.name.rpartition('.')[2] for source in sources)}"
    outputs = sum(source.out_features for source in sources)
    return LinearSource(name, sources[0].in_features, outputs, base, _stack(biases) if biases else None, branches)


def _join_branches(groups: list[tuple[Branch, ...]]) -> tuple[Branch, ...] | None:
    if len({len(group) for group in groups}) != 1:
        return None
    joined: list[Branch] = []
    for level in zip(*groups, strict=True):
        deltas = [branch for branch in level if isinstance(branch, BlockDelta)]
        if len(deltas) != len(level) or len({delta.in_factor for delta in deltas}) != 1:
            return None
        common = math.gcd(*(delta.out_factor for delta in deltas))
        rows = [_repeated(delta.delta, delta.out_factor // common) for delta in deltas]
        joined.append(BlockDelta(_stack(rows), deltas[0].in_factor, common))
    return tuple(joined)


def _repeated(stored: TensorRef, times: int) -> TensorRef:
    rows, *rest = stored.shape
    repeated = Made(stored.parts, (rows * times, *rest), lambda: stored.read().repeat_interleave(times, 0))
    return stored if times == 1 else repeated


def _stack(items: list[TensorRef]) -> Stack:
    return Stack(tuple(part for item in items for part in item.parts), tuple(items))


def _kind(zeros: TensorRef | None) -> str:
    return "none" if zeros is None else "float" if zeros.floating else "packed"
