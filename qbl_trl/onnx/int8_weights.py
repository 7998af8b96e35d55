"""Weights of layers as int8 with one scale for each output, made from the codes of a written graph.

    W ~ c w,   c = max|W| / 127 of an output,   |W - c w| <= c / 2

W is read from the folder some rows at a time, whatever operator multiplies it: MatMulNBits, with an adapter's digits
(`digits.py`) where they belong, or MatMulBnb4. What is made is appended to the folder's data.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnx import StringStringEntryProto, TensorProto, helper, numpy_helper
from onnx.onnx_pb import NodeProto
from torch import Tensor

from qbl_trl.onnx.files import DATA_FILE
from qbl_trl.onnx.graph import MS_DOMAIN
from qbl_trl.quant.packing import unpack

PACKED = ("MatMulNBits", "MatMulBnb4")
_ALIGNMENT = 1 << 16  # of weights in the file, as every system maps them
_CHUNK = 1 << 24  # weights in float32 at a time


@dataclass
class Int8Weights:
    """The weights of prompts, behind those of steps in the data file of a folder, once for all of its graphs.

    Attributes:
        made: codes (K, N) int8 and scales (N,) float32 by the name of the layer's own codes.
    """

    folder: Path
    made: dict[str, tuple[TensorProto, TensorProto]] = field(default_factory=dict)

    def of(self, layer: "Layer") -> tuple[TensorProto, TensorProto]:
        """Those of a layer, written if they are not there yet."""
        if layer.codes not in self.made:
            codes, scales = rounded(layer.rows(self.folder))
            name = f"{layer.codes}/int8"
            scale = numpy_helper.from_array(scales.numpy(), f"{name}.scales")
            self.made[layer.codes] = self._appended(name, codes.T.contiguous().numpy()), scale
        return self.made[layer.codes]

    def _appended(self, name: str, values: np.ndarray) -> TensorProto:
        with (self.folder / DATA_FILE).open("ab") as file:
            file.write(bytes(-file.tell() % _ALIGNMENT))
            place = {"location": DATA_FILE, "offset": file.tell(), "length": values.nbytes}
            file.write(values.tobytes())
        kind, external = helper.np_dtype_to_tensor_dtype(values.dtype), TensorProto.EXTERNAL
        tensor = TensorProto(name=name, dims=values.shape, data_type=kind, data_location=external)
        tensor.external_data.extend(StringStringEntryProto(key=key, value=str(place[key])) for key in place)
        return tensor


def rounded(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Weights (N, K), given as parts of their rows: codes (N, K) int8 in [-127, 127], and a scale (N,) for each row."""
    codes, scales = list[Tensor](), list[Tensor]()
    for part in parts:
        scale = part.abs().amax(1) / 127
        scale = torch.where(scale > 0, scale, 1.0)
        codes.append((part / scale[:, None]).round().to(torch.int8))
        scales.append(scale)
    return torch.cat(codes), torch.cat(scales)


@dataclass(frozen=True)
class Layer:
    """One of PACKED, and what it multiplies but for the digits of an adapter: W (N, K), x (..., K).

    Attributes:
        tensors, producers: weights of the graph, and nodes by what they make.
        columns, width: how many sums of inputs each digit has, and of how many; 0 without digits.
    """

    node: NodeProto
    tensors: Mapping[str, TensorProto]
    producers: Mapping[str, NodeProto]
    x: str
    columns: int = 0
    width: int = 0

    @classmethod
    def of(cls, node: NodeProto, tensors: Mapping[str, TensorProto], producers: Mapping[str, NodeProto]) -> "Layer":
        """With digits where it reads [x, h, h, ...], h = sum_p(x)."""
        joined = producers.get(node.input[0])
        if joined is not None and joined.op_type == "Concat" and len(set(joined.input[1:])) == 1:
            pooled = producers.get(joined.input[1])
            split = producers.get(pooled.input[0]) if pooled is not None and pooled.op_type == "ReduceSum" else None
            if split is not None and split.op_type == "Reshape" and split.input[0] == joined.input[0]:
                columns, width = numpy_helper.to_array(tensors[split.input[1]]).tolist()[-2:]
                return cls(node, tensors, producers, joined.input[0], columns, width)
        return cls(node, tensors, producers, node.input[0])

    @property
    def codes(self) -> str:
        """Name of the codes."""
        return self.node.input[1]

    def rows(self, folder: Path) -> Iterator[Tensor]:
        """W in float32, some rows at a time, with the digits where they belong."""
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in self.node.attribute}
        size, outputs = attributes["K"], attributes["N"]
        values = self._groups if self.node.op_type == "MatMulNBits" else self._blocks
        chunk = max(1, _CHUNK // size)
        for start in range(0, outputs, chunk):
            yield self._folded(values(slice(start, min(start + chunk, outputs)), folder, **attributes))

    def _groups(self, part: slice, folder: Path, *, K: int, N: int, bits: int, block_size: int, **_: int) -> Tensor:
        """Rows of MatMulNBits: codes in groups with scales and zero points."""
        groups = -(-K // block_size)
        codes = unpack(self._read(1, folder).reshape(N, -1)[part], bits, groups * block_size)
        scales = self._read(2, folder).float().reshape(N, groups)[part].unsqueeze(2)
        middle = torch.tensor(float(1 << (bits - 1)))
        if "".join(self.node.input[3:4]):
            zeros = self._read(3, folder).reshape(N, -1)[part]
            middle = (zeros if zeros.is_floating_point() else unpack(zeros, bits, groups)).float().unsqueeze(2)
        return ((codes.float().unflatten(1, (groups, block_size)) - middle) * scales).flatten(1)[:, :K]

    def _blocks(self, part: slice, folder: Path, *, K: int, N: int, quant_type: int, block_size: int) -> Tensor:
        """Rows of MatMulBnb4: the high half of a byte comes first, and blocks go on from row to row."""
        places = torch.arange(part.start * K, part.stop * K)
        packed, absmax = self._read(1, folder), self._read(2, folder).float()
        codes = (packed[places // 2] >> (4 * (1 - places % 2)).to(torch.uint8)) & 15
        return (codebook(quant_type)[codes.long()] * absmax[places // block_size]).view(-1, K)

    def _folded(self, values: Tensor) -> Tensor:
        """The digits' columns, (N, copies * columns), added to the inputs that they sum."""
        if not self.columns:
            return values
        own, digits = values.tensor_split([self.columns * self.width], 1)
        return own + digits.unflatten(1, (-1, self.columns)).sum(1).repeat_interleave(self.width, 1)

    def _read(self, index: int, folder: Path) -> Tensor:
        name = self.node.input[index]
        while name not in self.tensors:
            name = self.producers[name].input[0]  # what sessions widen
        array = numpy_helper.to_array(self.tensors[name], str(folder))
        return torch.from_numpy(array.copy() if array.dtype == np.uint8 else array.astype(np.float32))


@cache
def codebook(quant_type: int) -> Tensor:
    """What the 16 codes of bitsandbytes stand for, (16,) float32, read off the operator."""
    codes = np.array([16 * code + code + 1 for code in range(0, 16, 2)], np.uint8)
    node = helper.make_node(
        "MatMulBnb4", ["x", "codes", "absmax"], ["y"], K=16, N=1, block_size=16, quant_type=quant_type, domain=MS_DOMAIN
    )
    inputs, outputs = ([helper.make_tensor_value_info(name, TensorProto.FLOAT, None)] for name in "xy")
    weights = [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(np.ones(1, np.float32), "absmax")]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MS_DOMAIN, 1)]
    graph = helper.make_graph([node], "codebook", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": np.eye(16, dtype=np.float32)})[0][:, 0])
