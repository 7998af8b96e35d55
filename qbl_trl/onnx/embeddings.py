"""Embedding placeholders -> Gather, or GatherBlockQuantized over the same codes that a tied head multiplies with.

row = s (q - z)                        integer z
row = s (q - i) + s (i - z)            fractional z, i the nearest integer: what is looked up besides is (V, groups)
"""

import onnx_ir as ir
import torch

from qbl_trl.onnx.graph import MS_DOMAIN, Editor, attribute
from qbl_trl.onnx.layers import EmbeddingSource, GroupBase
from qbl_trl.onnx.markers import TRACE_DOMAIN
from qbl_trl.onnx.weights import Reader, give, whole_zeros, zeros_left
from qbl_trl.quant.packing import pack


def lower_embeddings(editor: Editor, embeddings: dict[str, EmbeddingSource]) -> dict[tuple[int, ...], str]:
    """Replace every Embedding placeholder.

    Returns:
        Name of each embedding by the memory behind its weight: a tied head finds its initializers by it.
    """
    names: dict[tuple[int, ...], str] = {}
    for node in [node for node in editor.graph if node.domain == TRACE_DOMAIN and node.op_type == "Embedding"]:
        source = embeddings[attribute(node, "name")]
        names[source.base.weight.pointers] = source.name
        if isinstance(source.base, GroupBase):
            found = _gather_groups(editor, node, source, source.base)
        else:
            shape = (source.num_embeddings, source.embedding_dim)
            table = editor.weight(f"{source.name}.weight", shape, editor.dtype, give(source.base.weight))
            made = editor.add(node, "Gather", [table, node.inputs[0]], {"axis": 0}, name=source.name)
            found = made.outputs[0]
        found.type, found.shape = node.outputs[0].type, node.outputs[0].shape
        editor.replace(node.outputs[0], found)
        editor.remove(node)
    return names


def _gather_groups(editor: Editor, node: ir.Node, source: EmbeddingSource, base: GroupBase) -> ir.Value:
    name, (rows, groups) = source.name, base.scales.shape
    blob = base.group_size * base.bits // 8
    codes = editor.weight(f"{name}.weight", (rows, groups, blob), torch.uint8, give(base.weight))
    scales = editor.widened(node, f"{name}.scales", base.scales)
    # Always explicit: the default zero point of this operator differs between providers.
    width = -(-groups * base.bits // 8)
    zeros = editor.weight(f"{name}.zeros", (rows, width), torch.uint8, _packed_zeros(base, rows, width))
    flat = editor.add(node, "Reshape", [codes, editor.constant([rows, groups * blob])], name=name).outputs[0]
    attributes = {"bits": base.bits, "block_size": base.group_size, "gather_axis": 0, "quantize_axis": 1}
    inputs = [flat, node.inputs[0], scales, zeros]
    found = editor.add(node, "GatherBlockQuantized", inputs, attributes, domain=MS_DOMAIN, name=name).outputs[0]
    found.type = node.outputs[0].type
    if base.zeros is not None and base.zeros.floating:
        found = _add_fractions(editor, node, found, name, base)
    if groups * base.group_size > source.embedding_dim:  # the last group is ragged
        ends = [editor.constant([bound]) for bound in (0, source.embedding_dim, -1)]
        found = editor.add(node, "Slice", [found, *ends], name=name, like=node.outputs[0]).outputs[0]
    return found


def _add_fractions(editor: Editor, node: ir.Node, found: ir.Value, name: str, base: GroupBase) -> ir.Value:
    """What fractional zero points leave, looked up and added to each group."""
    rows, groups = base.scales.shape
    shift = editor.weight(f"{name}.shift", (rows, groups), editor.dtype, lambda: zeros_left(base))
    looked_up = editor.add(node, "Gather", [shift, node.inputs[0]], {"axis": 0}, name=name, like=found).outputs[0]
    for_groups = editor.add(node, "Unsqueeze", [looked_up, editor.constant([-1])], name=name, like=found).outputs[0]
    in_groups = editor.constant([0, 0, groups, base.group_size])
    split = editor.add(node, "Reshape", [found, in_groups], name=name, like=found).outputs[0]
    whole = editor.add(node, "Add", [split, for_groups], name=name, like=found).outputs[0]
    width = editor.constant([0, 0, groups * base.group_size])
    return editor.add(node, "Reshape", [whole, width], name=name, like=found).outputs[0]


def _packed_zeros(base: GroupBase, rows: int, width: int) -> Reader:
    if base.zeros is not None:
        return (lambda: pack(whole_zeros(base).to(torch.uint8), base.bits)) if base.zeros.floating else give(base.zeros)
    middle = sum(1 << (base.bits - 1) << shift for shift in range(0, 8, base.bits))
    return lambda: torch.full((rows, width), middle, dtype=torch.uint8)
