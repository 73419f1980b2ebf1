"""Sub-MoE's merge in a shared subspace (arXiv 2506.23266, union decomposition).

The members' matrices are concatenated on the input axis and decomposed, [W_1|...|W_n] = U S [V_1|...|V_n]; the merged
matrix averages the right factors, W* = U_r S_r sum_i w_i V_i. As U_r^T W_i = S_r V_i, this is the projection
W* = U_r U_r^T (sum_i w_i W_i): V is never needed, and with all of U it is the weighted average.

Shapes: O outputs, I inputs of a matrix, n members, R rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from msmoe.layer.expert import Expert
from msmoe.merge.fisher import weighted_average

ROUNDING = 1e-12


def union_svd(
    members: Sequence[Expert], weights: Sequence[float], *, energy: float | None = None
) -> tuple[Expert, dict[str, int]]:
    """Average aligned experts and keep the part that lies in the leading left singular space of all of them.

    The space weighs every member alike, as in the paper; `weights` enter the average only. One member has nothing to
    share a space with and is returned as it is, where the formula would truncate it.

    Args:
        members: experts in one neuron order: the hidden axis is an input of the output matrix. Biases are averaged.
        weights: their weights, summing to 1.
        energy: share of the squared singular values to keep, in (0, 1]; 1 is the weighted average. By default as many
            directions are kept as a single matrix can have, min(O, I): members that are equal then lose nothing.

    Returns:
        The merged expert, in the members' dtype, and the rank of the space of each matrix, by role.

    Raises:
        ValueError: if `energy` is outside (0, 1].
    """
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy must be in (0, 1], got {energy}")
    merged, ranks = [], {}
    for name in members[0].weights:
        matrices = [member.weights[name] for member in members]
        average = weighted_average(matrices, weights)
        if average.ndim == 1:
            pass
        elif len(members) == 1:
            ranks[name] = min(average.shape)
        elif energy == 1:
            ranks[name] = min(len(average), sum(matrix.shape[1] for matrix in matrices))
        else:
            average, ranks[name] = project(average, matrices, energy, max_rank=min(average.shape))
        merged.append(average.to(matrices[0].dtype))
    return members[0].like(merged), ranks


def project(matrix: Tensor, matrices: Sequence[Tensor], energy: float | None, *, max_rank: int) -> tuple[Tensor, int]:
    """Project a matrix (O, I) on the smallest left singular space that holds `energy` of the joined `matrices`.

    Without an energy, on the `max_rank` leading directions.

    Works from the Gram matrix of the shorter side of the joined C = [W_1|...|W_n]: C C^T gives U, C^T C gives V and
    U = C V / S.

    Returns:
        The projection (O, I), float64, and the rank of the space.
    """
    joined = torch.cat([m.double() for m in matrices], dim=1)
    wide = joined.shape[1] >= joined.shape[0]
    squares, vectors = torch.linalg.eigh(joined @ joined.T if wide else joined.T @ joined)  # ascending
    largest = num_leading(squares.flip(0), 1.0)
    rank = min(largest, max_rank) if energy is None else num_leading(squares.flip(0), energy)
    if rank == 0:
        return torch.zeros_like(matrix), 0
    leading = vectors[:, -rank:]
    if not wide:
        leading = joined @ (leading / squares[-rank:].sqrt())
    return leading @ (leading.T @ matrix), rank


def num_leading(squares: Tensor, energy: float) -> int:
    """The smallest number of squared singular values, in descending order, whose sum is `energy` of their total."""
    held = squares.clamp(min=0).cumsum(0)
    if held[-1] == 0:
        return 0
    return int((held < energy * held[-1] * (1 - ROUNDING)).sum()) + 1
