"""Experts of a mixture that no token asks cost nothing.

A traced mixture asks every expert in turn, each for the tokens that chose it, and adds to what the others said:

    answer = answer + scatter(tokens, weight * expert(hidden[tokens]))        tokens = nonzero(chosen[expert])

Of a single token most experts hear nothing, and some forty operators over no rows each are then most of a step. Each
turn becomes an If on whether any token chose the expert; the answer passes by where none did.
"""

from dataclasses import dataclass

import onnx_ir as ir

from qbl_trl.onnx.graph import Editor, constant_of, produced_by

_SELECTING = ("Gather", "Cast", "Squeeze")
_STEPS = 8  # operators between the numbers of tokens and the scatter; five by now
_LARGEST = 400  # operators of a turn; forty by now


def let_unasked_experts_rest(editor: Editor) -> int:
    """Put the turn of every expert under an If, in place (no node is unused by then); returns how many there are."""
    place = {node: index for index, node in enumerate(editor.graph)}
    asked: dict[ir.Value, ir.Value] = {}
    count = 0
    for node in place:
        turn = _turn(node, place)
        if turn is None:
            continue
        if turn.chosen not in asked:
            asked[turn.chosen] = _any_token(editor, turn.nodes[0], turn.chosen)
        condition = editor.add(
            turn.nodes[0], "Gather", [asked[turn.chosen], editor.constant(turn.expert)], name="asked"
        )
        _choose(editor, turn, condition.outputs[0])
        count += 1
    return count


@dataclass(frozen=True)
class _Turn:
    """One expert: nodes up to `end`, which adds to `before` (of type `kind`); `chosen` (experts, ...) is 1 if asked."""

    end: ir.Node
    nodes: list[ir.Node]
    before: ir.Value
    kind: ir.TensorType
    chosen: ir.Value
    expert: int


def _turn(end: ir.Node, place: dict[ir.Node, int]) -> _Turn | None:
    """The turn that a node ends, if it ends one."""
    if end.op_type != "Add" or end.domain or len(end.inputs) != 2:
        return None
    for before, addend in (end.inputs, reversed(end.inputs)):
        scatter = produced_by(addend, "ScatterElements")
        empty = None if scatter is None else produced_by(scatter.inputs[0], "ConstantOfShape")
        if before is None or scatter is None or empty is None:
            continue
        start = _start(scatter)
        row = [] if start is None else _row(start)
        found, nodes = _expert(row), [] if start is None else _between([*row, start], before, end)
        if found is None or start not in nodes or scatter not in nodes:
            return None
        zero = empty.attributes.get("value")  # in the type of the answer
        kind = ir.TensorType(ir.DataType.FLOAT if zero is None else zero.as_tensor().dtype)
        return _Turn(end, sorted(nodes, key=place.__getitem__), before, kind, *found)
    return None


def _start(scatter: ir.Node) -> ir.Node | None:
    """The NonZero that finds the tokens: their numbers are cut, squeezed and expanded on the way to the scatter."""
    value = scatter.inputs[1]
    for _ in range(_STEPS):
        node = None if value is None else value.producer()
        if node is None or node.op_type == "NonZero":
            return node
        value = node.inputs[0] if node.inputs else None
    return None


def _row(start: ir.Node) -> list[ir.Node]:
    """How one row of the choices becomes what a NonZero looks through: a Gather, and what follows it."""
    nodes, value = list[ir.Node](), start.inputs[0]
    while (node := None if value is None else value.producer()) is not None and node.op_type in _SELECTING:
        nodes.append(node)
        value = node.inputs[0]
        if node.op_type == "Gather":
            break
    return nodes[::-1]


def _expert(row: list[ir.Node]) -> tuple[ir.Value, int] | None:
    """Of which choices, (experts, ...), it is which expert's."""
    if not row or row[0].op_type != "Gather" or row[0].inputs[0] is None:
        return None
    index, axis = constant_of(row[0].inputs[1]), row[0].attributes.get("axis")
    if index is None or index.size != 1 or (axis is not None and axis.as_int()):
        return None
    return row[0].inputs[0], int(index.reshape(()))


def _between(first: list[ir.Node], before: ir.Value, end: ir.Node) -> list[ir.Node]:
    """The first nodes, and what depends on the last of them or on the answer before; what is used for the end alone."""
    found, left = dict.fromkeys([end, *first]), [first[-1].outputs[0], before]
    while left and len(found) < _LARGEST:
        for use in left.pop().uses():
            if use.node not in found:
                found[use.node] = None
                left.extend(use.node.outputs)
    while True:
        strangers = [node for node in found if node is not end and not _users(node) <= found.keys()]
        if not strangers:
            return list(found)
        for node in strangers:
            del found[node]


def _users(node: ir.Node) -> set[ir.Node | None]:
    """None stands for whoever reads the graph's outputs."""
    public = any(value.is_graph_output() for value in node.outputs)
    return {use.node for value in node.outputs for use in value.uses()} | ({None} if public else set())


def _any_token(editor: Editor, at: ir.Node, chosen: ir.Value) -> ir.Value:
    """Whether any token chose each expert, (experts,) booleans."""
    axes = editor.constant([1, 2])
    count = editor.add(at, "ReduceSum", [chosen, axes], {"keepdims": 0}, name="asked").outputs[0]
    return editor.add(at, "Cast", [count], {"to": int(ir.DataType.BOOL)}, name="asked").outputs[0]


def _choose(editor: Editor, turn: _Turn, condition: ir.Value) -> None:
    """If(condition): the turn, else what was there before it."""
    name, said, kind = turn.end.name, turn.end.outputs[0], turn.kind
    chosen = editor.add(turn.end, "If", [condition], name=name)
    chosen.outputs[0].type = said.type = kind
    editor.replace(said, chosen.outputs[0])
    editor.graph.remove(turn.nodes)
    rest = ir.node("Identity", [turn.before], name=f"{name}/rest")
    rest.outputs[0].name, rest.outputs[0].type = f"{name}/rested", kind
    for branch, nodes, output in (("then_branch", turn.nodes, said), ("else_branch", [rest], rest.outputs[0])):
        graph = ir.Graph([], [output], nodes=nodes, name=f"{name}/{branch}")
        chosen.attributes[branch] = ir.AttrGraph(branch, graph)
