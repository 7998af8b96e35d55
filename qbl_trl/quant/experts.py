"""Experts of a mixture as linear layers of their own, where transformers keeps those of a layer in one tensor.

transformers 5 loads `experts.3.gate_proj.weight` of the files into a slice of `experts.gate_up_proj`, a parameter of
(experts, rows, columns) that no linear layer holds; 4.57 has few such models. Quantizers and adapters act on linear
layers, and the files (and 4.57) name those of each expert. So a module of stacked experts gives way to one with a
linear layer per expert and projection, under the names of the files.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from qbl_trl.quant.modules import is_sharded

Parts = tuple[str, ...]


class Experts(nn.Module):
    """The experts of one layer: children "0", "1", ... that hold linear layers, and what is not separated as it was.

    Attributes:
        parts: names of the linear layers of an expert, by the name of the stacked tensor they came from.
    """

    num_experts: int
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    is_concatenated: bool
    act_fn: nn.Module
    post_expert_norm: nn.Module

    def __init__(self, stacked: Any) -> None:
        """Takes over what `stacked` holds; `fill` separates its tensors."""
        super().__init__()
        self.parts: dict[str, Parts] = {}
        origin = copy.copy(stacked)  # its class and settings, to stack the experts again; no module of this one
        origin._parameters = {}
        vars(self)["_origin"] = origin
        for name, value in vars(stacked).items():
            if not name.startswith("_"):
                setattr(self, name, value)
        for name, child in stacked.named_children():
            self.add_module(name, child)
        for name, parameter in stacked.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for index in range(self.num_experts):
            self.add_module(str(index), nn.Module().train(self.training))

    def fill(self, name: str, weight: Tensor, parts: Parts) -> list[str]:
        """Linear layers over slices of a stacked tensor, which they share memory with; returns their names."""
        self.parts[name] = parts
        self._parameters.pop(name, None)
        for index, matrix in enumerate(weight.transpose(1, 2) if self.is_transposed else weight):
            expert = self.get_submodule(str(index))
            for part, rows in zip(parts, matrix.chunk(len(parts)), strict=True):
                layer = nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta").train(self.training)
                layer.weight = nn.Parameter(rows, requires_grad=False)
                layer.weight._is_hf_initialized = True  # type: ignore[attr-defined]
                setattr(expert, part, layer)
            last = self.parts.get("down_proj", ())  # whatever arrives first: optimizers count parameters
            expert._modules = dict(sorted(expert._modules.items(), key=lambda item: item[0] in last))
        return [f"{index}.{part}" for index in range(len(weight)) for part in parts]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(tokens, columns), each token's experts (tokens, k) and their weights (tokens, k) -> (tokens, columns).

        An index of num_experts or more asks no expert. Every expert is asked, if only for no token, while several
        processes train (each has to see the same parameters used) or gather weights of experts as they are asked for,
        and while a graph is traced.
        """
        count = self.num_experts
        with torch.no_grad():  # (experts + 1, tokens, k)
            chosen = nn.functional.one_hot(top_k_index.clamp(max=count), count + 1).permute(2, 0, 1)
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        shared = several and (self.training or is_sharded(self.get_submodule("0")))
        every = shared or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        answer = torch.zeros_like(hidden_states, dtype=torch.float32)
        for index in range(count) if every else chosen[:count].flatten(1).any(1).nonzero().flatten().tolist():
            token, place = torch.where(chosen[index])
            output = self.answer_of(index, hidden_states[token])
            answer.index_add_(0, token, (output * top_k_weights[token, place, None]).float())
        return answer.to(hidden_states.dtype)

    def answer_of(self, index: int, x: Tensor) -> Tensor:
        """What one expert makes of its tokens, (tokens, columns) -> (tokens, columns)."""
        inner = self._project("gate_up_proj" if self.has_gate else "up_proj", index, x)
        outer = self._project("down_proj", index, self.gate(inner) if self.has_gate else self.act_fn(inner))
        return self.post_expert_norm(outer) if getattr(self, "has_post_expert_norm", False) else outer

    def gate(self, gate_up: Tensor) -> Tensor:
        """(tokens, 2 * inner) -> (tokens, inner), as the model has it."""
        gated: Tensor = type(self._origin)._apply_gate(self, gate_up)  # type: ignore[operator,union-attr]
        return gated

    def _project(self, name: str, index: int, x: Tensor) -> Tensor:
        if name in self.parts:
            expert = self.get_submodule(str(index))
            y = torch.cat([getattr(expert, part)(x) for part in self.parts[name]], dim=-1)
        else:
            weight = getattr(self, name)[index]
            y = x @ weight if self.is_transposed else nn.functional.linear(x, weight)
        return y + getattr(self, f"{name}_bias")[index] if self.has_bias else y

    def stacked(self) -> nn.Module:
        """The module of transformers again; the linear layers hold float weights by now."""
        module = copy.copy(vars(self)["_origin"])
        module._parameters = dict(self._parameters)
        experts = [self.get_submodule(str(index)) for index in range(self.num_experts)]
        for name, parts in self.parts.items():
            weight = torch.stack([torch.cat([getattr(expert, part).weight for part in parts]) for expert in experts])
            weight = weight.transpose(1, 2).contiguous() if self.is_transposed else weight
            module._parameters[name] = nn.Parameter(weight, requires_grad=False)
        return module.train(self.training)  # type: ignore[no-any-return]


class TransposedExperts(Experts):
    """Those of models that do not follow transformers' interface, and store columns before rows."""

    has_gate, has_bias, is_transposed, is_concatenated = True, False, True, True

    def gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up


class Llama4Experts(TransposedExperts):
    """Llama 4, whose block hands every expert all tokens, scaled by their weights."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """(experts * tokens, columns) -> the same."""
        inputs = hidden_states.unflatten(0, (self.num_experts, -1))
        return torch.cat([self.answer_of(index, x) for index, x in enumerate(inputs)])


class DenseWeightExperts(TransposedExperts):
    """Qwen3-VL-MoE in transformers 4.57, whose weights are there for every expert, zero for those not chosen."""

    def forward(self, hidden_states: Tensor, routing_weights: Tensor, router_indices: Tensor) -> Tensor:
        """(batch, tokens, columns), (batch * tokens, experts), (batch * tokens, k) -> (batch, tokens, columns)."""
        weights = routing_weights.gather(1, router_indices)
        return super().forward(hidden_states.flatten(0, -2), router_indices, weights).view_as(hidden_states)


class GptOssExperts(DenseWeightExperts):
    """GPT-OSS in transformers 4.57: the same, with biases, gate and up in turns, and a gate of its own."""

    has_bias, is_concatenated = True, False
    alpha: float
    limit: float

    def gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up[..., ::2].clamp(max=self.limit), gate_up[..., 1::2].clamp(-self.limit, self.limit)
        return (up + 1) * gate * torch.sigmoid(gate * self.alpha)
