"""REPAIR (arXiv 2211.08403): give the hidden units of a merged expert the spread that its members' units have.

Averaging n units of pairwise correlation r leaves the variance (1 + (n - 1) r) / n. The scale of a unit's
pre-activation is folded into its row of the input matrix. With a bias the mean is restored as well; without, it moves
along with the scale.

Pre-activations are linear in the inputs, so the variance of unit f is wi_f C wi_f^T with C the covariance of the
inputs: one (D, D) matrix serves all matrices of all members, and no hidden activation is computed.

Shapes: T tokens, F d_ff, D d_model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from msmoe.layer.expert import BIAS, Expert

BLOCK = 512
CONSTANT = 1e-12  # a variance below this share of the largest possible one is rounding


@dataclass(frozen=True)
class Repair:
    """What a repair did.

    Attributes:
        mean_ratio: mean over the rescaled pre-activations of goal by measured standard deviation; 1.0 if there are
            none.
        num_constant: pre-activations whose scale is left alone because they are constant on the tokens, in the merged
            expert or in every member.
    """

    mean_ratio: float
    num_constant: int


def repair(
    merged: Expert,
    members: Sequence[Expert],
    weights: Sequence[float],
    inputs: Tensor,
    token_weights: Tensor | None = None,
) -> tuple[Expert, Repair]:
    """Scale the rows of the input matrices so that pre-activations have the members' standard deviation.

    The goal of a unit is the weighted mean of the members' standard deviations, and where there is a bias also that of
    their means; the output is untouched.

    Args:
        merged: the merged expert.
        members: the experts it was made of, in its neuron order.
        weights: their weights, summing to 1.
        inputs: (T, D) tokens; fewer than two leave the expert as it is.
        token_weights: (T,) tokens that each one stands for, 1 by default.
    """
    mean, covariance = input_moments(inputs, token_weights)
    repaired, ratios = dict(merged.inputs), []
    for role, matrix in merged.matrices.items():
        measured = standard_deviation(matrix, covariance)
        goal = torch.zeros_like(measured)
        for member, weight in zip(members, weights, strict=True):
            goal += weight * standard_deviation(member.inputs[role], covariance)
        varies = (measured > 0) & (goal > 0)
        ratio = torch.where(varies, goal, 1.0) / torch.where(varies, measured, 1.0)
        ratios.append(torch.where(varies, ratio, torch.nan))
        repaired[role] = matrix * ratio.to(matrix.dtype)[:, None]
        if role + BIAS in repaired:
            wanted = sum(w * preactivation_mean(m, role, mean) for m, w in zip(members, weights, strict=True))
            moved = repaired[role].double() @ mean
            repaired[role + BIAS] = (wanted - moved).to(matrix.dtype) if len(inputs) else repaired[role + BIAS]
    ratio = torch.cat(ratios)
    varies = ~ratio.isnan()
    mean_ratio = float(ratio[varies].mean()) if varies.any() else 1.0
    return replace(merged, inputs=repaired), Repair(mean_ratio, int((~varies).sum()))


def preactivation_mean(expert: Expert, role: str, mean: Tensor) -> Tensor:
    """Means (F,) of the pre-activations of an input matrix with a bias, float64, given that of the inputs (D,)."""
    return expert.inputs[role].double() @ mean + expert.inputs[role + BIAS]


def input_moments(inputs: Tensor, token_weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of the inputs, float64; zeros without tokens of positive weight."""
    weights = torch.ones(len(inputs)) if token_weights is None else token_weights
    total = float(weights.double().sum())
    covariance = torch.zeros(inputs.shape[1], inputs.shape[1], dtype=torch.float64)
    mean = torch.zeros(inputs.shape[1], dtype=torch.float64)
    if total == 0:
        return mean, covariance
    share = weights.double() / total
    for x_TD, share_T in zip(inputs.split(BLOCK), share.split(BLOCK), strict=True):
        mean += share_T @ x_TD.double()
    for x_TD, share_T in zip(inputs.split(BLOCK), share.split(BLOCK), strict=True):
        centred = (x_TD.double() - mean) * share_T.sqrt()[:, None]
        covariance.addmm_(centred.T, centred)
    return mean, covariance


def standard_deviation(matrix: Tensor, covariance: Tensor) -> Tensor:
    """Standard deviations (F,) of the pre-activations x W^T, float64; exactly 0 for a unit that is constant."""
    rows = matrix.double()
    variance = ((rows @ covariance) * rows).sum(1)
    largest = rows.square().sum(1) * covariance.diagonal().sum()
    return variance.masked_fill(variance <= CONSTANT * largest, 0.0).sqrt()
