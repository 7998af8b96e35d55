"""Weights of layers as int8 with one scale for each output, made from the codes of a written graph.

    W ~ c w,   c = max|W| / 127 of an output,   |W - c w| <= c / 2

W is read from the folder some rows at a time, whatever operator multiplies it: MatMulNBits, with an adapter's digits
(`digits.py`) where they belong, or MatMulBnb4. What is made is appended to the folder's data.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from onnx import StringStringEntryProto, TensorProto, helper, numpy_helper
from onnx.onnx_pb import NodeProto
from torch import Tensor

from qbl_trl.onnx.files import DATA_FILE
from qbl_trl.onnx.layers import Bnb4Base
from qbl_trl.onnx.reference import dequantize_bnb4
from qbl_trl.quant.affine import dequantize
from qbl_trl.quant.packing import unpack

PACKED = ("MatMulNBits", "MatMulBnb4")
_ALIGNMENT = 1 << 16  # of weights in the file, as every system maps them
_CHUNK = 1 << 24  # weights in float32 at a time
_LONGEST = 1 << 12  # block of bitsandbytes


@dataclass
class Int8Weights:
    """The weights of prompts, behind those of steps in the data file of a folder, once for all of its graphs.

    Attributes:
        made: codes (K, N) int8 and scales (N,) float32 by what they are made from.
    """

    folder: Path
    made: dict[tuple[str, ...], tuple[TensorProto, TensorProto]] = field(default_factory=dict)

    def of(self, layer: "Layer") -> tuple[TensorProto, TensorProto]:
        """Those of a layer, written if they are not there yet."""
        if layer.key not in self.made:
            codes, scales = rounded(layer.rows(self.folder), layer.outputs)
            name = f"{layer.key[0]}/int8"
            scale = numpy_helper.from_array(scales.numpy(), f"{name}.scales")
            self.made[layer.key] = self._appended(name, codes.numpy()), scale
        return self.made[layer.key]

    def _appended(self, name: str, values: np.ndarray) -> TensorProto:
        with (self.folder / DATA_FILE).open("ab") as file:
            file.write(bytes(-file.tell() % _ALIGNMENT))
            place = {"location": DATA_FILE, "offset": file.tell(), "length": values.nbytes}
            file.write(values.data)
        kind, external = helper.np_dtype_to_tensor_dtype(values.dtype), TensorProto.EXTERNAL
        tensor = TensorProto(name=name, dims=values.shape, data_type=kind, data_location=external)
        tensor.external_data.extend(StringStringEntryProto(key=key, value=str(place[key])) for key in place)
        return tensor


def rounded(parts: Iterable[Tensor], outputs: int) -> tuple[Tensor, Tensor]:
    """Weights (N, K), given as parts of their N rows: codes (K, N) int8 in [-127, 127], and their scales (N,)."""
    codes, scales, start = torch.empty(0, dtype=torch.int8), torch.empty(outputs), 0
    for part in parts:
        codes = codes if len(codes) else codes.new_empty(part.shape[1], outputs)
        scale = part.abs().amax(1) / 127
        scale = torch.where(scale > 0, scale, 1.0)
        stop = start + len(part)
        codes[:, start:stop] = (part / scale[:, None]).round_().to(torch.int8).T
        scales[start:stop] = scale
        start = stop
    return codes, scales


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
    def key(self) -> tuple[str, ...]:
        """Names of what W is made from, the codes first."""
        return tuple(self.node.input[1:4])

    @property
    def outputs(self) -> int:
        """N."""
        return self._attributes["N"]

    @property
    def _attributes(self) -> dict[str, int]:
        return {attribute.name: attribute.i for attribute in self.node.attribute}

    def rows(self, folder: Path) -> Iterator[Tensor]:
        """W in float32, some rows at a time, with the digits where they belong."""
        weights, sizes = [self._read(name, folder) for name in self.key if name], self._attributes
        values = _of_groups if self.node.op_type == "MatMulNBits" else _of_blocks
        whole = _LONGEST // math.gcd(sizes["K"], _LONGEST)  # rows after which a block begins, whatever its length
        chunk = max(1, _CHUNK // sizes["K"] // whole) * whole
        for start in range(0, self.outputs, chunk):
            yield self._folded(values(slice(start, min(start + chunk, self.outputs)), weights, sizes))

    def _folded(self, values: Tensor) -> Tensor:
        """The digits' columns, (N, copies * columns), added to the inputs that they sum."""
        if not self.columns:
            return values
        own, digits = values.tensor_split([self.columns * self.width], 1)
        return own + digits.unflatten(1, (-1, self.columns)).sum(1).repeat_interleave(self.width, 1)

    def _read(self, name: str, folder: Path) -> Tensor:
        while name not in self.tensors:
            name = self.producers[name].input[0]  # what sessions widen
        array = numpy_helper.to_array(self.tensors[name], str(folder))
        return torch.from_numpy(array.copy() if array.dtype == np.uint8 else array.astype(np.float32))


def _of_groups(part: slice, weights: Sequence[Tensor], sizes: Mapping[str, int]) -> Tensor:
    """Rows of MatMulNBits: codes in groups with scales and zero points."""
    codes, scales, *zeros = (weight.reshape(sizes["N"], -1)[part] for weight in weights)
    bits = sizes["bits"]
    middle = zeros[0] if zeros else torch.full_like(scales, 1 << (bits - 1))
    if not middle.is_floating_point():
        middle = unpack(middle, bits, scales.shape[1])
    return dequantize(unpack(codes, bits, sizes["K"]), scales, middle, sizes["block_size"])


def _of_blocks(part: slice, weights: Sequence[Tensor], sizes: Mapping[str, int]) -> Tensor:
    """Rows of MatMulBnb4, whose blocks go on from row to row."""
    codes, absmax = weights
    first, last, block = part.start * sizes["K"], part.stop * sizes["K"], sizes["block_size"]
    kind = "nf4" if sizes["quant_type"] else "fp4"
    base = Bnb4Base(codes[first // 2 : -(-last // 2)], absmax[first // block : -(-last // block)], kind, block)
    return dequantize_bnb4(base, part.stop - part.start, sizes["K"])
