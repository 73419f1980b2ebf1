"""Router rows for a checkpoint that stores only the groups: E rows -> G rows.

`dominant` keeps the rows of the dominant experts, `mean` averages the rows of each group by its weights, `fit` trains
the rows on calibration tokens to choose the same groups with the same gate value. For routers that give a token one
expert, at its softmax probability.

Shapes: E experts, G groups, S sampled tokens, D d_model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from msmoe.calibration.stats import LayerStats
from msmoe.planning.plan import LayerPlan

ROUTERS = ("fit", "dominant", "mean")
MAX_ITERATIONS = 200


@dataclass(frozen=True)
class RouterFit:
    """G router rows, and how well they stand for the original E.

    Attributes:
        rows: (G, D) float32, in stored order.
        agreement: share of held-out tokens sent to the group of their original expert.
        gate_error: root mean square difference to the original gate value on held-out tokens.
    """

    rows: Tensor
    agreement: float
    gate_error: float


def reduce_router(kind: str, rows: Tensor, plan: LayerPlan, stats: LayerStats | None) -> RouterFit:
    """Router rows (G, D) of a layer's groups, in stored order.

    Args:
        kind: `dominant`, `mean` or `fit`; `fit` needs statistics.
        rows: (E, D) original rows.
    """
    groups = [plan.groups[g] for g in plan.stored_order]
    if kind == "mean":
        reduced = torch.stack([torch.tensor(g.weights, dtype=rows.dtype) @ rows[list(g.members)] for g in groups])
    else:
        reduced = rows[[g.dominant for g in groups]]
    if stats is None:
        return RouterFit(reduced, float("nan"), float("nan"))
    sample = stats.tokens()
    target, gate = torch.tensor(plan.expert_map)[sample.expert[:, 0]], sample.gate[:, 0]
    weights = sample.weights(stats.dispatched).float()
    if kind == "fit" and bool((~sample.held_out).any()):
        used = ~sample.held_out
        reduced = fit_rows(reduced, sample.routed_on[used], target[used], gate[used], weights[used])
    return measure(reduced, sample.routed_on, target, gate, weights, sample.held_out)


def fit_rows(rows: Tensor, inputs: Tensor, target: Tensor, gate: Tensor, weights: Tensor) -> Tensor:
    """Train rows (G, D): squared error of the gate value, plus the lead of a wrongly chosen group's logit."""
    weights = weights / weights.sum()
    fitted = rows.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([fitted], max_iter=MAX_ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        logits = inputs @ fitted.T
        wanted = logits.gather(1, target[:, None]).squeeze(1)
        probability = (wanted - logits.logsumexp(-1)).exp()
        loss = weights @ ((probability - gate).square() + logits.amax(-1) - wanted)
        loss.backward()
        return loss

    optimiser.step(closure)
    return fitted.detach()


def measure(rows: Tensor, inputs: Tensor, target: Tensor, gate: Tensor, weights: Tensor, held_out: Tensor) -> RouterFit:
    """Agreement and gate error on the held-out tokens; on all tokens if none is held out."""
    used = held_out if bool(held_out.any()) else torch.ones_like(held_out)
    value, choice = (inputs[used] @ rows.T).softmax(-1).max(-1)
    share = weights[used] / weights[used].sum().clamp(min=1e-30)
    agreement = float(share @ (choice == target[used]).float())
    return RouterFit(rows, agreement, float((share @ (value - gate[used]).square()).sqrt()))
