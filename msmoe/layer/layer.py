"""A layer as its tokens meet it: a router, where each of its rows leads, and the experts that are stored.

Shapes: R router rows, G stored experts, C constants, T tokens, K experts of a token, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from msmoe.layer.expert import Expert
from msmoe.layer.routing import Router, Routing
from msmoe.layer.tokens import TokenSample


@dataclass(frozen=True)
class Layer:
    """A layer, original or compressed.

    Attributes:
        router: with R rows.
        targets: (R,) int64 where each row leads: a stored expert, or G plus a position in `constants`.
        num_stored: G; expert: loads one of them, float32.
        constants: (C, D) outputs in place of experts.
    """

    router: Router
    targets: Tensor
    num_stored: int
    expert: Callable[[int], Expert]
    constants: Tensor

    def route(self, sample: TokenSample, original: Layer) -> Routing:
        """Where the layer sends sampled tokens, by `targets`.

        Args:
            original: the layer that the sample was recorded at: where the routers are the same, the record is taken,
                free of rounding.
        """
        if self.router.equals(original.router):
            return Routing(self.targets[sample.expert], sample.gate)
        rows, weights = self.router(sample.routed_on)
        return Routing(self.targets[rows], weights)

    def run(self, inputs: Tensor, routing: Routing, *, visit: Callable[[Expert], None] | None = None) -> Tensor:
        """Outputs (T, D) of tokens (T, D): sums of weighted expert outputs; one expert in memory at a time.

        Args:
            routing: by `targets`; several choices of a token may lead to the same expert, and their weights add up.
            visit: called with every stored expert; without it, experts of no token are not loaded.
        """
        outputs = torch.zeros_like(inputs)
        for g in range(self.num_stored):
            chosen = routing.experts == g
            rows = chosen.any(1).nonzero().flatten()
            if len(rows) or visit:
                expert = self.expert(g)
                weights = (routing.weights * chosen)[rows].sum(1, keepdim=True)
                outputs.index_add_(0, rows, expert(inputs[rows]) * weights)
                if visit:
                    visit(expert)
        rows, columns = (routing.experts >= self.num_stored).nonzero(as_tuple=True)
        constants = self.constants[routing.experts[rows, columns] - self.num_stored]
        return outputs.index_add_(0, rows, constants * routing.weights[rows, columns, None])
