"""Change one float type of a traced graph into another.

torch cannot trace bfloat16 constants into ONNX, so a bfloat16 graph is traced in float16 and retyped. No weight is in
the graph at that time but small parameters.
"""

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

_FLOAT16, _BFLOAT16 = ir.DataType.FLOAT16, ir.DataType.BFLOAT16


def float16_to_bfloat16(model: ir.Model) -> None:
    """Retype every float16 value, constant and cast, in place."""
    choices = [node for node in model.graph.all_nodes() if node.op_type == "TopK"]
    if choices:
        ShapeInferencePass()(model)
    for node in model.graph.all_nodes():
        for name, attribute in list(node.attributes.items()):
            if name == "to" and attribute.value == _FLOAT16:
                node.attributes[name] = ir.AttrInt64(name, int(_BFLOAT16))
            elif attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == _FLOAT16:
                node.attributes[name] = ir.AttrTensor(name, _converted(attribute.value))
        for value in node.outputs:
            _retype(value)
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        _retype(value)
        if value.const_value is not None and value.const_value.dtype == _FLOAT16:
            value.const_value = _converted(value.const_value)
    for node in choices:
        if node.inputs[0] is not None and node.inputs[0].dtype == _BFLOAT16:
            _in_float32(node, node.inputs[0])


def _in_float32(node: ir.Node, read: ir.Value) -> None:
    """Before opset 24, ONNX defines TopK for every float but bfloat16; a router's choice is the same in float32."""
    values = node.outputs[0]
    back = ir.node("Cast", [values], {"to": int(_BFLOAT16)}, name=f"{node.name}/bfloat16")
    ir.convenience.replace_all_uses_with(values, back.outputs[0])
    back.replace_input_with(0, values)
    back.outputs[0].type, back.outputs[0].shape = values.type, values.shape
    values.type = ir.TensorType(ir.DataType.FLOAT)
    wide = ir.node("Cast", [read], {"to": int(ir.DataType.FLOAT)}, name=f"{node.name}/float32")
    wide.outputs[0].type, wide.outputs[0].shape = values.type, read.shape
    node.replace_input_with(0, wide.outputs[0])
    graph = node.graph
    if graph is not None:
        graph.insert_before(node, wide)
        graph.insert_after(node, back)


def _retype(value: ir.Value) -> None:
    if value.dtype == _FLOAT16:
        value.type = ir.TensorType(_BFLOAT16)


def _converted(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    array = tensor.numpy().astype(np.float32)
    return ir.tensor(array.astype(ml_dtypes.bfloat16), dtype=_BFLOAT16, name=tensor.name)
