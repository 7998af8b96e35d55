"""Linear placeholders -> MatMulNBits, MatMulBnb4 or MatMul, with the branches below beside them.

    factored           y = W(q, s, z) x + expand_e(D sum_p(x))         integer z, exact for every p and e
    float_zero_point   y = W(q, s, z') x,  z' = z - D / s              one operator, needs p to be a multiple of g
    low_rank           y = base(x) + expand_e(gain B (A sum_p(x)))     the two factors as trained
    digits             y = [W | digits of D] [x, sum_p(x), ...]        with 8-bit activations only, see digits.py

Expanding D along its rows happens in the graph, on constants: the file holds (N / e, K / p), ONNX Runtime folds the
expansion once when it loads, and a token pays one small product.
"""

from dataclasses import dataclass, replace

import onnx_ir as ir
import torch

from qbl_trl.errors import ExportError
from qbl_trl.onnx.digits import Layout, extended, layout_for
from qbl_trl.onnx.graph import MS_DOMAIN, TORCH_TO_IR, Editor
from qbl_trl.onnx.layers import BlockDelta, Bnb4Base, Branch, DenseBase, GroupBase, LinearSource, TensorRef
from qbl_trl.onnx.weights import Reader, folded_zeros, give, transposed, with_whole_zeros


@dataclass(frozen=True)
class LoweredLayer:
    """How one layer was written, for the report."""

    name: str
    operator: str
    correction: str


class LinearLowering:
    """Rewrites Linear placeholders of one graph.

    Args:
        lowering: "auto", "factored", "float_zero_point" or "low_rank".
        shared: names of weights that other layers use too, by data pointer (a tied embedding).
        levels: accuracy levels of steps and of prompts, see `prompts.py`.
        digits: write block deltas as digits beside the codes where they fit there.
        provider: whose kernels will run the graph.
    """

    def __init__(
        self,
        editor: Editor,
        lowering: str,
        shared: dict[tuple[int, ...], str],
        levels: tuple[int, int] = (0, 0),
        digits: bool = False,
        provider: str = "cpu",
    ) -> None:
        self.editor, self.lowering, self.shared = editor, lowering, shared
        self.levels, self.digits, self.provider = levels, digits, provider
        self.layers: list[LoweredLayer] = []
        self._pooled: dict[tuple[ir.Value, int], ir.Value] = {}
        self._appended: dict[tuple[ir.Value, int, int], ir.Value] = {}

    def lower(self, node: ir.Node, source: LinearSource) -> None:
        """Replace one placeholder.

        Raises:
            ExportError: if the lowering asked for cannot express this layer exactly.
        """
        editor, x, name = self.editor, node.inputs[0], source.name
        if x is None:
            raise ExportError(f"{name}: the traced layer has no input")
        foreign = node.outputs[0].dtype if node.outputs[0].dtype != editor.float_type else None
        if foreign is not None:  # a router that computes in float32 inside a model in half precision
            x = editor.add(node, "Cast", [x], {"to": int(editor.float_type)}, name=name).outputs[0]
            x.type = node.outputs[0].type = ir.TensorType(editor.float_type)
        adapted = any(isinstance(branch, BlockDelta) for branch in source.branches)
        delta = "block delta" if adapted else "fractional zeros"  # what HQQ's zero points leave beside integers
        if self.lowering != "float_zero_point":
            source = with_whole_zeros(source)
        branches: tuple[Branch, ...] = source.branches
        corrections: list[str] = []
        layout = layout_for(source, self.levels[1] == 4) if self.digits and not self._is_shared(source) else None
        if layout is not None:
            x, source, branches = *self._append_digits(node, x, source, layout), ()
            corrections.append(f"{delta} in 8 bits")
        if isinstance(source.base, GroupBase):
            y, branches = self._group(node, x, source, source.base)
            operator = "MatMulNBits"
        elif isinstance(source.base, Bnb4Base):
            y, operator = self._bnb4(node, x, source, source.base), "MatMulBnb4"
        else:
            y, operator = self._dense(node, x, source, source.base), "MatMul"
        for branch in branches:
            y = self._branch(node, x, y, source, branch, len(corrections))
            corrections.append(delta if isinstance(branch, BlockDelta) else "low rank")
        if source.bias is not None and operator != "MatMulNBits":
            bias = editor.weight(f"{name}.bias", (source.out_features,), editor.dtype, give(source.bias))
            y = editor.add(node, "Add", [y, bias], name=name, like=node.outputs[0]).outputs[0]
        y.type, y.shape = node.outputs[0].type, node.outputs[0].shape
        if foreign is not None:
            y = editor.add(node, "Cast", [y], {"to": int(foreign)}, name=name).outputs[0]
            y.type, y.shape = ir.TensorType(foreign), node.outputs[0].shape
        editor.replace(node.outputs[0], y)
        editor.remove(node)
        kept = ", ".join(dict.fromkeys(corrections)) or ("folded" if source.branches else "none")
        self.layers.append(LoweredLayer(name, operator, kept))

    def _group(
        self, node: ir.Node, x: ir.Value, source: LinearSource, base: GroupBase
    ) -> tuple[ir.Value, tuple[Branch, ...]]:
        """MatMulNBits, and the branches that are left for a correction.

        Where activations get 8 bits, ONNX Runtime packs scales with the codes while it loads, and computes something
        else if it finds no constant ones. Of half precision on CPU it makes float32 by itself, with scales that it
        casts too late for that: there the operator is written in float32.
        """
        editor, name, branches = self.editor, source.name, source.branches
        dtype = torch.float32 if self.provider == "cpu" and 4 in self.levels else editor.dtype
        out = ir.TensorType(TORCH_TO_IR[dtype])
        if dtype != editor.dtype:
            x = editor.add(node, "Cast", [x], {"to": int(out.dtype)}, name=name).outputs[0]
            x.type = out
        rows, groups = base.scales.shape
        fractional = base.zeros is not None and base.zeros.floating
        read_zeros: Reader | None = None if base.zeros is None else give(base.zeros)
        zero_dtype, zero_width = torch.uint8, -(-groups * base.bits // 8)
        if self.lowering == "float_zero_point" and (branches or fractional):
            if base.bits == 8:  # the gate runs on the CPU, whoever the graph is for
                raise ExportError(
                    f"{name}: ONNX Runtime has no CPU kernel for 8-bit codes with fractional zero points; use "
                    'lowering="factored"'
                )
            read_zeros, branches = folded_zeros(name, base, branches), ()
            zero_dtype, zero_width = dtype, groups
        stem = self.shared.get(base.weight.pointers, name)
        zeros = f"{stem if zero_dtype == torch.uint8 else name}.zeros"  # folded ones are this layer's alone
        blob = base.group_size * base.bits // 8
        inputs: list[ir.Value | None] = [
            x,
            editor.weight(f"{stem}.weight", (rows, groups, blob), torch.uint8, give(base.weight)),
            editor.widened(node, f"{stem}.scales", base.scales, dtype),
            None,
            None,
            None,
        ]
        if read_zeros is not None:
            inputs[3] = editor.weight(zeros, (rows, zero_width), zero_dtype, read_zeros)
        if source.bias is not None:
            inputs[5] = editor.weight(f"{name}.bias", (rows,), dtype, give(source.bias))
        while inputs[-1] is None:
            inputs.pop()
        attributes = {"K": source.in_features, "N": rows, "bits": base.bits, "block_size": base.group_size}
        y = editor.add(node, "MatMulNBits", inputs, attributes, domain=MS_DOMAIN, name=name).outputs[0]
        y.type = out
        if dtype != editor.dtype:
            to = {"to": int(editor.float_type)}
            y = editor.add(node, "Cast", [y], to, name=name, like=node.outputs[0]).outputs[0]
        return y, branches

    def _is_shared(self, source: LinearSource) -> bool:
        return isinstance(source.base, GroupBase) and source.base.weight.pointers in self.shared

    def _append_digits(
        self, node: ir.Node, x: ir.Value, source: LinearSource, layout: Layout
    ) -> tuple[ir.Value, LinearSource]:
        """[x, h, h, ...], once per input, and the layer that reads it."""
        p = source.in_features // layout.columns
        key = x, p, layout.copies
        if key not in self._appended:
            pooled = self._pool(node, x, layout.columns, p, source.in_features)
            joined = self.editor.add(node, "Concat", [x] + [pooled] * layout.copies, {"axis": -1}, like=x)
            self._appended[key] = joined.outputs[0]
        width = source.in_features + layout.width
        return self._appended[key], replace(source, in_features=width, base=extended(source, layout), branches=())

    def _bnb4(self, node: ir.Node, x: ir.Value, source: LinearSource, base: Bnb4Base) -> ir.Value:
        editor, name = self.editor, source.name
        codes = editor.weight(f"{name}.weight", tuple(base.codes.shape), torch.uint8, give(base.codes))
        absmax = editor.weight(f"{name}.absmax", tuple(base.absmax.shape), editor.dtype, give(base.absmax))
        attributes = {
            "K": source.in_features,
            "N": source.out_features,
            "block_size": base.block_size,
            "quant_type": int(base.codebook == "nf4"),
        }
        made = editor.add(
            node, "MatMulBnb4", [x, codes, absmax], attributes, domain=MS_DOMAIN, name=name, like=node.outputs[0]
        )
        return made.outputs[0]

    def _dense(self, node: ir.Node, x: ir.Value, source: LinearSource, base: DenseBase) -> ir.Value:
        editor, name, weight = self.editor, source.name, base.weight
        value = editor.weight(
            f"{self.shared.get(weight.pointers, name)}.weight", weight.shape, editor.dtype, give(weight)
        )
        if base.transposed:
            return editor.add(node, "MatMul", [x, value], name=name, like=node.outputs[0]).outputs[0]
        # The weight stays (N, K), as an embedding tied to it needs it.
        made = editor.add(
            node, "FusedMatMul", [x, value], {"transB": 1}, domain=MS_DOMAIN, name=name, like=node.outputs[0]
        )
        return made.outputs[0]

    def _branch(
        self, node: ir.Node, x: ir.Value, y: ir.Value, source: LinearSource, branch: Branch, index: int
    ) -> ir.Value:
        editor, name = self.editor, source.name
        columns = branch.delta.shape[1] if isinstance(branch, BlockDelta) else branch.down.shape[1]
        label = name if index == 0 else f"{name}.{index}"
        hidden = self._pool(node, x, columns, branch.in_factor, source.in_features)
        if isinstance(branch, BlockDelta):
            up, gain, kind = branch.delta, 1.0, "delta"
        else:
            down, up, gain, kind = branch.down, TensorRef.of(branch.up), branch.gain, "lora_B"
            shape = (down.shape[1], down.shape[0])
            first = editor.weight(f"{label}.lora_A", shape, editor.dtype, transposed(give(down)))
            hidden = editor.add(node, "MatMul", [hidden, first], name=label).outputs[0]
        rows, columns = up.shape
        weight = editor.weight(f"{label}.{kind}", (columns, rows), editor.dtype, transposed(give(up), gain))
        weight = self._expand(node, weight, columns, rows, branch.out_factor)
        added = editor.add(node, "MatMul", [hidden, weight], name=label, like=node.outputs[0]).outputs[0]
        return editor.add(node, "Add", [y, added], name=label, like=node.outputs[0]).outputs[0]

    def _expand(self, node: ir.Node, weight: ir.Value, columns: int, rows: int, e: int) -> ir.Value:
        """Columns repeated e times when the session loads; the file holds them once. Repeating the result instead
        takes three more nodes a layer, which cost more than reading the repeated weights."""
        if e == 1:
            return weight
        editor = self.editor
        shape = editor.constant([columns, rows, 1])
        split = editor.add(node, "Reshape", [weight, shape], name=weight.name, like=weight).outputs[0]
        spread = editor.add(node, "Expand", [split, editor.constant([columns, rows, e])], name=weight.name, like=weight)
        target = editor.constant([columns, rows * e])
        return editor.add(node, "Reshape", [spread.outputs[0], target], name=weight.name, like=weight).outputs[0]

    def _pool(self, node: ir.Node, x: ir.Value, columns: int, p: int, width: int) -> ir.Value:
        """sum_p(x), (..., columns), once per input however many layers read it. x may hold no row (an expert's).

        Args:
            width: of x; the last sum may be of fewer inputs (zero points of a ragged last group).
        """
        if p == 1:
            return x
        if (x, p) not in self._pooled:
            editor, whole = self.editor, width // p
            sums = []
            if whole:
                shape = node.outputs[0].shape
                rank = 3 if shape is None else len(shape)
                target = editor.constant([0] * (rank - 1) + [whole, p])
                body = x if whole == columns else self._columns(node, x, 0, whole * p)
                split = editor.add(node, "Reshape", [body, target], like=x).outputs[0]
                sums.append(self._sum(node, split, keepdims=0))
            if whole < columns:
                sums.append(self._sum(node, self._columns(node, x, whole * p, width), keepdims=1))
            joined = editor.add(node, "Concat", sums, {"axis": -1}, like=x).outputs[0] if len(sums) > 1 else sums[0]
            self._pooled[x, p] = joined
        return self._pooled[x, p]

    def _sum(self, node: ir.Node, x: ir.Value, keepdims: int) -> ir.Value:
        axes = self.editor.constant([-1])
        return self.editor.add(node, "ReduceSum", [x, axes], {"keepdims": keepdims}, like=x).outputs[0]

    def _columns(self, node: ir.Node, x: ir.Value, start: int, stop: int) -> ir.Value:
        bounds = [self.editor.constant([bound]) for bound in (start, stop, -1)]
        return self.editor.add(node, "Slice", [x, *bounds], like=x).outputs[0]
