"""Small edits on an onnx_ir graph: constants, weights that are read only when written, nodes put in place of others."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from qbl_trl.onnx.layers import TensorRef

MS_DOMAIN = "com.microsoft"
TORCH_TO_IR = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.uint8: ir.DataType.UINT8,
    torch.int64: ir.DataType.INT64,
    torch.int32: ir.DataType.INT32,
}


class Editor:
    """One graph being rewritten.

    Attributes:
        graph: edited in place.
        dtype: float type of activations and weights.
    """

    def __init__(self, model: ir.Model, dtype: torch.dtype) -> None:
        self.model, self.graph, self.dtype = model, model.graph, dtype
        self._constants: dict[tuple[Any, ...], ir.Value] = {}
        self._widened: dict[str, ir.Value] = {}
        self._count = 0

    @property
    def float_type(self) -> ir.DataType:
        return TORCH_TO_IR[self.dtype]

    def weight(self, name: str, shape: Sequence[int], dtype: torch.dtype, read: Callable[[], Tensor]) -> ir.Value:
        """An initializer whose content is produced by `read` when the file is written; same name, same initializer."""
        known, kind = self.graph.initializers.get(name), TORCH_TO_IR[dtype]
        if known is not None:
            if known.dtype != kind or list(known.shape or ()) != list(shape):
                raise TypeError(
                    f"{name}: two weights of one name, {known.dtype} {known.shape} and {kind} {tuple(shape)}"
                )
            return known

        def load() -> ir.TensorProtocol:
            tensor = read().detach().to(device="cpu", dtype=dtype).reshape(list(shape)).contiguous()
            return ir.tensor_adapters.TorchTensor(tensor, name=name)

        lazy = ir.LazyTensor(load, dtype=kind, shape=ir.Shape(shape), name=name)
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind), const_value=lazy)
        self.graph.register_initializer(value)
        return value

    def widened(self, at: ir.Node, name: str, stored: TensorRef, dtype: torch.dtype | None = None) -> ir.Value:
        """A weight in the graph's type, or another. One stored in 16 bits stays so in the file: sessions widen it while
        loading. Scales of a tied table are asked for in two types where its head computes in float32 beside a look-up
        in half precision: they are written twice then, if neither is the stored one."""
        wanted, narrow = dtype or self.dtype, stored.parts[0].dtype
        short = wanted == torch.float32 and narrow in (torch.float16, torch.bfloat16)
        written = narrow if short else wanted
        known = self.graph.initializers.get(name)
        if known is not None and known.dtype != TORCH_TO_IR[written]:
            name = f"{name}.{str(written).removeprefix('torch.')}"
        value = self.weight(name, stored.shape, written, stored.read)
        kind = ir.TensorType(TORCH_TO_IR[wanted])
        if value.type == kind:
            return value
        if name not in self._widened:
            cast = self.add(at, "Cast", [value], {"to": int(kind.dtype)}, name=name)
            cast.outputs[0].type, cast.outputs[0].shape = kind, value.shape
            self._widened[name] = cast.outputs[0]
        return self._widened[name]

    def constant(self, values: Any, dtype: Any = np.int64) -> ir.Value:
        """A small constant, shared by all its users."""
        array = np.asarray(values, dtype=dtype)
        key = (str(array.dtype), array.shape, array.tobytes())
        known = self._constants.get(key)
        if known is None:
            name = f"constant_{len(self._constants)}"
            known = ir.Value(
                name=name,
                shape=ir.Shape(array.shape),
                type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
                const_value=ir.tensor(array, name=name),
            )
            self._constants[key] = known
        if known.name not in self.graph.initializers:  # new, or swept away while nobody used it
            self.graph.register_initializer(known)
        return known

    def add(
        self,
        at: ir.Node,
        op: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
        name: str | None = None,
        outputs: int = 1,
        like: ir.Value | None = None,
    ) -> ir.Node:
        """Insert a node before `at`."""
        self._count += 1
        label = f"{name or at.name or 'qbl'}/{op}_{self._count}"
        node = ir.node(op, inputs, attributes or {}, domain=domain, num_outputs=outputs, name=label)
        for index, value in enumerate(node.outputs):
            value.name = f"{label}/out_{index}"
            value.type = like.type if like is not None else None
        self.graph.insert_before(at, node)
        return node

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let every user of `old`, graph outputs included, use `new`; outputs keep their public names and shapes."""
        name, public = old.name, old.is_graph_output()
        shape, kind = old.shape, old.type
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=public)
        if public:
            old.name = f"{name}/replaced"
            new.name, new.shape, new.type = name, shape, kind

    def remove(self, node: ir.Node) -> None:
        """Remove a node whose outputs nobody uses any more."""
        self.graph.remove(node, safe=True)


def constant_of(value: ir.Value | None) -> np.ndarray[Any, Any] | None:
    """The content of a constant, whether it is an initializer or the output of a Constant node."""
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def produced_by(value: ir.Value | None, op: str, domain: str = "") -> ir.Node | None:
    """The node that makes `value`, if it is an `op`."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op and node.domain == domain else None


def attribute(node: ir.Node, name: str) -> Any:
    """The value of an attribute that must be there."""
    return node.attributes[name].value
