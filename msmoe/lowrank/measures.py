"""What a factorised matrix cost: ranks and errors.

Shapes: O outputs, I inputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MatrixReport:
    """One matrix of one stored expert.

    Attributes:
        layer, expert, matrix: which; `matrix` is the layer's name for the front, all input matrices together, or for
            the output matrix: `wi` or `wo`.
        rank, num_rows: as stored; None for a matrix that stayed dense.
        break_even_rank: up to which factors with these rows take no more multiplications than the dense matrix.
        stable_rank: |W|_F^2 / |W|_2^2 of the matrix before it was factorised.
        energy: share of the squared singular values, as they were weighted, that the rank holds.
        weight_error: |W - W'|_F / |W|_F; after a refit of the output it contains the refit's change.
        output_error: |y - y'|^2 / |y|^2 on the calibration tokens, of hidden activations for the front, of the
            whole expert, weighted by its gate, for the output; None without tokens.
        refit: how the output was solved again, see `msmoe.merge.Refit`; None where it was not.
        stable_rank_before: mean over the experts that were merged into this one; None if not asked for.
    """

    layer: str
    expert: int
    matrix: str
    rank: int | None
    num_rows: int | None
    break_even_rank: int
    stable_rank: float
    energy: float
    weight_error: float
    output_error: float | None
    refit: dict | None = None
    stable_rank_before: float | None = None


def stable_rank(weight: Tensor) -> float:
    """|W|_F^2 / |W|_2^2 of a matrix (O, I), between 1 and its rank; 0 for a matrix of zeros."""
    total = float(weight.double().square().sum())
    if total == 0:
        return 0.0
    return total / spectral_norm(weight) ** 2


def spectral_norm(weight: Tensor) -> float:
    """Largest singular value of a matrix (O, I): the root of the largest eigenvalue of its smaller Gram matrix."""
    thin = weight if weight.shape[0] <= weight.shape[1] else weight.T
    largest = float(thin.abs().max())
    thin = thin / largest  # squares of small weights vanish in float32
    return largest * float(torch.linalg.eigvalsh((thin @ thin.T).double())[-1].clamp(min=0).sqrt())
