"""Expert scores: sums over routed tokens -> (E,), high for an expert worth keeping.

With f the output of an expert, g the gate value and X its dispatched calibration tokens. An expert that saw no token
scores 0 everywhere.

Shapes: E experts, D d_model.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from msmoe.calibration.stats import LayerStats
from msmoe.errors import UserError

Score = Callable[[LayerStats, int], Tensor]


def usage(stats: LayerStats, seed: int) -> Tensor:
    """Share of the layer's routed tokens."""
    return stats.usage_frequency


def gate_mass(stats: LayerStats, seed: int) -> Tensor:
    """Sum of g: usage weighted by what the layer really applies."""
    return stats.gate_mass


def ean_sum(stats: LayerStats, seed: int) -> Tensor:
    """Expert activation norm: sum of |f|."""
    return recorded(stats.output_norm_sum)


def ean_mean(stats: LayerStats, seed: int) -> Tensor:
    """Mean of |f| over the expert's tokens."""
    return per_token(recorded(stats.output_norm_sum), stats)


def weighted_ean(stats: LayerStats, seed: int) -> Tensor:
    """Sum of g |f|."""
    return recorded(stats.gated_norm_sum)


def reap(stats: LayerStats, seed: int) -> Tensor:
    """Mean of g |f| over the expert's tokens (REAP, arXiv 2510.13999, equation 9); g is not renormalised at top-1."""
    return per_token(recorded(stats.gated_norm_sum), stats)


def mone(stats: LayerStats, seed: int) -> Tensor:
    """Usage times the variance of f, the trace of its covariance (MoNE, arXiv 2507.00390).

    What is lost by giving every token of the expert the same mean output.
    """
    total, square = recorded(stats.output_sum), recorded(stats.output_square_sum)
    variance = per_token(square, stats) - per_token(total, stats).square().sum(1)
    return stats.usage_frequency * variance.clamp(min=0)


def random(stats: LayerStats, seed: int) -> Tensor:
    """Uniform random numbers, seeded."""
    return torch.from_numpy(np.random.default_rng([seed, stats.num_experts]).random(stats.num_experts))


SCORES: dict[str, Score] = {
    "usage": usage,
    "gate-mass": gate_mass,
    "ean-sum": ean_sum,
    "ean-mean": ean_mean,
    "weighted-ean": weighted_ean,
    "reap": reap,
    "mone": mone,
    "random": random,
}


def score_experts(name: str, stats: LayerStats, *, seed: int = 0) -> Tensor:
    """Scores (E,) float64 of a layer's experts, high for one worth keeping.

    Args:
        name: a key of `SCORES`.
        seed: for `random`.

    Raises:
        UserError: if the score needs statistics that were not recorded.
    """
    return SCORES[name](stats, seed).double()


def shares(scores: Tensor) -> Tensor:
    """Non-negative scores (E,) as shares of their sum, what layers are compared by; uniform where all are 0."""
    total = scores.sum()
    return scores / total if total > 0 else torch.full_like(scores, 1 / len(scores))


def per_token(sums: Tensor, stats: LayerStats) -> Tensor:
    """Sums (E, ...) over the dispatched tokens of each expert, 0 where there are none."""
    count = stats.dispatched.clamp(min=1).double()
    return sums / (count if sums.ndim == 1 else count[:, None])


def mean_output(stats: LayerStats) -> Tensor:
    """Mean output (E, D) float64 of each expert over its own dispatched tokens, before the gate."""
    return per_token(recorded(stats.output_sum), stats)


def recorded(sums: Tensor | None) -> Tensor:
    if sums is None:
        raise UserError("the statistics hold no expert outputs: make them again with this version's `msmoe profile`")
    return sums
