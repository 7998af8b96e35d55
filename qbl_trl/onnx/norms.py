"""Norm placeholders -> SkipSimplifiedLayerNormalization where a residual sum feeds them, RMSNormalization elsewhere.

sum = a + b;  y = sum / sqrt(mean(sum^2) + epsilon) * weight        one node, both results
"""

import onnx_ir as ir
import torch

from qbl_trl.onnx.graph import MS_DOMAIN, Editor, attribute, produced_by
from qbl_trl.onnx.markers import TRACE_DOMAIN
from qbl_trl.onnx.norm_modules import Norm

RMS_NORM_OPSET = 23  # the opset that introduces RMSNormalization


def lower_norms(editor: Editor, norms: dict[str, Norm]) -> None:
    """Replace every Norm placeholder."""
    for node in [node for node in editor.graph if node.domain == TRACE_DOMAIN and node.op_type == "Norm"]:
        name = attribute(node, "name")
        norm = norms[name]
        wide = node.outputs[0].dtype == ir.DataType.FLOAT  # of what a recurrence gives, whatever the graph's type
        kind = torch.float32 if wide else editor.dtype
        gamma = editor.weight(f"{name}.weight", tuple(norm.weight.shape), kind, _reader(norm))
        added = produced_by(node.inputs[0], "Add")
        if added is not None and _rank(node.outputs[0]) in (None, 3) and _same_shape(added):
            inputs = [*added.inputs, gamma]
            attributes = {"epsilon": norm.epsilon}
            fused = editor.add(
                node, "SkipSimplifiedLayerNormalization", inputs, attributes, domain=MS_DOMAIN, name=name, outputs=4
            )
            y, total = fused.outputs[0], fused.outputs[3]
            for unused in fused.outputs[1:3]:
                unused.name = ""
            total.type = y.type = node.outputs[0].type
            editor.replace(node.outputs[0], y)
            editor.replace(added.outputs[0], total)
            editor.remove(node)
            editor.remove(added)
        else:
            attributes = {"epsilon": norm.epsilon, "axis": -1}
            plain = editor.add(
                node, "RMSNormalization", [node.inputs[0], gamma], attributes, name=name, like=node.outputs[0]
            )
            editor.replace(node.outputs[0], plain.outputs[0])
            editor.remove(node)


def _reader(norm: Norm):  # type: ignore[no-untyped-def]
    return lambda: norm.weight


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)


def _same_shape(added: ir.Node) -> bool:
    """Both terms are activations of rank 3: the operator does not broadcast."""
    shapes = [value.shape for value in added.inputs if value is not None]
    return (
        len(shapes) == 2
        and all(not value.is_initializer() for value in added.inputs if value is not None)
        and not any(shape is not None and len(shape) != 3 for shape in shapes)
    )
