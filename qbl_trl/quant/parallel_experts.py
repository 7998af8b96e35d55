"""Experts that transformers stacks in other ways than in one module of tensors with three dimensions.

GraniteMoe (in 4.57) and JetMoe sort their tokens by expert and split them by how many each has, numbers that no trace
follows; router and experts are one module. JetMoe's queries and outputs of attention have experts, too. DBRX lays the
experts' matrices one below the other.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qbl_trl.generation import BEFORE_5
from qbl_trl.quant.experts import Experts, Parts

Choice = tuple[Tensor, Tensor]  # each token's experts (tokens, k), and their weights


class ParallelExperts(Experts):
    """The mixture of GraniteMoe in transformers 4.57 and of JetMoe; experts where transformers 5 has GraniteMoe's."""

    has_gate, has_bias, is_transposed, is_concatenated = True, False, False, True
    place = "experts"
    router: nn.Module
    activation: nn.Module

    @classmethod
    def tensors(cls, _: Any) -> dict[str, Parts]:
        return {"input_linear.weight": ("gate_proj", "up_proj"), "output_linear.weight": ("down_proj",)}

    @classmethod
    def count(cls, stacked: Any) -> int:
        return int(stacked.input_linear.num_experts)

    def forward(self, layer_input: Tensor) -> Any:  # type: ignore[override]
        """(batch, tokens, columns) -> the same, and in transformers 4.57 the router's logits beside it."""
        x = layer_input.flatten(0, 1)
        logits, (index, weights) = route(self.router, x)
        answer = super().forward(x, index, weights).view_as(layer_input)
        bias = self._parameters.get("bias")
        answer = answer if bias is None else answer + bias
        return (answer, logits) if BEFORE_5 else answer

    def gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        gated: Tensor = self.activation(gate) * up
        return gated


class AttentionExperts(Experts):
    """JetMoe's queries and outputs of attention: heads of each of the experts that a token asks."""

    has_gate, has_bias, is_transposed = False, False, False
    router: nn.Module
    bias: Tensor

    @classmethod
    def tensors(cls, _: Any) -> dict[str, Parts]:
        return {"input_linear.weight": ("q_proj",), "output_linear.weight": ("o_proj",)}

    def map(self, layer_input: Tensor) -> tuple[Tensor, Tensor, Choice]:
        """(batch, tokens, columns) -> queries (batch, tokens, k, inner), logits of the router, and its choice."""
        x = layer_input.flatten(0, 1)
        logits, choice = route(self.router, x)
        index, _ = choice
        several = index.shape[1]
        queries = x.new_zeros(x.shape[0] * several, self.hidden_size)  # type: ignore[call-overload]
        for expert, head, _ in self.turns(index.reshape(-1, 1)):
            output = self.project("input_linear.weight", expert, x[head // several])
            queries.index_add_(0, head, output.to(x.dtype))
        return queries.view(*layer_input.shape[:2], several, -1), logits, choice

    def reduce(self, layer_input: Tensor, choice: Choice) -> Tensor:
        """(batch, tokens, k, inner) -> (batch, tokens, columns)."""
        index, weights = choice
        x = layer_input.flatten(0, 1)
        answer = torch.zeros(x.shape[0], self.input_size, dtype=torch.float32, device=x.device)  # type: ignore[call-overload]
        for expert, token, place in self.turns(index):
            output = self.project("output_linear.weight", expert, x[token, place])
            answer.index_add_(0, token, (output * weights[token, place, None]).float())
        return answer.to(x.dtype).view(*layer_input.shape[:2], -1) + self.bias


class DbrxExperts(Experts):
    """DBRX, whose tensors have two dimensions."""

    has_gate, has_bias, is_transposed, is_concatenated = True, False, False, False

    @classmethod
    def tensors(cls, _: Any) -> dict[str, Parts]:
        return {"mlp.w1": ("w1",), "mlp.v1": ("v1",), "mlp.w2": ("w2",)}

    @classmethod
    def count(cls, stacked: Any) -> int:
        return int(stacked.mlp.moe_num_experts)

    def forward(self, hidden_states: Tensor, *choice: Tensor) -> Tensor:  # type: ignore[override]
        """(batch, tokens, columns) -> the same; `choice` ends with experts and weights, in an order of its own each."""
        weights, index = choice[-2:] if BEFORE_5 else choice[::-1]
        return super().forward(hidden_states.flatten(0, -2), index, weights).view_as(hidden_states)

    def answer_of(self, index: int, x: Tensor) -> Tensor:
        gate, up = self.project("mlp.w1", index, x), self.project("mlp.v1", index, x)
        holder: Any = self._modules.get("mlp") or self.emptied["mlp"]
        return self.project("mlp.w2", index, holder.activation_fn(gate) * up)

    def matrices(self, name: str, weight: Tensor) -> Tensor:
        weight = weight.unflatten(0, (self.num_experts, -1))
        return weight.transpose(1, 2) if name == "mlp.w2" else weight

    def joined(self, name: str, matrices: Tensor) -> Tensor:
        return (matrices.transpose(1, 2) if name == "mlp.w2" else matrices).flatten(0, 1)


def route(router: nn.Module, x: Tensor) -> tuple[Tensor, Choice]:
    """The router's logits (tokens, experts), and its choice before it is sorted by expert."""
    logits = router(x)[-1]
    chosen, index = logits.topk(router.top_k, dim=1)
    return logits, (index, torch.softmax(chosen, dim=1).type_as(x))
