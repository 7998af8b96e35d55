"""Change one float type of a traced graph into another.

torch cannot trace bfloat16 constants into ONNX, so a bfloat16 graph is traced in float16 and retyped. No weight is in
the graph at that time but small parameters.
"""

import ml_dtypes
import numpy as np
import onnx_ir as ir

_FLOAT16, _BFLOAT16 = ir.DataType.FLOAT16, ir.DataType.BFLOAT16


def float16_to_bfloat16(model: ir.Model) -> None:
    """Retype every float16 value, constant and cast, in place."""
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


def _retype(value: ir.Value) -> None:
    if value.dtype == _FLOAT16:
        value.type = ir.TensorType(_BFLOAT16)


def _converted(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    array = tensor.numpy().astype(np.float32)
    return ir.tensor(array.astype(ml_dtypes.bfloat16), dtype=_BFLOAT16, name=tensor.name)
