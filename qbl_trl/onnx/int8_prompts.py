"""prompt_weights="int8": prompts by products of 8-bit integers, which processors have matrix instructions for.

    y = t c (w h + w l / 126)      W ~ c w,  c = max|W| / 127 of an output
                                   x ~ t (h + l / 126),  t = max|x| / 63 of a token

W is the whole layer, with the adapter where that lies within the codes (`digits.py`), rounded once more: by c / 2 at
most, a tenth of what the codes were rounded by. Activations keep 14 bits in the two integers h and l: beside a feature
that is a hundred times as large, the others of a token are off by 0.4%, beside one that is a thousand times as large by
4%. Both integers lie in [-63, 63]: processors without VNNI add two products of unsigned and signed bytes in 16 bits
that saturate, and 2 * 127 * 127 is the most that fits.

MatMulNBits multiplies 4-bit groups no faster than floats are multiplied; an integer product with one scale for each
output takes about a sixth of that with AMX, and there are two. The file holds a byte more for every weight, and so does
the session. Steps go on with the codes, and so does what sees a single position of each text, as the head with
logits="last".
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from onnx import TensorProto
from onnx.onnx_pb import GraphProto, NodeProto

from qbl_trl.onnx import protos
from qbl_trl.onnx.choices import needed
from qbl_trl.onnx.graph import MS_DOMAIN
from qbl_trl.onnx.int8_weights import PACKED, Int8Weights, Layer
from qbl_trl.onnx.last import is_cut

_LARGEST = 63  # of h and of l
_FINER = 2 * _LARGEST  # steps of l in one of h
_CONSTANTS = {
    "middle": np.uint8(_LARGEST + 1),
    "step": np.float32(1 / _LARGEST),
    "fine_step": np.float32(1 / (_LARGEST * _FINER)),
    "smallest": np.float32(1e-30),  # of max|x|: a token that is all zeros
    "last_axis": np.array([-1]),
}


def read_in_8_bits(prompts: GraphProto, outer: GraphProto, weights: Int8Weights) -> None:
    """Replace every product with 4-bit codes in the graph of prompts, in place, but those that see one position of each
    text.

    Args:
        outer: the graph around it, with the weights of both.
    """
    reader = _Reader({weight.name: weight for weight in outer.initializer}, weights)
    reader.rewrite(prompts, "", {}, {}, set())
    if reader.used:
        for name, value in _CONSTANTS.items():
            protos.constant(outer, _named(name), np.asarray(value))
    outer.initializer.extend(reader.used.values())


@dataclass
class _Reader:
    """Rewrites a graph and those inside its nodes; `used` collects the weights that they read then."""

    tensors: Mapping[str, TensorProto]
    weights: Int8Weights
    used: dict[str, TensorProto] = field(default_factory=dict)

    def rewrite(
        self,
        graph: GraphProto,
        prefix: str,
        producers: dict[str, NodeProto],
        parts: dict[str, list[str]],
        last: set[str],
    ) -> None:
        """One graph, in place.

        Args:
            prefix: of new names: graphs inside may read the same values.
            producers, parts, last: nodes by what they make, the two integers and the largest of values, and values of
                one position of each text: those of the graphs around it.
        """
        producers, parts, last = dict(producers), dict(parts), set(last)
        nodes = list[NodeProto]()
        for node in graph.node:
            producers.update(dict.fromkeys(node.output, node))
            if is_cut(node) or last.intersection(node.input):
                last.update(node.output)
            if node.op_type in PACKED and node.input[0] not in last:
                layer = Layer.of(node, self.tensors, producers)
                if layer.x not in parts:
                    parts[layer.x] = [f"{prefix}{layer.x}/{name}" for name in ("coarse", "fine", "largest")]
                    nodes.extend(_integers(layer.x, *parts[layer.x]))
                nodes.extend(self._products(layer, *parts[layer.x]))
                continue
            for inner in protos.subgraphs(node):
                self.rewrite(inner, f"{inner.name}/", producers, parts, last)
            nodes.append(node)
        del graph.node[:]
        graph.node.extend(needed(nodes, [value.name for value in graph.output]))

    def _products(self, layer: Layer, coarse: str, fine: str, largest: str) -> Iterator[NodeProto]:
        """The nodes that stand for a layer."""
        codes, scales = self.weights.of(layer)
        self.used.update({tensor.name: tensor for tensor in (codes, scales)})
        output = layer.node.output[0]
        for x, step in ((coarse, "step"), (fine, "fine_step")):
            inputs = [x, codes.name, _named(step), scales.name, _named("middle")]
            yield protos.node("MatMulIntegerToFloat", inputs, f"{output}/{step}", domain=MS_DOMAIN)
        yield protos.node("Add", [f"{output}/step", f"{output}/fine_step"], f"{output}/sum")
        bias = "".join(layer.node.input[5:6])
        yield protos.node("Mul", [f"{output}/sum", largest], f"{output}/product" if bias else output)
        if bias:
            yield protos.node("Add", [f"{output}/product", bias], output)


def _integers(x: str, coarse: str, fine: str, largest: str) -> Iterator[NodeProto]:
    """h and l, as unsigned bytes, and max|x| of every token."""
    middle, size, within = _named("middle"), f"{largest}/sizes", f"{coarse}/within_one"
    yield protos.node("Abs", [x], size)
    yield protos.node("ReduceMax", [size, _named("last_axis")], f"{largest}/any")
    yield protos.node("Max", [f"{largest}/any", _named("smallest")], largest)
    yield protos.node("Div", [x, largest], within)
    yield protos.node("QuantizeLinear", [within, _named("step"), middle], coarse)
    yield protos.node("DequantizeLinear", [coarse, _named("step"), middle], f"{coarse}/read")
    yield protos.node("Sub", [within, f"{coarse}/read"], f"{fine}/left")
    yield protos.node("QuantizeLinear", [f"{fine}/left", _named("fine_step"), middle], fine)


def _named(constant: str) -> str:
    return f"int8_prompts/{constant}"
