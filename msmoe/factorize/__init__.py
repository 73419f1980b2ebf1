"""Low rank plus row-sparse form of expert matrices: decompose, choose a shape, truncate. Pure tensors."""

from msmoe.factorize.allocate import Option, allocate, curve
from msmoe.factorize.decompose import Decomposition, decompose
from msmoe.factorize.factors import ROW_SCORES, Factors, truncate
from msmoe.factorize.shapes import FactorShape, largest_rank

__all__ = [
    "ROW_SCORES",
    "Decomposition",
    "FactorShape",
    "Factors",
    "Option",
    "allocate",
    "curve",
    "decompose",
    "largest_rank",
    "truncate",
]
