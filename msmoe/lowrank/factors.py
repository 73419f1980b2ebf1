"""Low rank plus kept rows: W ~ U V + S, with few rows of S, stored with their indices (MC-SMoE, arXiv 2310.01334).

Shapes: G experts, O outputs, I inputs, R rank, K kept rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from msmoe.lowrank.decompose import Decomposition
from msmoe.lowrank.options import RowScore
from msmoe.lowrank.shapes import FactorShape


class Factors(NamedTuple):
    """G factorised matrices: W[g] ~ U[g] V[g], plus S[g] added to the rows `rows[g]`."""

    u: Tensor  # (G, O, R)
    v: Tensor  # (G, R, I)
    s: Tensor  # (G, K, I)
    rows: Tensor  # (G, K) int32, ascending

    def dense(self) -> Tensor:
        """The matrices (G, O, I) that the factors stand for, float32; of one expert alone, its matrix (O, I)."""
        index = self.rows.long()[..., None].expand_as(self.s)
        return (self.u.float() @ self.v.float()).scatter_add(-2, index, self.s.float())


def truncate(
    weights: Tensor,
    decomposition: Decomposition,
    shape: FactorShape,
    *,
    row_score: RowScore = "activation",
    dtype: torch.dtype = torch.float32,
) -> Factors:
    """Factors of a given shape.

    U and V are scaled so that both parts of a component have the same norm, as U sqrt(Sigma) and sqrt(Sigma) V^T
    have. Kept rows hold the remainder after U and V were rounded, so that they come out exact.

    Args:
        weights: (G, O, I) float32; the decomposed matrices, or matrices with the same outputs.
        decomposition: of the experts, to at least the rank asked for.
        shape: rank and number of kept rows.
        row_score: which rows are kept: those where rank R leaves the largest output error (`activation`), or the
            largest remainder in weights (`magnitude`).
        dtype: of the stored factors.

    Raises:
        ValueError: if rank or number of rows exceed the matrix or the decomposition.
    """
    num_experts, num_outputs, num_inputs = weights.shape
    rank, num_rows = shape
    if not 1 <= rank <= decomposition.left.shape[-1] or not 0 <= num_rows <= num_outputs:
        raise ValueError(f"{shape} does not fit matrices of shape {num_outputs} x {num_inputs}")
    scale = decomposition.row_scale[..., None]
    basis = decomposition.left[..., :rank]
    v = basis.mT @ (weights * scale)
    u = basis / scale
    balance = (v.norm(dim=-1) / u.norm(dim=-2).clamp(min=1e-30)).sqrt().clamp(min=1e-30)
    u, v = (u * balance[:, None]).to(dtype), (v / balance[..., None]).to(dtype)
    remainder = weights - u.float() @ v.float()
    scores = decomposition.row_errors(rank) if row_score == "activation" else remainder.double().square().sum(-1)
    best = scores.argsort(dim=-1, descending=True, stable=True)[:, :num_rows]
    rows = best.sort(dim=-1).values
    s = remainder.gather(1, rows[..., None].expand(num_experts, num_rows, num_inputs)).to(dtype)
    return Factors(u, v, s, rows.int())
