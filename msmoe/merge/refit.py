"""Refit: re-solve the output matrix of a merged expert so that it reproduces what the original experts gave.

Minimises sum_t w_t |g'_t wo h_t - y_t|^2 + ridge m |wo - wo_0|^2 over the tokens t of the group, where h_t is the
hidden activation of the merged expert, y_t the gate-weighted output of the token's original expert, g'_t the gate it
meets now, w_t the number of tokens that the sampled one stands for, wo_0 the merged matrix and m the mean diagonal of
the Gram matrix. Closed form. Half of the tokens are fitted for each candidate ridge, the held-out half chooses among
them, with "no refit" as a candidate; the chosen ridge is then solved once more on all tokens. Closely related to
MergeMoE (arXiv 2510.14436), which solves for equal gates and without a ridge.

Shapes: T tokens, N fitted tokens, F d_ff, D d_model.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from msmoe.layer.expert import Expert

RIDGES = (1e-3, 4e-3, 1.6e-2, 6.4e-2, 0.25, 1.0)
BLOCK = 512  # products of float32 blocks are added up in float64


@dataclass(frozen=True)
class Refit:
    """Result of a refit.

    Attributes:
        output: (D, F) float32 matrix; the merged one itself where no ridge was better on the held-out tokens.
        ridge: the chosen ridge, None without refit.
        num_fitted, num_held_out: tokens on either side.
        error_before, error_after: relative output error on the held-out tokens, sum_t w_t |g wo h - y|^2 /
            sum_t w_t |y|^2; `after` is that of the solution that never saw them.
        held_out_square: sum_t w_t |y|^2 over the held-out tokens: what the errors of groups are weighed by.
    """

    output: Tensor
    ridge: float | None
    num_fitted: int
    num_held_out: int
    error_before: float
    error_after: float
    held_out_square: float

    def describe(self) -> dict:
        """Everything but the matrix; errors that are unknown are None."""
        known = lambda value: None if isinstance(value, float) and math.isnan(value) else value
        return {name: known(value) for name, value in vars(self).items() if name != "output"}


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
    """Re-solve `merged.output` on tokens of its group; an output bias stays as it is.

    Solves in the space of tokens or of neurons, whichever is cheaper; products are accumulated in float64.

    Args:
        merged: the merged expert, float32.
        inputs: (T, D) inputs of the merged expert.
        gate: (T,) gate values that the merged expert's output will be multiplied by.
        targets: (T, D) gate-weighted outputs to reproduce.
        weights: (T,) tokens that each one stands for.
        held_out: (T,) bool, tokens that choose the ridge.
    """
    order = held_out.long().argsort(stable=True)  # fitted tokens first, so that both halves are slices
    num_fitted = int((~held_out).sum())
    scale = weights[order].double().sqrt().float()[:, None]
    rows = merged.hidden(inputs[order]).mul_(gate[order, None] * scale)
    wanted = targets[order] * scale
    total = float(wanted[num_fitted:].double().square().sum())
    if merged.output_bias is not None:
        wanted.sub_(gate[order, None] * scale * merged.output_bias)
    residuals = torch.addmm(wanted, rows, merged.output.T, alpha=-1)
    num_held_out = len(rows) - num_fitted
    if num_fitted == 0 or num_held_out == 0 or total == 0:
        unknown = float(residuals[num_fitted:].double().square().sum()) / total if total else float("nan")
        return Refit(merged.output, None, num_fitted, num_held_out, unknown, unknown, total)

    space = TokenSpace if len(rows) <= 2 * rows.shape[1] else NeuronSpace  # half of the tokens are fitted six times
    problem: Ridge = space(rows, residuals, num_fitted)
    errors = {ridge: problem.held_out_error(ridge) / total for ridge in ridges}
    before = float(residuals[num_fitted:].double().square().sum()) / total
    best = min(errors, key=lambda ridge: errors[ridge])
    if not errors[best] < before:
        return Refit(merged.output, None, num_fitted, num_held_out, before, before, total)
    return Refit(merged.output + problem.solve(best), best, num_fitted, num_held_out, before, errors[best], total)


class Ridge(Protocol):
    """Ridge regression of residuals (T, D) on rows H (T, F), the first N tokens fitted, the others held out.

    A ridge r stands for r m, with m the mean diagonal of H^T H over the tokens in use.
    """

    def __init__(self, rows: Tensor, residuals: Tensor, num_fitted: int): ...

    def held_out_error(self, ridge: float) -> float:
        """Squared error on the held-out tokens of the solution on the fitted ones."""
        ...

    def solve(self, ridge: float) -> Tensor:
        """Solution (D, F) float32 on all tokens."""
        ...


class TokenSpace:
    """W = A^T H with A = (H H^T + r m I)^-1 R: one Gram matrix (T, T) serves the search and the solution."""

    def __init__(self, rows: Tensor, residuals: Tensor, num_fitted: int):
        self.rows, self.residuals, self.num_fitted = rows, residuals.double(), num_fitted
        self.gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
        for block in rows.split(BLOCK, dim=1):
            self.gram += block @ block.T

    def _coefficients(self, num_tokens: int, ridge: float) -> Tensor:
        gram = self.gram[:num_tokens, :num_tokens]
        gram = gram.clone() if num_tokens < len(self.gram) else gram
        mean_diagonal = float(gram.diagonal().sum()) / self.rows.shape[1]
        return solve_shifted(gram, ridge * mean_diagonal, self.residuals[:num_tokens])

    def held_out_error(self, ridge: float) -> float:
        n = self.num_fitted
        predicted = self.gram[n:, :n] @ self._coefficients(n, ridge)
        return float((self.residuals[n:] - predicted).square().sum())

    def solve(self, ridge: float) -> Tensor:  # the last use of the Gram matrix: it is overwritten
        return self._coefficients(len(self.rows), ridge).float().T @ self.rows


class NeuronSpace:
    """W^T = (H^T H + r m I)^-1 H^T R, with the Gram matrices (F, F) and moments (F, D) of both halves."""

    def __init__(self, rows: Tensor, residuals: Tensor, num_fitted: int):
        halves = [(rows[:num_fitted], residuals[:num_fitted]), (rows[num_fitted:], residuals[num_fitted:])]
        self.grams = [summed_products(h, h) for h, _ in halves]
        self.moments = [summed_products(h, r) for h, r in halves]
        self.held_out_square = float(halves[1][1].double().square().sum())

    def held_out_error(self, ridge: float) -> float:
        solution = self._solution(self.grams[0], self.moments[0], ridge)
        explained = 2 * self.moments[1] - self.grams[1] @ solution
        return self.held_out_square - float((solution * explained).sum())

    def solve(self, ridge: float) -> Tensor:
        return self._solution(self.grams[0] + self.grams[1], self.moments[0] + self.moments[1], ridge).T.float()

    def _solution(self, gram: Tensor, moment: Tensor, ridge: float) -> Tensor:
        return solve_shifted(gram.clone(), ridge * float(gram.diagonal().mean()), moment)


def summed_products(left: Tensor, right: Tensor) -> Tensor:
    """left^T right, float64, from float32 blocks of tokens."""
    total = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64)
    for a, b in zip(left.split(BLOCK), right.split(BLOCK), strict=True):
        total += a.T @ b
    return total


def solve_shifted(gram: Tensor, shift: float, right: Tensor) -> Tensor:
    """(gram + shift I)^-1 right; zero where gram is zero. Overwrites `gram`."""
    if shift == 0:
        return torch.zeros_like(right)
    gram.diagonal().add_(shift)
    return torch.cholesky_solve(right, torch.linalg.cholesky(gram, out=gram))
