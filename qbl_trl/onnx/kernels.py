"""Would every node run on the CUDA provider? Checked against a table of its kernels, without a GPU.

The table (`cuda_kernels.json`) names the published list it was made from. Nodes that only compute shapes from integers
are left out: ONNX Runtime puts those on the CPU by design.
"""

import json
from importlib.resources import files
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

_FLOATS = {"bfloat16", "float16", "float", "double"}


def cuda_table() -> dict[str, Any]:
    """The shipped table: source, provider, and kernels by "domain:operator" with `since` and `types`."""
    table: dict[str, Any] = json.loads((files("qbl_trl.onnx") / "cuda_kernels.json").read_text(encoding="utf-8"))
    return table


def cuda_fallbacks(model: ir.Model) -> tuple[str, ...]:
    """Nodes that would run on the CPU, one line per operator and reason, with how many there are."""
    kernels = cuda_table()["kernels"]
    ShapeInferencePass()(model)
    found: dict[str, int] = {}
    for node in model.graph:
        types = _types(node)
        if node.op_type == "Constant" or not types & _FLOATS:
            continue
        kernel = kernels.get(f"{node.domain}:{node.op_type}")
        if kernel is None:
            reason = f"{node.op_type}: not among the CUDA kernels listed"
        elif not types <= set(kernel["types"]):
            missing = ", ".join(sorted(types - set(kernel["types"])))
            reason = f"{node.op_type}: no CUDA kernel for {missing}"
        else:
            continue
        found[reason] = found.get(reason, 0) + 1
    return tuple(f"{count} x {reason}" for reason, count in sorted(found.items()))


def _types(node: ir.Node) -> set[str]:
    """Element types of inputs and outputs as far as they are known, named as the table names them."""
    known = [value.dtype for value in [*node.inputs, *node.outputs] if value is not None and value.dtype is not None]
    names = {onnx.TensorProto.DataType.Name(dtype.value).lower() for dtype in known}
    return names - {"undefined"}
