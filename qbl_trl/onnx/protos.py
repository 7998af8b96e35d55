"""What every edit of a written graph needs: nodes named after what they make, constants, the graphs inside a node."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from onnx import AttributeProto, helper, numpy_helper
from onnx.onnx_pb import GraphProto, NodeProto


def node(op: str, inputs: Sequence[str], output: str, **attributes: Any) -> NodeProto:
    """A node of one output, which is its name too."""
    return helper.make_node(op, inputs, [output], output, **attributes)


def renamed(node: NodeProto, names: Mapping[str, str]) -> NodeProto:
    """A copy that reads and makes values under other names, where they have one."""
    copy = NodeProto()
    copy.CopyFrom(node)
    for values in (copy.input, copy.output):
        values[:] = [names.get(name, name) for name in values]
    return copy


def constant(graph: GraphProto, name: str, value: np.ndarray) -> None:
    """A weight of the graph, inside its file."""
    graph.initializer.append(numpy_helper.from_array(value, name))


def subgraphs(of: NodeProto) -> Iterator[GraphProto]:
    """The graphs inside a node."""
    return (attribute.g for attribute in of.attribute if attribute.type == AttributeProto.GRAPH)
