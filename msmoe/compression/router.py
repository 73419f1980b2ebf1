"""Router rows for a checkpoint that stores only the groups: E rows -> G rows.

`dominant` keeps the rows of the dominant experts, `mean` averages the rows of each group by its weights, `fit` trains
the rows on calibration tokens to choose the same groups with the same gate value. Where a token has several experts no
rows give all tokens what the plan says: the fitted ones are taken if they are closer to it than the dominant ones on
held-out tokens.

Shapes: E experts, G groups, S sampled tokens, K experts of a token, D d_model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from msmoe.calibration.stats import LayerStats
from msmoe.layer.routing import Router, SoftmaxTop1
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


def reduce_router(kind: str, router: Router, plan: LayerPlan, stats: LayerStats | None) -> RouterFit:
    """Router rows (G, D) of a layer's groups, in stored order.

    Args:
        kind: `dominant`, `mean` or `fit`; `fit` needs statistics.
        router: the original, with E rows.
    """
    groups, rows = [plan.groups[g] for g in plan.stored_order], router.rows
    if kind == "mean":
        reduced = torch.stack([torch.tensor(g.weights, dtype=rows.dtype) @ rows[list(g.members)] for g in groups])
    else:
        reduced = rows[[g.dominant for g in groups]]
    if stats is None:
        return RouterFit(reduced, float("nan"), float("nan"))
    if not isinstance(router, SoftmaxTop1):
        return reduce_any(kind, router, reduced, plan, stats)
    sample = stats.tokens()
    target, gate = torch.tensor(plan.expert_map)[sample.expert[:, 0]], sample.gate[:, 0]
    weights = sample.weights(stats.dispatched).float()
    if kind == "fit" and bool((~sample.held_out).any()):
        used = ~sample.held_out
        reduced = fit_rows(reduced, sample.routed_on[used], target[used], gate[used], weights[used])
    return measure(reduced, sample.routed_on, target, gate, weights, sample.held_out)


def reduce_any(kind: str, router: Router, rows: Tensor, plan: LayerPlan, stats: LayerStats) -> RouterFit:
    """As `reduce_router`, of a router of any kind, asked itself about the tokens."""
    sample, num_groups = stats.tokens(), len(plan.groups)
    narrow = router.keeping([plan.groups[g].dominant for g in plan.stored_order])
    wanted_SG = by_group(torch.tensor(plan.expert_map)[sample.expert], sample.gate, num_groups)
    weights, held_out = sample.weights(stats.dispatched).float(), sample.held_out
    candidates = [rows]
    if kind == "fit" and bool((~held_out).any()) and bool(held_out.any()):
        used = ~held_out
        candidates.append(fit_shares(rows, sample.routed_on[used], wanted_SG[used], weights[used]))
    used = held_out if bool(held_out.any()) else torch.ones_like(held_out)
    share = weights[used] / weights[used].sum().clamp(min=1e-30)
    fits = []
    for found in candidates:
        routing = narrow.with_rows(found)(sample.routed_on[used])
        given_SG, wanted = by_group(routing.experts, routing.weights, num_groups), wanted_SG[used]
        common = ((given_SG > 0) & (wanted > 0)).sum(1) / (wanted > 0).sum(1).clamp(min=1)
        error = (given_SG - wanted).square().sum(1)
        fits.append(RouterFit(found, float(share @ common), float((share @ error).sqrt())))
    return min(fits, key=lambda fit: fit.gate_error)


def by_group(groups: Tensor, weights: Tensor, num_groups: int) -> Tensor:
    """Weight (S, G) with which each token meets each group, of its choices (S, K)."""
    return weights.new_zeros(len(groups), num_groups).scatter_add_(1, groups, weights)


def fit_shares(rows: Tensor, inputs: Tensor, wanted: Tensor, weights: Tensor) -> Tensor:
    """Train rows (G, D): cross-entropy of their softmax to the shares in which tokens meet the groups, (S, G)."""
    weights = weights / weights.sum()
    shares = wanted / wanted.sum(1, keepdim=True).clamp(min=1e-30)
    fitted = rows.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([fitted], max_iter=MAX_ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = -(weights @ (shares * (inputs @ fitted.T).log_softmax(-1)).sum(1))
        loss.backward()
        return loss

    optimiser.step(closure)
    return fitted.detach()


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
