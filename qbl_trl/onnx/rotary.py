"""Rotary embeddings as tables: cosines and sines of every position, as the model itself computes them.

| type | rows |
| --- | --- |
| default, linear, yarn, llama3, ... | one per position |
| longrope | the short factors' up to the length of their training, then the long factors' for every position |
| dynamic | up to the length where the model starts to change its angles; the graph refuses longer texts |

Some give tables for a length, of which layers read rows by their positions (Phi-MoE): they are asked in the same way.
Some hold the angles of several types of layers (Gemma 3 in transformers 5): each type has a table.
A traced rotary embedding of the last two types would keep the angles of the text it was traced with, for every text.
"""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from qbl_trl.onnx.graph import Editor, attribute
from qbl_trl.onnx.markers import TRACE_DOMAIN
from qbl_trl.onnx.rotations import takes_angles_once

_SOME = 4  # positions that tell how a table is laid out
_REPEATED: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {  # a table's two copies of its angles
    "halves": lambda table: (table[..., : table.shape[-1] // 2], table[..., table.shape[-1] // 2 :]),
    "neighbours": lambda table: (table[..., ::2], table[..., 1::2]),
}


class NoTable(Exception):
    """A rotary embedding that works in another way; becomes Unfusable, or an ExportError."""


class Rotary:
    """One rotary embedding of a model. The model's module is copied: some remember the longest text they saw.

    Attributes:
        columns: of the model's own table.
        repeats: how that repeats its angles, one for each pair of features: "halves" (Llama), "neighbours" (Cohere) or
            not, "once" (GPT-OSS); None where it does something else, and fused operators cannot read it.
        width: features that are rotated.
        switch: texts longer than this read the second part of the table; 0 where there is one part.
        limit: the longest text whose angles are fixed, or None.

    Raises:
        NoTable: if the module is no function from positions to cosines and sines.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = _ByLength(copy.deepcopy(module)) if gives_tables(module) else copy.deepcopy(module)
        self.switch, self.limit = _switch(module), _limit(module)
        try:
            cos, sin = self._rows(_SOME)
        except Exception as error:  # whatever else its forward may want or return
            raise NoTable(f"a {type(module).__name__} does not turn positions into cosines and sines") from error
        self.columns = int(cos.shape[-1])
        self.repeats = next((how for how in _REPEATED if all(_is_repeated(part, how) for part in (cos, sin))), None)
        if self.repeats is None and takes_angles_once(module.whole if isinstance(module, _OfType) else module):
            self.repeats = "once"
        self.width = 2 * self.columns if self.repeats == "once" else self.columns

    def rows(self, max_length: int) -> int:
        """Height of the table for texts of up to `max_length` tokens."""
        return self.switch + (max_length if self.limit is None else min(max_length, self.limit))

    def read(self, max_length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines, two of (rows, width) float32."""
        parts = [self._rows(self.switch)] if self.switch else []
        # The module chooses its factors by the last position it is asked for.
        parts.append(self._rows(max(self.rows(max_length) - self.switch, self.switch + 1)))
        cos, sin = (torch.cat(columns)[: self.rows(max_length)] for columns in zip(*parts, strict=True))
        return cos, sin

    def angles(self, max_length: int) -> tuple[Tensor, Tensor]:
        """The same with each angle once, two of (rows, width / 2) float32, for fused operators."""
        if self.repeats is None:
            raise NoTable("its table repeats its angles in no known way")
        cos, sin = self.read(max_length)
        return (
            (cos, sin) if self.repeats == "once" else (_REPEATED[self.repeats](cos)[0], _REPEATED[self.repeats](sin)[0])
        )

    def _rows(self, length: int) -> tuple[Tensor, Tensor]:
        module, positions = self._module, torch.arange(length).unsqueeze(0)
        device = next((buffer.device for buffer in module.buffers()), torch.device("cpu"))
        with torch.no_grad():
            cos, sin = module(torch.zeros(1, dtype=torch.float32, device=device), positions.to(device))
        return cos[0].float().cpu(), sin[0].float().cpu()


class _ByLength(nn.Module):
    """A rotary embedding that gives the tables of a length, as one that gives rows for positions."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.module(x, seq_len=int(position_ids.max()) + 1)
        return cos[position_ids], sin[position_ids]


class _OfType(nn.Module):
    """What a rotary embedding of several types of layers is for one of them."""

    def __init__(self, whole: nn.Module, layer_type: str) -> None:
        super().__init__()
        self.whole, self.layer_type = whole, layer_type
        self.rope_type = str(whole.rope_type[layer_type])  # type: ignore[index]
        self.config = whole.config
        self.original_max_seq_len = getattr(whole, "original_max_seq_len", None)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.whole(x, position_ids, self.layer_type)
        return cos, sin


def by_type(module: nn.Module) -> dict[str, nn.Module]:
    """A rotary embedding for each type of layers that it tells apart, itself by the name "" where it tells none."""
    kinds = getattr(module, "rope_type", None)
    return {kind: _OfType(module, kind) for kind in kinds} if isinstance(kinds, dict) else {"": module}


def gives_tables(module: nn.Module) -> bool:
    """Whether a rotary embedding gives whole tables for a length, and not rows for positions."""
    parameters = inspect.signature(module.forward).parameters
    return "seq_len" in parameters and "position_ids" not in parameters


def _is_repeated(table: Tensor, how: str) -> bool:
    first, second = _REPEATED[how](table)
    return torch.equal(first, second)


def is_rotary(module: nn.Module) -> bool:
    """Whether a module turns positions into angles."""
    return type(module).__name__.endswith("RotaryEmbedding")


def changes_with_length(module: nn.Module) -> bool:
    """Whether the angles of a position depend on how long the text is."""
    return any(_switch(part) or _limit(part) is not None for part in by_type(module).values())


def steady_length(model: nn.Module) -> float:
    """The longest text of which every token has the angles it has in all shorter ones."""
    changes = [_switch(table) or _limit(table) for table in _tables(model)]
    return min((change for change in changes if change), default=float("inf"))


def fixed_length(model: nn.Module) -> float:
    """The longest text whose angles a table can hold: beyond, torch computes all of them anew at every length."""
    return min((limit for limit in map(_limit, _tables(model)) if limit is not None), default=float("inf"))


def _tables(model: nn.Module) -> list[nn.Module]:
    return [part for module in model.modules() if is_rotary(module) for part in by_type(module).values()]


def lower_rotary_tables(editor: Editor, rotary: dict[str, Rotary], max_length: int) -> None:
    """Replace RotaryTable placeholders that no fused operator has taken by look-ups."""
    for node in [node for node in editor.graph if node.domain == TRACE_DOMAIN and node.op_type == "RotaryTable"]:
        name, which, positions, output = (
            attribute(node, "name"),
            attribute(node, "part"),
            node.inputs[1],
            node.outputs[0],
        )
        embedding = rotary[name]
        if positions is None:
            continue
        shape = (embedding.rows(max_length), embedding.columns)
        rows = table_rows(editor, node, positions, embedding)
        read = _reader(embedding, max_length, which)
        table = editor.weight(f"{name}.{('cos', 'sin')[which]}", shape, editor.dtype, read)
        found = editor.add(node, "Gather", [table, rows], {"axis": 0}, name=name, like=output).outputs[0]
        found.shape = output.shape
        editor.replace(output, found)
        editor.remove(node)


def table_rows(editor: Editor, at: ir.Node, positions: ir.Value, rotary: Rotary) -> ir.Value:
    """Rows of the table for positions (B, S): further down, for every token, once one lies beyond the switch."""
    if not rotary.switch:
        return positions
    last = editor.add(at, "ReduceMax", [positions], {"keepdims": 0}, name="rotary", like=positions).outputs[0]
    beyond = editor.add(at, "Greater", [last, editor.constant(rotary.switch - 1)], name="rotary").outputs[0]
    counted = editor.add(at, "Cast", [beyond], {"to": int(ir.DataType.INT64)}, name="rotary", like=positions).outputs[0]
    shift = editor.add(at, "Mul", [counted, editor.constant(rotary.switch)], name="rotary", like=positions).outputs[0]
    return editor.add(at, "Add", [positions, shift], name="rotary", like=positions).outputs[0]


def _reader(rotary: Rotary, max_length: int, which: int):  # type: ignore[no-untyped-def]
    return lambda: rotary.read(max_length)[which]


def _kind(module: nn.Module) -> str:
    return str(getattr(module, "rope_type", "default"))


def _switch(module: nn.Module) -> int:
    if _kind(module) != "longrope":
        return 0
    config: Any = module.config
    stated = getattr(config, "rope_parameters", None) or {}  # in transformers 5, by type of layers where there are some
    stated = stated.get(getattr(module, "layer_type", None)) or stated
    name = "original_max_position_embeddings"
    return int(stated.get(name) or getattr(config, name, None) or config.max_position_embeddings)


def _limit(module: nn.Module) -> int | None:
    return int(module.original_max_seq_len) if "dynamic" in _kind(module) else None  # type: ignore[arg-type]
