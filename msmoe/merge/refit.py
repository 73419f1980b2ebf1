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
from typing import Any, NamedTuple, Protocol

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

    space = ridge_space(rows, num_fitted)
    right = space.right(residuals)
    errors = {ridge: space.held_out_error(right, ridge) / total for ridge in ridges}
    before = float(residuals[num_fitted:].double().square().sum()) / total
    best = min(errors, key=lambda ridge: errors[ridge])
    if not errors[best] < before:
        return Refit(merged.output, None, num_fitted, num_held_out, before, before, total)
    output = merged.output + space.matrix(space.solve(right, best))
    return Refit(output, best, num_fitted, num_held_out, before, errors[best], total)


class RidgeSpace(Protocol):
    """Ridge regression of residuals (T, D) on rows H (T, F), the first N tokens fitted, the others held out.

    A ridge r stands for r m, with m the mean diagonal of H^T H over the tokens in use. What depends on the rows alone
    is computed once, and serves any residuals where it is kept. A solution has one row for each token or neuron.
    """

    def right(self, residuals: Tensor) -> Any:
        """What the equations need of residuals (T, D), the right-hand side `right` of the other methods."""
        ...

    def held_out_error(self, right: Any, ridge: float) -> float:
        """Squared error on the held-out tokens of the solution on the fitted ones."""
        ...

    def solve(self, right: Any, ridge: float, *, fitted_only: bool = False) -> Tensor:
        """Solution on all tokens, or on the fitted ones alone, float64."""
        ...

    def predict(self, solution: Tensor) -> Tensor:
        """What a solution gives for every token, (T, D) float32."""
        ...

    def matrix(self, solution: Tensor) -> Tensor:
        """A solution as a change of the output matrix, (D, F) float32."""
        ...


def ridge_space(rows: Tensor, num_fitted: int, *, keep: bool = False) -> RidgeSpace:
    """The cheaper space for rows (T, F): half of the tokens are fitted six times.

    Args:
        keep: hold the Gram matrix and its Cholesky factor for every ridge, to solve again for other residuals.
    """
    return (TokenSpace if len(rows) <= 2 * rows.shape[1] else NeuronSpace)(rows, num_fitted, keep=keep)


class TokenSpace:
    """W = A^T H with A = (H H^T + r m I)^-1 R: one Gram matrix (T, T) serves the search and the solution."""

    def __init__(self, rows: Tensor, num_fitted: int, *, keep: bool = False):
        self.rows, self.num_fitted, self.keep = rows, num_fitted, keep
        self.factors: dict[tuple[int, float], Tensor | None] = {}
        self.gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
        for block in rows.split(BLOCK, dim=1):
            self.gram += block @ block.T

    def right(self, residuals: Tensor) -> Tensor:
        return residuals.double()

    def held_out_error(self, right: Tensor, ridge: float) -> float:
        n = self.num_fitted
        predicted = self.gram[n:, :n] @ self.solve(right, ridge, fitted_only=True)
        return float((right[n:] - predicted).square().sum())

    def solve(self, right: Tensor, ridge: float, *, fitted_only: bool = False) -> Tensor:
        num_tokens = self.num_fitted if fitted_only else len(self.rows)
        return solve_factored(self._factor(num_tokens, ridge), right[:num_tokens])

    def predict(self, solution: Tensor) -> Tensor:
        return (self.gram[:, : len(solution)] @ solution).float()

    def matrix(self, solution: Tensor) -> Tensor:
        return solution.float().T @ self.rows[: len(solution)]

    def _factor(self, num_tokens: int, ridge: float) -> Tensor | None:
        if (num_tokens, ridge) in self.factors:
            return self.factors[num_tokens, ridge]
        gram = self.gram[:num_tokens, :num_tokens]
        gram = gram.clone() if num_tokens < len(self.gram) or self.keep else gram  # else this is its last use
        factor = shifted_factor(gram, ridge * (float(gram.diagonal().sum()) / self.rows.shape[1]))
        if self.keep:
            self.factors[num_tokens, ridge] = factor
        return factor


class Moments(NamedTuple):
    """H^T R (F, D) of the fitted and of the held-out tokens, and the squares of the held-out residuals."""

    fitted: Tensor
    held_out: Tensor
    held_out_square: float


class NeuronSpace:
    """W^T = (H^T H + r m I)^-1 H^T R, with the Gram matrices (F, F) and moments (F, D) of both halves."""

    def __init__(self, rows: Tensor, num_fitted: int, *, keep: bool = False):
        self.rows, self.num_fitted, self.keep = rows, num_fitted, keep
        self.factors: dict[tuple[bool, float], Tensor | None] = {}
        self.grams = [summed_products(h, h) for h in (rows[:num_fitted], rows[num_fitted:])]

    def right(self, residuals: Tensor) -> Moments:
        n = self.num_fitted
        halves = (self.rows[:n], residuals[:n]), (self.rows[n:], residuals[n:])
        return Moments(*(summed_products(h, r) for h, r in halves), float(halves[1][1].double().square().sum()))

    def held_out_error(self, right: Moments, ridge: float) -> float:
        solution = self.solve(right, ridge, fitted_only=True)
        explained = 2 * right.held_out - self.grams[1] @ solution
        return right.held_out_square - float((solution * explained).sum())

    def solve(self, right: Moments, ridge: float, *, fitted_only: bool = False) -> Tensor:
        moment = right.fitted if fitted_only else right.fitted + right.held_out
        return solve_factored(self._factor(fitted_only, ridge), moment)

    def predict(self, solution: Tensor) -> Tensor:
        return self.rows @ solution.float()

    def matrix(self, solution: Tensor) -> Tensor:
        return solution.T.float()

    def _factor(self, fitted_only: bool, ridge: float) -> Tensor | None:
        if (fitted_only, ridge) in self.factors:
            return self.factors[fitted_only, ridge]
        gram = self.grams[0].clone() if fitted_only else self.grams[0] + self.grams[1]
        factor = shifted_factor(gram, ridge * float(gram.diagonal().mean()))
        if self.keep:
            self.factors[fitted_only, ridge] = factor
        return factor


def summed_products(left: Tensor, right: Tensor) -> Tensor:
    """left^T right, float64, from float32 blocks of tokens."""
    total = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64)
    for a, b in zip(left.split(BLOCK), right.split(BLOCK), strict=True):
        total += a.T @ b
    return total


def solve_shifted(gram: Tensor, shift: float, right: Tensor) -> Tensor:
    """(gram + shift I)^-1 right; zero where gram is zero. Overwrites `gram`."""
    return solve_factored(shifted_factor(gram, shift), right)


def shifted_factor(gram: Tensor, shift: float) -> Tensor | None:
    """Cholesky factor of gram + shift I, None for a shift of 0: gram is zero then. Overwrites `gram`."""
    if shift == 0:
        return None
    gram.diagonal().add_(shift)
    return torch.linalg.cholesky(gram, out=gram)


def solve_factored(factor: Tensor | None, right: Tensor) -> Tensor:
    """Solution of the equations with a Cholesky factor; zero without one."""
    return torch.zeros_like(right) if factor is None else torch.cholesky_solve(right, factor)
