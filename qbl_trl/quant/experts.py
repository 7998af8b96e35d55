"""Experts of a mixture as linear layers of their own, where transformers keeps those of a layer in one tensor.

transformers 5 loads `experts.3.gate_proj.weight` of the files into a slice of `experts.gate_up_proj`, a parameter of
(experts, rows, columns) that no linear layer holds; 4.57 has few such models. Quantizers and adapters act on linear
layers, and the files (and 4.57) name those of each expert. So a module of stacked experts gives way to one with a
linear layer per expert and projection, under the names of the files.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qbl_trl.quant.modules import is_sharded

Parts = tuple[str, ...]


class Experts(nn.Module):
    """The experts of one layer: children "0", "1", ... that hold linear layers, and what is not separated as it was.

    Attributes:
        parts: names of the linear layers of an expert, by the name of the stacked tensor they came from.
        emptied: children that held nothing but stacked tensors which are separated by now; no modules of this one.
    """

    num_experts: int
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    is_concatenated: bool
    act_fn: nn.Module
    post_expert_norm: nn.Module
    place = ""  # the child that the experts are children of; none but this module

    def __init__(self, stacked: Any) -> None:
        """Takes over what `stacked` holds; `fill` separates its tensors."""
        super().__init__()
        self.parts: dict[str, Parts] = {}
        self.emptied: dict[str, nn.Module] = {}
        origin = copy.copy(stacked)  # its class and settings, to stack the experts again; no module of this one
        origin._parameters, origin._modules = {}, dict.fromkeys(stacked._modules)
        vars(self)["_origin"] = origin
        for name, value in vars(stacked).items():
            if not name.startswith("_"):
                setattr(self, name, value)
        self.num_experts = self.count(stacked)
        holders = {name.rpartition(".")[0] for name in self.tensors(stacked)}
        for name, child in stacked.named_children():
            self.add_module(name, _with_parameters_of_its_own(child) if name in holders else child)
        for name, parameter in stacked.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        if self.place:
            self.add_module(self.place, nn.Module().train(self.training))
        for index in range(self.num_experts):
            self.get_submodule(self.place).add_module(str(index), nn.Module().train(self.training))

    @classmethod
    def tensors(cls, stacked: Any) -> dict[str, Parts]:
        """The tensors that hold the experts, in the order of their use, and names for the layers made of each."""
        told = stacked if hasattr(stacked, "has_gate") else cls
        inner = "gate_up_proj" if told.has_gate else "up_proj"
        halves = ("gate_proj", "up_proj") if told.has_gate and told.is_concatenated else (inner,)
        return {inner: halves, "down_proj": ("down_proj",)}

    @classmethod
    def count(cls, stacked: Any) -> int:
        """How many experts a module stacks."""
        return int(stacked.num_experts)

    def expert(self, index: int) -> nn.Module:
        """What holds the linear layers of one expert."""
        return self.get_submodule(f"{self.place}.{index}".lstrip("."))

    def layers(self, name: str) -> list[str]:
        """Names of the linear layers that a stacked tensor became."""
        experts = [f"{self.place}.{index}".lstrip(".") for index in range(self.num_experts)]
        return [f"{expert}.{part}" for expert in experts for part in self.parts[name]]

    def matrices(self, name: str, weight: Tensor) -> Tensor:
        """A stacked tensor as (experts, rows, columns) of linear layers, in the same memory."""
        return weight.transpose(1, 2) if self.is_transposed else weight

    def fill(self, name: str, weight: Tensor, parts: Parts) -> list[str]:
        """Linear layers over slices of a stacked tensor, which they share memory with; returns their names."""
        self.parts[name] = parts
        path, _, own = name.rpartition(".")
        holder = self.get_submodule(path)
        holder._parameters.pop(own, None)
        if path and not holder._parameters:
            self.emptied[path] = holder
            del self._modules[path]
        order = [part for told in self.tensors(self._origin) for part in self.parts.get(told, ())]
        for index, matrix in enumerate(self.matrices(name, weight)):
            expert = self.expert(index)
            for part, rows in zip(parts, matrix.chunk(len(parts)), strict=True):
                layer = nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta").train(self.training)
                layer.weight = nn.Parameter(rows, requires_grad=False)
                layer.weight._is_hf_initialized = True  # type: ignore[attr-defined]
                setattr(expert, part, layer)
            # Whatever arrives first: optimizers count parameters.
            expert._modules = dict(sorted(expert._modules.items(), key=lambda item: order.index(item[0])))
        return self.layers(name)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(tokens, columns), each token's experts (tokens, k) and their weights (tokens, k) -> (tokens, columns).

        An index of num_experts or more asks no expert. Every expert is asked, if only for no token, while several
        processes train (each has to see the same parameters used) or gather weights of experts as they are asked for,
        and while a graph is traced.
        """
        answer = torch.zeros_like(hidden_states, dtype=torch.float32)
        for index, token, place in self.turns(top_k_index):
            output = self.answer_of(index, hidden_states[token])
            answer.index_add_(0, token, (output * top_k_weights[token, place, None]).float())
        return answer.to(hidden_states.dtype)

    def turns(self, top_k_index: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Experts in turn, each with the tokens that ask it and their places among what these tokens ask."""
        count = self.num_experts
        with torch.no_grad():  # (experts + 1, tokens, k)
            chosen = nn.functional.one_hot(top_k_index.clamp(max=count), count + 1).permute(2, 0, 1)
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        shared = several and (self.training or is_sharded(self.expert(0)))
        every = shared or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        for index in range(count) if every else chosen[:count].flatten(1).any(1).nonzero().flatten().tolist():
            token, place = torch.where(chosen[index])
            yield index, token, place

    def answer_of(self, index: int, x: Tensor) -> Tensor:
        """What one expert makes of its tokens, (tokens, columns) -> (tokens, columns)."""
        first, last = self.tensors(self._origin)
        inner = self.project(first, index, x)
        outer = self.project(last, index, self.gate(inner) if self.has_gate else self.act_fn(inner))
        return self.post_expert_norm(outer) if getattr(self, "has_post_expert_norm", False) else outer

    def gate(self, gate_up: Tensor) -> Tensor:
        """(tokens, 2 * inner) -> (tokens, inner), as the model has it."""
        gated: Tensor = type(self._origin)._apply_gate(self, gate_up)  # type: ignore[operator,union-attr]
        return gated

    def project(self, name: str, index: int, x: Tensor) -> Tensor:
        """What one expert's part of a stacked tensor makes of its tokens, by whatever it is by now."""
        if name in self.parts:
            expert = self.expert(index)
            y = torch.cat([getattr(expert, part)(x) for part in self.parts[name]], dim=-1)
        else:
            y = nn.functional.linear(x, self.matrices(name, self.get_parameter(name))[index])
        return y + getattr(self, f"{name}_bias")[index] if self.has_bias else y

    def stacked(self) -> nn.Module:
        """The module of transformers again; the linear layers hold float weights by now."""
        module = copy.copy(vars(self)["_origin"])
        module._parameters = dict(self._parameters)
        module._modules = {name: self._modules.get(name, self.emptied.get(name)) for name in module._modules}  # type: ignore[union-attr,operator]
        experts = [self.expert(index) for index in range(self.num_experts)]
        for name, parts in self.parts.items():
            path, _, own = name.rpartition(".")
            weight = torch.stack([torch.cat([getattr(expert, part).weight for part in parts]) for expert in experts])
            joined = nn.Parameter(self.joined(name, weight), requires_grad=False)
            module.get_submodule(path)._parameters[own] = joined
        return module.train(self.training)  # type: ignore[no-any-return]

    def joined(self, name: str, matrices: Tensor) -> Tensor:
        """(experts, rows, columns) of linear layers as the stacked tensor has them."""
        return self.matrices(name, matrices).contiguous()


def _with_parameters_of_its_own(module: nn.Module) -> nn.Module:
    """The same module, which can lose a parameter that this one keeps."""
    other = copy.copy(module)
    other._parameters = dict(module._parameters)
    other._is_hf_initialized = True  # type: ignore[assignment]  # how its class draws all of them anew is no longer right
    return other


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
