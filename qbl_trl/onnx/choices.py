"""Graphs that choose: by one If around all of it, or by an If at every layer (`grouped.py`), and then the same with all
layers as one of the branches has them.
"""

from collections.abc import Iterable, Iterator

from onnx import helper
from onnx.onnx_pb import GraphProto, NodeProto

from qbl_trl.onnx.protos import renamed, subgraphs

GROUPED, WHOLE = "grouped", "whole"  # last part of the branches' names


def condition(graph: GraphProto) -> str | None:
    """The value that every choice of a graph depends on; None where it has no choices."""
    return next((node.input[0] for node in graph.node if _branches(node)), None)


def needed(nodes: Iterable[NodeProto], values: Iterable[str]) -> list[NodeProto]:
    """The nodes that values are made by, in their order."""
    wanted, kept = set(values), list[NodeProto]()
    for node in reversed(list(nodes)):
        if wanted & set(node.output):
            kept.append(node)
            wanted.update(values_read(node))
    return kept[::-1]


def settled(graph: GraphProto, branch: str) -> list[NodeProto]:
    """The nodes of a graph with one branch, GROUPED or WHOLE, in place of every choice; the graph stays as it is."""
    nodes = list[NodeProto]()
    for node in graph.node:
        branches = _branches(node)
        nodes.extend(_inlined(node, branches[branch]) if branches else [node])
    return needed(nodes, (value.name for value in graph.output))


def _branches(node: NodeProto) -> dict[str, GraphProto]:
    found = {graph.name.rpartition("/")[2]: graph for graph in subgraphs(node)}
    return found if found.keys() == {GROUPED, WHOLE} else {}


def _inlined(node: NodeProto, branch: GraphProto) -> Iterator[NodeProto]:
    names = {inner.name: outer for inner, outer in zip(branch.output, node.output, strict=True)}
    return (renamed(inner, names) for inner in branch.node)


def as_branch(graph: GraphProto, name: str, nodes: Iterable[NodeProto], around: Iterable[str] = ()) -> GraphProto:
    """Nodes that make a graph's outputs as a branch of an If in it, which reads its inputs and initializers.

    Args:
        around: other values that are made before the If.
    """
    branch = GraphProto(name=name, node=nodes, output=graph.output)
    _rename(branch, f"{name}/", {*(value.name for value in [*graph.input, *graph.initializer]), *around})
    return branch


def made_of_weights(graph: GraphProto) -> list[NodeProto]:
    """Nodes that depend on initializers alone: a session folds them, for every branch that has them."""
    known, found = {weight.name for weight in graph.initializer}, list[NodeProto]()
    for node in graph.node:
        if node.input and known.issuperset(filter(None, values_read(node))):
            found.append(node)
            known.update(node.output)
    return found


def choose_(graph: GraphProto, first: Iterable[NodeProto], asked: str, then: GraphProto, other: GraphProto) -> None:
    """Make a graph If(asked): `then`, else `other`, after the nodes by which `asked` is known."""
    outputs, first = [value.name for value in graph.output], list(first)
    for part in (graph.node, graph.value_info):
        del part[:]
    branches = {"then_branch": then, "else_branch": other}
    graph.node.extend([*first, helper.make_node("If", [asked], outputs, name="choice", **branches)])


def _rename(graph: GraphProto, prefix: str, outer: set[str]) -> None:
    """A prefix for every value but those of the graph around both branches."""
    for value in (*graph.input, *graph.initializer, *graph.value_info, *graph.output):
        value.name = prefix + value.name
    for node in graph.node:
        node.name = prefix + node.name
        for names in (node.input, node.output):
            names[:] = [name if not name or name in outer else prefix + name for name in names]
        for inner in subgraphs(node):
            _rename(inner, prefix, outer)


def values_read(node: NodeProto) -> Iterator[str]:
    """Every value that a node reads, its subgraphs' nodes among them."""
    yield from filter(None, node.input)
    for graph in subgraphs(node):
        for inner in graph.node:
            yield from values_read(inner)
        yield from (value.name for value in graph.output)
