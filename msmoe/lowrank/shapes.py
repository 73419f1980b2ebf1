"""Sizes of factors, before any is computed.

Shapes: G experts, O outputs, I inputs, R rank, K kept rows.
"""

from typing import NamedTuple

INDEX_BYTES = 4  # a row index is stored as int32


class FactorShape(NamedTuple):
    """Rank and number of kept rows of a factorised matrix."""

    rank: int
    num_rows: int

    def num_values(self, num_outputs: int, num_inputs: int) -> int:
        """Numbers stored for one matrix: R (O + I) + K I; the K row indices are not counted."""
        return self.rank * (num_outputs + num_inputs) + self.num_rows * num_inputs

    def num_bytes(self, num_outputs: int, num_inputs: int, itemsize: int) -> int:
        """Bytes of one matrix, row indices included."""
        return self.num_values(num_outputs, num_inputs) * itemsize + self.num_rows * INDEX_BYTES

    def saves(self, num_outputs: int, num_inputs: int, itemsize: int) -> bool:
        """Whether the factors are smaller than the matrix itself."""
        return self.num_bytes(num_outputs, num_inputs, itemsize) < num_outputs * num_inputs * itemsize


def break_even_rank(num_outputs: int, num_inputs: int, num_rows: int) -> int:
    """Largest rank at which factors, with so many kept rows, take no more multiplications than the dense matrix."""
    return (num_outputs - num_rows) * num_inputs // (num_outputs + num_inputs)


LayerFactors = dict[str, FactorShape]  # front, output -> shape of its factors; a matrix not named is dense


def largest_rank(num_outputs: int, num_inputs: int, itemsize: int) -> int:
    """Largest rank whose factors, without kept rows, are smaller than the matrix; 0 if none is."""
    rank = min(num_outputs, num_inputs, num_outputs * num_inputs // (num_outputs + num_inputs))
    while rank and not FactorShape(rank, 0).saves(num_outputs, num_inputs, itemsize):
        rank -= 1
    return rank
