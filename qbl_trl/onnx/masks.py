"""Masks and positions that every layer shares, computed once per run at the head of the graph.

padding         (B, 1, S, T): a large negative number on padded keys; with a bias (B, H, S, T), that on the others
causal(window)  padding, and the same on keys after the query, or `window` and more before it
lengths         seqlens_k (B,) = T - 1 and total_sequence_length = T, both int32
query_lengths   (B,) = S, int32
step(window)    (B, 1, 1, T): padding for the last query alone, and keys `window` and more before it
grows_by_one    (1,): one new token over a past that is shorter than the text by that token
last_token      (B, 1, 1): which of the new tokens is the last that is no padding; 0 where there is none
after_text      (B, 1, 1): how many of the new tokens there are up to that one; 0 where there is none
ends_in_text    (B, 1, 1): whether that is all of them
is_text         (B, S, 1): whether a new token is no padding; text: the same as 1 and 0 in float32
sizes           B and S, scalars
position_ids    (B, S): which token of its text each new one is, from 0; -1 for padding
last_place      (B, 1) = T - 1: where the last token stands in the cache
rows            (4,) = B, 1, 1, 1: the shape of one value for every row
"""

import numpy as np
import onnx_ir as ir
import torch

from qbl_trl.onnx.graph import Editor
from qbl_trl.onnx.sites import Bias
from qbl_trl.onnx.skeleton import Unfusable

BIASED = "mask/biased"  # begins the names of masks that hold a bias
# Finite, so that a row of padding attends evenly instead of to nothing; far below any score.
_HIDDEN = {torch.float32: -3.0e38, torch.float16: -6.0e4, torch.bfloat16: -3.0e38}


class Masks:
    """Shared values of one graph, made on first use.

    Raises:
        Unfusable: if the graph has no input_ids.
    """

    def __init__(self, editor: Editor) -> None:
        self.editor = editor
        ids = self._input("input_ids")
        if ids is None:
            raise Unfusable("the graph has no input_ids")
        self.ids, self.mask = ids, self._input("attention_mask") or self._add_mask_input()
        self.first = next(iter(editor.graph))
        self._made: dict[str, ir.Value] = {}

    def lengths(self) -> tuple[ir.Value, ir.Value]:
        """seqlens_k and total_sequence_length of GroupQueryAttention."""
        if "seqlens" not in self._made:
            total = self._add("Cast", [self._total()], to=ir.DataType.INT32)
            last = self._add("Sub", [total, self.editor.constant(1, np.int32)])
            self._made["seqlens"] = self._for_every_row(last)
            self._made["total"] = total
        return self._made["seqlens"], self._made["total"]

    def query_lengths(self) -> ir.Value:
        """query_seqlens of GroupQueryAttention: padding is in the bias, so every query counts."""
        if "queries" not in self._made:
            self._made["queries"] = self._for_every_row(self._add("Cast", [self._steps()], to=ir.DataType.INT32))
        return self._made["queries"]

    def padding(self, bias: Bias | None = None) -> ir.Value:
        """Additive mask of padded keys, (B, 1, S, T), or (B, H, S, T) with a bias."""
        key = f"padding {_name(bias)}"
        if key not in self._made:
            one = self.editor.constant([1])
            target = self._add("Concat", [one, one, self._steps(), one], axis=0)
            made = self._made[key] = self._add("Expand", [self._hide(self._padded(), bias), target])
            made.name = made.name if bias is None else f"{BIASED}/{made.name}"
        return self._made[key]

    def causal(self, window: int, bias: Bias | None = None) -> ir.Value:
        """Additive mask of padded and unreachable keys, (B, 1, S, T), or (B, H, S, T) with a bias."""
        key = f"causal {window} {_name(bias)}"
        if key not in self._made:
            constant, zero, one = self.editor.constant, self.editor.constant(0), self.editor.constant(1)
            total = self._total()
            past = self._add("Sub", [total, self._add("Squeeze", [self._steps()])])
            keys = self._add("Range", [zero, total, one])
            queries = self._add("Unsqueeze", [self._add("Range", [past, total, one]), constant([1])])
            hidden = self._add("Greater", [keys, queries])
            if window:
                far = self._add("LessOrEqual", [keys, self._add("Sub", [queries, constant(window)])])
                hidden = self._add("Or", [hidden, far])
            self._made[key] = self._hide(self._add("Or", [hidden, self._padded()]), bias)
        return self._made[key]

    def step(self, window: int) -> ir.Value:
        """Additive mask of the keys that a single new token does not see, (B, 1, 1, T)."""
        key = f"step {window}"
        if key not in self._made:
            hidden = self._padded()
            if window:
                total = self._total()
                keys = self._add("Range", [self.editor.constant(0), total, self.editor.constant(1)])
                last = self._add("Sub", [total, self.editor.constant(1 + window)])
                hidden = self._add("Or", [self._add("LessOrEqual", [keys, last]), hidden])
            self._made[key] = self._hide(hidden)
        return self._made[key]

    def grows_by_one(self, past: ir.Value) -> ir.Value:
        """Whether one token comes to a cache that holds just the text before it, (1,)."""
        length = self._add("Shape", [past], start=2, end=3)
        grows = self._add("Equal", [self._add("Sub", [self._total(), length]), self._steps()])
        return self._add("And", [self._add("Equal", [self._steps(), self.editor.constant([1])]), grows])

    def answer_positions(self) -> None:
        """Count `position_ids` from the mask where the graph reads that input, which it loses."""
        asked = self._input("position_ids")
        if asked is not None:
            one = self.editor.constant(1)
            text = self._add("Mul", [self._add("CumSum", [self.mask, one]), self.mask])
            self.editor.replace(asked, self._of_new(self._add("Sub", [text, one])))
            self.editor.graph.inputs.remove(asked)

    def last_place(self) -> ir.Value:
        """Place of the last token in the cache, for every row, (B, 1)."""
        if "last place" not in self._made:
            last = self._add("Sub", [self._total(), self.editor.constant(1)])
            one = self.editor.constant([1])
            rows = self._add("Concat", [self._add("Shape", [self.ids], start=0, end=1), one], axis=0)
            self._made["last place"] = self._add("Expand", [last, rows])
        return self._made["last place"]

    def rows(self) -> ir.Value:
        """Shape of one value for every row, (4,) = B, 1, 1, 1."""
        if "rows" not in self._made:
            one = self.editor.constant([1])
            self._made["rows"] = self._add(
                "Concat", [self._add("Shape", [self.ids], start=0, end=1), *[one] * 3], axis=0
            )
        return self._made["rows"]

    def last_token(self) -> ir.Value:
        """Which of the new tokens is the last that is no padding, for every row, (B, 1, 1); 0 where all is padding."""
        if "last token" not in self._made:
            before = self._add("Sub", [self.after_text(), self.editor.constant(1)])
            self._made["last token"] = self._add("Max", [before, self.editor.constant(0)])
        return self._made["last token"]

    def after_text(self) -> ir.Value:
        """How many of the new tokens lie up to the last that is no padding, for every row, (B, 1, 1)."""
        if "after text" not in self._made:
            constant, one = self.editor.constant, self.editor.constant(1)
            seen = self._of_new(self.mask)
            end = self._add("Add", [self._add("Squeeze", [self._steps()]), one])
            counted = self._add("Mul", [seen, self._add("Range", [one, end, one])])
            most = self._add("ReduceMax", [counted, constant([1])], keepdims=1)
            self._made["after text"] = self._add("Unsqueeze", [most, constant([2])])
        return self._made["after text"]

    def ends_in_text(self) -> ir.Value:
        """Whether no padding follows on a row's text, (B, 1, 1) of booleans."""
        if "ends in text" not in self._made:
            self._made["ends in text"] = self._add("Equal", [self.after_text(), self._steps()])
        return self._made["ends in text"]

    def is_text(self) -> ir.Value:
        """Whether new tokens are no padding, (B, S, 1) of booleans."""
        if "is text" not in self._made:
            seen = self._add("Cast", [self._of_new(self.mask)], to=ir.DataType.BOOL)
            self._made["is text"] = self._add("Unsqueeze", [seen, self.editor.constant([2])])
        return self._made["is text"]

    def text(self) -> ir.Value:
        """1 for new tokens, 0 for padding, (B, S, 1) float32 whatever the graph's type."""
        if "text" not in self._made:
            self._made["text"] = self._add("Cast", [self.is_text()], to=ir.DataType.FLOAT)
        return self._made["text"]

    def sizes(self) -> tuple[ir.Value, ir.Value]:
        """How many rows and new tokens there are, scalars."""
        if "rows alone" not in self._made:
            rows = self._add("Shape", [self.ids], start=0, end=1)
            self._made["rows alone"] = self._add("Squeeze", [rows])
            self._made["steps alone"] = self._add("Squeeze", [self._steps()])
        return self._made["rows alone"], self._made["steps alone"]

    def positions(self, value: ir.Value | None) -> ir.Value:
        """Positions as (B, S): as they are where they are an input, repeated for every row where they are not."""
        if value is None:
            raise Unfusable("the rotary embedding has no positions")
        given = unrepeated(value)
        if given.is_graph_input():
            return given
        key = f"positions {value.name}"
        if key not in self._made:
            rows = self._add("Shape", [self.ids])
            producer = value.producer()
            if producer is None:
                raise Unfusable("the rotary embedding's positions are constant")
            node = ir.node("Expand", [value, rows], name=f"mask/{key}")
            node.outputs[0].name = f"mask/{key}/out"
            self.editor.graph.append(node)  # sorted into place when the graph is finished
            self._made[key] = node.outputs[0]
        return self._made[key]

    def _for_every_row(self, value: ir.Value) -> ir.Value:
        return self._add("Expand", [value, self._add("Shape", [self.ids], start=0, end=1)])

    def _padded(self) -> ir.Value:
        """True on padded keys, (B, 1, 1, T)."""
        if "padded" not in self._made:
            absent = self._add("Equal", [self.mask, self.editor.constant(0)])
            self._made["padded"] = self._add("Unsqueeze", [absent, self.editor.constant([1, 2])])
        return self._made["padded"]

    def _hide(self, hidden: ir.Value, bias: Bias | None = None) -> ir.Value:
        editor = self.editor
        depth = editor.weight("mask.hidden", (), editor.dtype, lambda: torch.tensor(_HIDDEN[editor.dtype]))
        if bias is not None:
            return self._add("Where", [hidden, depth, self._bias(bias)])
        seen = editor.weight("mask.seen", (), editor.dtype, lambda: torch.tensor(0.0))
        return self._add("Where", [hidden, depth, seen])

    def _bias(self, bias: Bias) -> ir.Value:
        """(B or 1, H, 1, T)."""
        editor, total = self.editor, self._add("Shape", [self.mask], start=1, end=2)
        end, axis = editor.constant([torch.iinfo(torch.int64).max]), editor.constant([-1])
        value = self._add("Slice", [bias.value, self._add("Neg", [total]), end, axis])
        target = self._add("Concat", [editor.constant([-1, bias.heads, 1]), total], axis=0)
        value = self._add("Reshape", [value, target])
        if bias.value.dtype != editor.float_type:
            value = self._add("Cast", [value], to=editor.float_type)
        if bias.scale == 1:
            return value
        factor = editor.weight(f"mask.bias.{bias.scale}", (), editor.dtype, lambda: torch.tensor(bias.scale))
        return self._add("Mul", [value, factor])

    def _of_new(self, value: ir.Value) -> ir.Value:
        """(B, T) of the whole text -> (B, S) of the new tokens."""
        end, axis = self.editor.constant([torch.iinfo(torch.int64).max]), self.editor.constant([1])
        start = self._add("Sub", [self.editor.constant([0]), self._steps()])
        return self._add("Slice", [value, start, end, axis])

    def _total(self) -> ir.Value:
        """T, a scalar."""
        if "whole" not in self._made:
            self._made["whole"] = self._add("Squeeze", [self._add("Shape", [self.mask], start=1, end=2)])
        return self._made["whole"]

    def _steps(self) -> ir.Value:
        if "steps" not in self._made:
            self._made["steps"] = self._add("Shape", [self.ids], start=1, end=2)
        return self._made["steps"]

    def _add(self, op: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
        return self.editor.add(self.first, op, inputs, attributes, name="mask").outputs[0]

    def _input(self, name: str) -> ir.Value | None:
        return next((value for value in self.editor.graph.inputs if value.name == name), None)

    def _add_mask_input(self) -> ir.Value:
        """The mask as Optimum declares it: the tracer drops it, because placeholders do not read it."""
        axes = ["batch_size", "past_sequence_length + sequence_length"]
        mask = ir.Value(name="attention_mask", shape=ir.Shape(axes), type=ir.TensorType(ir.DataType.INT64))
        self.editor.graph.inputs.insert(1, mask)
        return mask


def _name(bias: Bias | None) -> str:
    return "" if bias is None else f"{bias.value.name} {bias.scale}"


def unrepeated(value: ir.Value) -> ir.Value:
    """What a value repeats and takes one of, as models do with positions that images would tell apart."""
    node = value.producer()
    while node is not None and not node.domain and node.op_type in ("Expand", "Unsqueeze", "Slice", "Gather"):
        if node.inputs[0] is None:
            break
        value, node = node.inputs[0], node.inputs[0].producer()
    return value
