"""Refit: re-solve the output matrix of a merged expert so that it reproduces what the original experts gave.

Minimises sum_t w_t |g'_t wo h_t - y_t|^2 + ridge m |wo - wo_0|^2 over the tokens t of the group, where h_t is the
hidden activation of the merged expert, y_t the gate-weighted output of the token's original expert, g'_t the gate it
meets now, w_t the number of tokens that the sampled one stands for, wo_0 the merged matrix and m the mean diagonal of
the Gram matrix. Closed form. Half of the tokens are fitted for each candidate ridge, the held-out half chooses among
them, with "no refit" as a candidate; the chosen ridge is then solved once more on all tokens. Closely related to
MergeMoE (arXiv 2510.14436), which solves for equal gates and without a ridge.

Shapes: T tokens, N fitted tokens, F d_ff, D d_model.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from msmoe.families import Expert

RIDGES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)


@dataclass(frozen=True)
class Refit:
    """Result of a refit.

    Attributes:
        wo: (D, F) float32; the merged matrix itself where no ridge was better on the held-out tokens.
        ridge: the chosen ridge, None without refit.
        num_fitted, num_held_out: tokens on either side.
        error_before, error_after: relative output error on the held-out tokens, |g wo h - y|^2 / |y|^2; `after` is
            that of the solution that never saw them.
    """

    wo: Tensor
    ridge: float | None
    num_fitted: int
    num_held_out: int
    error_before: float
    error_after: float


def refit_output(
    merged: Expert,
    inputs: Tensor,
    gate: Tensor,
    targets: Tensor,
    weights: Tensor,
    held_out: Tensor,
    *,
    ridges: tuple[float, ...] = RIDGES,
) -> Refit:
    """Re-solve `merged.wo` on tokens of its group.

    Solves in the space of tokens or of neurons, whichever is smaller; products are accumulated in float64.

    Args:
        merged: the merged expert, float32.
        inputs: (T, D) inputs of the merged expert.
        gate: (T,) gate values that the merged expert's output will be multiplied by.
        targets: (T, D) gate-weighted outputs to reproduce.
        weights: (T,) tokens that each one stands for.
        held_out: (T,) bool, tokens that choose the ridge.
    """
    rows = merged.hidden(inputs) * gate[:, None]
    scale = weights.double().sqrt().float()[:, None]
    rows, targets = rows * scale, targets * scale
    fit, check = (rows[~held_out], targets[~held_out]), (rows[held_out], targets[held_out])
    total = float(check[1].double().square().sum())

    def error(wo: Tensor) -> float:
        return float((check[0] @ wo.T - check[1]).double().square().sum()) / total

    num_fitted, num_checked = len(fit[0]), len(check[0])
    if num_fitted == 0 or num_checked == 0 or total == 0:
        unknown = error(merged.wo) if total else float("nan")
        return Refit(merged.wo, None, num_fitted, num_checked, unknown, unknown)
    before = error(merged.wo)
    best = Refit(merged.wo, None, num_fitted, num_checked, before, before)
    solver = RidgeSolver(fit[0], fit[1] - fit[0] @ merged.wo.T)
    for ridge in ridges:
        wo = merged.wo + solver.solve(ridge)
        if (after := error(wo)) < best.error_after:
            best = Refit(wo, ridge, num_fitted, num_checked, before, after)
    if best.ridge is None:
        return best
    wo = merged.wo + RidgeSolver(rows, targets - rows @ merged.wo.T).solve(best.ridge)
    return replace(best, wo=wo) if error(wo) <= before else best


class RidgeSolver:
    """Ridge regression of residuals (N, D) on rows (N, F), for several ridges.

    W = R^T (K + r I)^-1 H with K = H H^T (N, N), or R^T H (H^T H + r I)^-1 with (F, F): one factorisation per ridge.
    """

    def __init__(self, rows: Tensor, residuals: Tensor):
        self.rows, self.residuals = rows.double(), residuals.double()
        self.dual = rows.shape[0] <= rows.shape[1]
        self.gram = self.rows @ self.rows.T if self.dual else self.rows.T @ self.rows
        # the mean diagonal of H^T H, whichever of the two Gram matrices is held
        self.mean_diagonal = float(self.gram.diagonal().sum()) / rows.shape[1]
        self.moment = self.residuals if self.dual else self.rows.T @ self.residuals

    def solve(self, ridge: float) -> Tensor:
        """Solution (D, F) float32 for a ridge relative to the mean diagonal of H^T H."""
        if self.mean_diagonal == 0:
            return torch.zeros(self.residuals.shape[1], self.rows.shape[1])
        shifted = self.gram.clone()
        shifted.diagonal().add_(ridge * self.mean_diagonal)
        factor = torch.linalg.cholesky(shifted)
        solution = torch.cholesky_solve(self.moment, factor).T
        return (solution @ self.rows if self.dual else solution).float()
