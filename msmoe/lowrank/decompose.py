"""Singular vectors of expert matrices, weighted by what the experts see and by what becomes of their outputs.

What is minimised is the error of the outputs, |X (W - W')^T D|^2 over the tokens X that the expert saw, not of the
weights: the decomposition of D W G^(1/2), with G = X^T X + ridge I and D a scale per output row. Without tokens
G = I: the plain decomposition of MC-SMoE (arXiv 2310.01334). Neither root is ever inverted: with P the first R left
singular vectors the best matrix of rank R is D^-1 P P^T D W. One symmetric eigenproblem on the smaller side of each
matrix gives them exactly (float64), and the error at every rank and number of kept rows at no further cost.

Shapes: G experts, O outputs, I inputs, N = min(O, I), T tokens, R rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-2  # of the mean diagonal of X^T X: directions that few tokens show are not given up
TINY = 1e-300
NOISE = 1e-13  # of the largest energy: below it an eigenvalue of the Gram matrix is rounding, and has no vector


@dataclass(frozen=True)
class Decomposition:
    """Left singular vectors of the scaled and whitened matrices of G experts.

    Attributes:
        left: (G, O, N) float32, orthonormal columns, largest singular value first.
        energy: (G, N) float64, squared singular values.
        row_energy: (G, O) float64, squared norms of the rows; their sum is that of all of `energy`.
        row_scale: (G, O) float32, the scale D.
    """

    left: Tensor
    energy: Tensor
    row_energy: Tensor
    row_scale: Tensor

    def row_errors(self, rank: int) -> Tensor:
        """(G, O) float64: squared error that rank R leaves in each output row, and that keeping the row removes."""
        captured = self.left[..., :rank].double().square() @ self.energy[:, :rank, None]
        return (self.row_energy - captured[..., 0]).clamp(min=0)

    def captured(self, rank: int) -> Tensor:
        """(G,) share of the energy that rank R holds; 1 for a matrix of zeros."""
        total = self.row_energy.sum(-1)
        return torch.where(total > 0, self.energy[:, :rank].sum(-1) / total.clamp(min=TINY), 1.0).clamp(max=1)

    def cut(self, rank: int) -> "Decomposition":
        """The same without the vectors beyond a rank that will not be asked for."""
        return Decomposition(self.left[..., :rank].clone(), self.energy[:, :rank], self.row_energy, self.row_scale)


def decompose(
    weights: Tensor, inputs: Sequence[Tensor] | None = None, *, row_scale: Tensor | None = None, ridge: float = RIDGE
) -> Decomposition:
    """Decompose the matrices of several experts at once.

    Args:
        weights: (G, O, I) float32.
        inputs: per expert the tokens (T, I) that it saw, each multiplied by the square root of its weight; an expert
            without tokens, and every expert if None, gets the plain decomposition.
        row_scale: (G, O) positive, how much an error of each output row counts; 1 if None.
        ridge: see `RIDGE`.
    """
    num_experts, num_outputs, num_inputs = weights.shape
    scale = weights.new_ones(num_experts, num_outputs) if row_scale is None else row_scale
    tokens = [None] * num_experts if inputs is None else [x if x.any() else None for x in inputs]
    matrices = weights.double() * scale[..., None]
    if num_outputs <= num_inputs:
        pairs = zip(matrices, tokens, strict=True)
        gram = torch.stack([output_gram(matrix, x, ridge) for matrix, x in pairs])
        energy, left = torch.linalg.eigh(gram)
        row_energy = gram.diagonal(dim1=-2, dim2=-1)
        return Decomposition(left.flip(-1).float(), energy.flip(-1).clamp(min=0), row_energy, scale)
    roots = torch.stack([gram_root(x, num_inputs, ridge) for x in tokens]).to(weights.device)
    matrices = matrices @ roots
    energy, right = torch.linalg.eigh(matrices.mT @ matrices)
    energy, right = energy.flip(-1), right.flip(-1)
    energy = torch.where(energy > NOISE * energy[:, :1], energy, 0.0)
    left = matrices @ right
    left = torch.where(energy[:, None] > 0, left / energy.clamp(min=TINY).sqrt()[:, None], 0.0)
    return Decomposition(left.float(), energy, matrices.square().sum(-1), scale)


def output_gram(matrix: Tensor, tokens: Tensor | None, ridge: float) -> Tensor:
    """W G W^T (O, O), float64, without forming G (I, I)."""
    if tokens is None:
        return matrix @ matrix.T
    outputs = tokens.double() @ matrix.T
    mean_diagonal = tokens.double().square().sum() / tokens.shape[1]
    return outputs.T @ outputs + ridge * mean_diagonal * (matrix @ matrix.T)


def gram_root(tokens: Tensor | None, num_inputs: int, ridge: float) -> Tensor:
    """L (I, I) float64 with L L^T = X^T X + ridge I."""
    if tokens is None:
        return torch.eye(num_inputs, dtype=torch.float64)
    tokens = tokens.double()
    gram = tokens.T @ tokens
    gram.diagonal().add_(ridge * float(gram.diagonal().mean()))
    return torch.linalg.cholesky(gram)
