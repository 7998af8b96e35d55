"""logits="last": the graph answers for the last position, and computes nothing else that only this answer needs.

That is the last of each row that is no padding: ONNX Runtime GenAI pads shorter texts on the right.

Layers, norms and elementwise operators treat every position by itself. Those whose results nobody but the head uses
see the last position alone: the head, the final norm, and what the last decoder layer does after its attention.
"""

from collections.abc import Iterable, Iterator

import onnx_ir as ir
from onnx.onnx_pb import NodeProto

from qbl_trl.errors import ExportError
from qbl_trl.onnx.graph import MS_DOMAIN, Editor, constant_of
from qbl_trl.onnx.markers import TRACE_DOMAIN
from qbl_trl.onnx.masks import Masks
from qbl_trl.onnx.protos import renamed

# fmt: off
_ELEMENTWISE = frozenset([
    "Abs", "Add", "Cast", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "Identity",
    "LeakyRelu", "Max", "Min", "Mul", "Neg", "Pow", "Reciprocal", "Relu", "Sigmoid", "Softplus", "Sqrt", "Sub", "Tanh",
])
# fmt: on
_FIRST_INPUT_ONLY = {"LayerNormalization": -1, "Split": 0}  # and the axis they work along by default
LAST = "last"  # name of the nodes that cut
_ATTENTION = (("", "Attention"), (MS_DOMAIN, "GroupQueryAttention"))


def keep_last(editor: Editor) -> None:
    """Cut what the head depends on to the last position, as early as the graph allows.

    Raises:
        ExportError: if no linear layer makes the logits.
    """
    logits = next(value for value in editor.graph.outputs if value.name == "logits")
    head = logits.producer()
    while head is not None and head.domain != TRACE_DOMAIN:
        _set_length(head.outputs[0])
        head = head.inputs[0].producer() if head.inputs and head.inputs[0] is not None else None
    if head is None or head.op_type != "Linear":
        raise ExportError('logits="last": the layer that makes the logits was not found; export with logits="all"')
    region = _Region(editor.graph, head)
    last = Masks(editor).last_token()
    cut: dict[ir.Value, ir.Value] = {}
    for node in [node for node in editor.graph if node in region.nodes]:
        for index, value in enumerate(node.inputs):
            if value is None or value not in region.moving or value.producer() in region.nodes:
                continue
            if value not in cut:
                cut[value] = editor.add(
                    node, "GatherND", [value, last], {"batch_dims": 1}, name=LAST, like=value
                ).outputs[0]
            node.replace_input_with(index, cut[value])
        for value in node.outputs:
            _set_length(value)


def is_cut(node: NodeProto) -> bool:
    """Whether a node of a written graph cuts to the last position."""
    return node.op_type == "GatherND" and LAST in node.name.split("/")


def uncut(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """The same nodes where every row has a single token, which is its last: what follows the cuts reads their input."""
    whole = dict[str, str]()
    for node in nodes:
        if is_cut(node):
            whole[node.output[0]] = node.input[0]
        else:
            yield renamed(node, whole)


class _Region:
    """The nodes that only the head's last position needs.

    Attributes:
        nodes: the head, and nodes that work position by position for it alone.
        moving: values that depend on the text; the others are the same for every text.
    """

    def __init__(self, graph: ir.Graph, head: ir.Node) -> None:
        nodes = list(graph)
        self.moving = set(graph.inputs)
        for node in nodes:
            if not self.moving.isdisjoint(value for value in node.inputs if value is not None):
                self.moving.update(node.outputs)
        self.nodes = {head}
        for node in reversed(nodes):
            if node is not head and self._only_for(node) and self._position_by_position(node):
                self.nodes.add(node)

    def _only_for(self, node: ir.Node) -> bool:
        """Whether nobody outside the region uses what the node makes."""
        users = [use.node for value in node.outputs for use in value.uses()]
        public = any(value.is_graph_output() for value in node.outputs)
        return bool(users) and self.nodes.issuperset(users) and not public

    def _position_by_position(self, node: ir.Node) -> bool:
        """Whether (B, 1, ...) in gives the last position of (B, S, ...) out, given that the latter has this form."""
        if node.domain == TRACE_DOMAIN:
            return node.op_type in ("Linear", "Norm")
        if node.domain:
            return False
        if node.op_type == "Slice":
            axes = constant_of(node.inputs[3]) if len(node.inputs) > 3 else None
            return axes is not None and axes.tolist() in ([-1], [2]) and self.moving.isdisjoint(node.inputs[1:])
        if node.op_type in _FIRST_INPUT_ONLY:
            axis = node.attributes.get("axis")
            along = _FIRST_INPUT_ONLY[node.op_type] if axis is None else axis.as_int()
            return along in (-1, 2) and self.moving.isdisjoint(node.inputs[1:])
        return node.op_type in _ELEMENTWISE and all(
            self._has_positions(value) for value in node.inputs if value is not None and value in self.moving
        )

    def _has_positions(self, value: ir.Value) -> bool:
        """Whether a value that depends on the text is known to be (B, S, ...)."""
        node = value.producer()
        if value.shape is not None or node is None:
            return value.shape is not None and len(value.shape) == 3
        if node.domain == TRACE_DOMAIN:
            return True
        if (node.domain, node.op_type) in _ATTENTION:
            return value is node.outputs[0]
        known = not node.domain and node.op_type in (*_ELEMENTWISE, *_FIRST_INPUT_ONLY, "Slice")
        return known and any(self._has_positions(one) for one in node.inputs if one is not None and one in self.moving)


def _set_length(value: ir.Value) -> None:
    if value.shape is not None and len(value.shape) == 3:
        value.shape = ir.Shape([value.shape[0], 1, value.shape[2]])
