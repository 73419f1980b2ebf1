"""What is summed over the tokens of a layer: one row per statistic, from which files, checks and sums follow.

Shapes: E experts, D d_model, N sequences.
"""

from collections.abc import Callable
from dataclasses import Field, dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

JSON, TENSORS = "stats.json", "stats.safetensors"


def added(a: "Tensor", b: "Tensor") -> "Tensor":
    """Sums over the tokens of two data sets, or of two ranks, add up."""
    return a + b


def all_rows(a: "Tensor", b: "Tensor") -> "Tensor":
    """The rows of both sides, sorted."""
    import torch

    return sort_rows(torch.cat([a, b]))


def sort_rows(matrix: "Tensor") -> "Tensor":
    """Rows of an integer matrix in lexicographic order."""
    import torch

    return matrix[torch.from_numpy(np.lexsort(matrix.numpy().T[::-1]))]


@dataclass(frozen=True)
class Statistic:
    """A row of the table.

    Attributes:
        axes: a letter per axis.
        dtype: in memory and on disk, by its numpy name; files with other widths are read.
        doc: what it is.
        file: where it is stored.
        is_signed: whether values may be negative.
        add: the statistic of two data sets from those of each; None where there is none.
        name: of the attribute; is_optional: whether it may be None, and absent on disk. Both as the attribute has them.
    """

    axes: str
    dtype: str
    doc: str
    file: str = TENSORS
    is_signed: bool = False
    add: "Callable[[Tensor, Tensor], Tensor] | None" = added
    name: str = ""
    is_optional: bool = False

    @property
    def is_integer(self) -> bool:
        return self.dtype.startswith("int")


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Sums over the valid tokens of one layer; a token counts once for each expert that it chose.

    Sums over outputs are over dispatched choices: f is the expert's output, g the weight that it is multiplied by. The
    order of the rows is that in which the digest reads them.
    """

    routed: Annotated["Tensor", Statistic("E", "int64", "choices of each expert, before capacity", JSON)]
    dispatched: Annotated["Tensor", Statistic("E", "int64", "choices carried out, within capacity", JSON)]
    gate_mass: Annotated["Tensor", Statistic("E", "float64", "sum of the weights of each expert's choices", JSON)]
    soft_mass: Annotated["Tensor", Statistic("E", "float64", "sum of the softmax of the router's logits")]
    router_logits_gram: Annotated["Tensor", Statistic("EE", "float64", "sum of h h^T, h the logits", is_signed=True)]
    input_sum: Annotated["Tensor", Statistic("ED", "float64", "sum of the inputs x of each expert", is_signed=True)]
    input_abs_sum: Annotated["Tensor", Statistic("ED", "float64", "sum of |x|")]
    input_square_sum: Annotated["Tensor", Statistic("ED", "float64", "sum of x^2")]
    sequence_counts: Annotated[
        "Tensor", Statistic("NE", "int32", "choices of each sequence, rows sorted: what capacity acts on", add=all_rows)
    ]
    output_norm_sum: Annotated["Tensor | None", Statistic("E", "float64", "sum of |f|")] = None
    gated_norm_sum: Annotated["Tensor | None", Statistic("E", "float64", "sum of g |f|")] = None
    output_square_sum: Annotated["Tensor | None", Statistic("E", "float64", "sum of |f|^2")] = None
    output_sum: Annotated["Tensor | None", Statistic("ED", "float64", "sum of f", is_signed=True)] = None
    gradient_gram: Annotated[
        "Tensor | None",
        Statistic("EE", "float64", "inner products of the experts' loss gradients", is_signed=True, add=None),
    ] = None
    weight_gradient_gram: Annotated[
        "Tensor | None", Statistic("EE", "float64", "the same of gradient times weight", is_signed=True, add=None)
    ] = None

    def add(self, other: "Sums") -> "dict[str, Tensor]":
        """Statistics of both sides together; those that do not add up, or that a side lacks, are left out."""
        sides = [(row, getattr(self, row.name), getattr(other, row.name)) for row in STATISTICS if row.add]
        return {row.name: row.add(a, b) for row, a, b in sides if a is not None and b is not None}


def declared(attribute: Field) -> Statistic:
    """The row of an attribute of `Sums`, with its name."""
    (statistic,) = attribute.type.__metadata__
    return replace(statistic, name=attribute.name, is_optional=attribute.default is None)


STATISTICS = tuple(declared(attribute) for attribute in fields(Sums))
IN_JSON = tuple(row for row in STATISTICS if row.file == JSON)
IN_TENSORS = tuple(row for row in STATISTICS if row.file == TENSORS)
