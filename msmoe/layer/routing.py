"""How a router chose: for every token k experts and their weights.

Shapes: T tokens, K chosen experts of a token, E experts, D d_model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn


class Routing(NamedTuple):
    """Where tokens go.

    Attributes:
        experts: (T, K) int64, all different for a token; weights: (T, K) what the experts' outputs are multiplied by,
            0 for a choice that is dropped.
    """

    experts: Tensor
    weights: Tensor


class Routed(NamedTuple):
    """What an MoE layer was seen to do with a batch, heard where its experts are called.

    Attributes:
        inputs: (T, D) of the experts.
        experts: (T, K) int64; weights: (T, K), after scores, groups, biases and scaling.
        logits: (T, E) raw scores of the router, before softmax, sigmoid and selection biases.
        router_inputs: (T, D') what the router saw, where that is not `inputs`; else `inputs` itself.
        dispatched: (T, K) bool, False where an expert was over capacity; None where nothing is dropped.
    """

    inputs: Tensor
    experts: Tensor
    weights: Tensor
    logits: Tensor
    router_inputs: Tensor
    dispatched: Tensor | None = None


@dataclass(frozen=True)
class ExpertOutputs:
    """Modules of a model at which the outputs of its experts can be seen, by layer.

    Attributes:
        calls: called as `experts(inputs, chosen, weights)`, (T, D), (T, K) and (T, K), giving the weighted sum (T, D).
        layers: give the output of the one expert that a token chose times its weight, and nothing else.
        repeats: of those that are called with all tokens several times over, how often; their outputs add up.
    """

    calls: dict[str, nn.Module] = field(default_factory=dict)
    layers: dict[str, nn.Module] = field(default_factory=dict)
    repeats: dict[str, int] = field(default_factory=dict)


class Router(Protocol):
    """A router of one layer, to be asked about tokens without the model.

    Attributes:
        rows: (E, D) what logits are inner products with.
    """

    rows: Tensor
    num_experts: int
    top_k: int

    def logits(self, inputs: Tensor) -> Tensor:
        """Raw scores (T, E) of tokens (T, D)."""
        ...

    def __call__(self, inputs: Tensor) -> Routing:
        """Route tokens (T, D)."""
        ...

    def keeping(self, rows: Sequence[int]) -> Router:
        """The router that is left with some of the rows, in the order given: it chooses among these."""
        ...

    def with_rows(self, rows: Tensor) -> Router:
        """The same router with other rows, as many."""
        ...

    def equals(self, other: Router) -> bool:
        """Whether both are the same, bit for bit."""
        ...


@dataclass(frozen=True)
class SoftmaxTop1:
    """Switch: the largest logit, at its softmax probability.

    Attributes:
        rows: (E, D) float32; bias: (E,), where the router has any.
    """

    rows: Tensor
    bias: Tensor | None = None
    top_k: int = 1

    @property
    def num_experts(self) -> int:
        return len(self.rows)

    def logits(self, inputs: Tensor) -> Tensor:
        logits = inputs @ self.rows.T
        return logits if self.bias is None else logits + self.bias

    def __call__(self, inputs: Tensor) -> Routing:
        weights, experts = self.logits(inputs).softmax(-1).max(-1, keepdim=True)
        return Routing(experts, weights)

    def keeping(self, rows: Sequence[int]) -> SoftmaxTop1:
        kept = list(rows)
        return SoftmaxTop1(self.rows[kept], None if self.bias is None else self.bias[kept])

    def with_rows(self, rows: Tensor) -> SoftmaxTop1:
        return SoftmaxTop1(rows, self.bias)

    def equals(self, other: Router) -> bool:
        if not isinstance(other, SoftmaxTop1) or (self.bias is None) != (other.bias is None):
            return False
        same_bias = self.bias is None or other.bias is None or torch.equal(self.bias, other.bias)
        return same_bias and torch.equal(self.rows, other.rows)
