"""Where the weights of an expert lie in a checkpoint: one tensor per matrix, or slices of fused ones.

Shapes: F d_ff, D d_model, P matrices in a stored tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


BIAS = "_bias"  # what the name of a bias adds to that of its matrix


@dataclass(frozen=True)
class StoredPart:
    """A stored tensor, or a slice of the leading axis of one, that holds one or more weights of an expert.

    Attributes:
        key: name of the stored tensor.
        index: position on its leading axis; None for a tensor of the expert's own.
        roles: what it holds, in this order along the output axis: `wi`, `gate`, `up`, `output`, and the same with
            `_bias`.
        transposed: stored (inputs, outputs).
        interleaved: entries of the roles take turns along the output axis, in place of one after the other.
        companions: tensors that travel with it and give it its values, e.g. scales: name -> position on their leading
            axis, None for a tensor of the expert's own.
        encoding: `plain`, or how the values are quantised: `fp8`, `mxfp4`.
        rows: of the leading axis that belong to an `index`, where experts lie one below the other in a matrix; 0 where
            the leading axis counts experts.
    """

    key: str
    index: int | None
    roles: tuple[str, ...]
    transposed: bool = False
    interleaved: bool = False
    companions: tuple[tuple[str, int | None], ...] = ()
    encoding: str = "plain"
    rows: int = 0

    def split(self, stored: Tensor) -> dict[str, Tensor]:
        """The weights in a stored tensor, outputs first: inputs (F, D), output (D, F), biases (F,) or (D,)."""
        tensor = stored.mT if self.transposed and stored.ndim > 1 else stored
        count = len(self.roles)
        parts = [tensor[i::count] for i in range(count)] if self.interleaved else tensor.chunk(count)
        return dict(zip(self.roles, (p.contiguous() for p in parts), strict=True))

    def join(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The stored tensor of some weights: `split` run backwards."""
        import torch

        parts = [weights[role] for role in self.roles]
        joined = torch.stack(parts, dim=1).flatten(0, 1) if self.interleaved else torch.cat(parts)
        return joined.mT.contiguous() if self.transposed and joined.ndim > 1 else joined
