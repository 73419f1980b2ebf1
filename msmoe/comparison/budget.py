"""One budget of stored bytes for every method: how many experts each may keep.

The budget of a size is what m-smoe stores at that many experts per layer. A method that stores more for each expert
keeps fewer, one that stores less keeps more.
"""

from collections.abc import Callable, Sequence
from typing import Any

from msmoe.errors import UserError
from msmoe.planning.methods import METHODS
from msmoe.planning.planner import Planner

REFERENCE = "m-smoe"


def budget_bytes(planner: Planner, experts: float, *, keep_layers: list[str] | None) -> int:
    """Stored bytes that no method may exceed at a size."""
    return planner.predicted_bytes(REFERENCE, keep_layers=keep_layers, experts=experts)


def experts_within(
    planner: Planner, method: str, limit: int, /, *, keep_layers: list[str] | None, size: float, **choices: Any
) -> float | None:
    """Experts per compressible layer, on average, that a method can keep within a budget; None for its own number.

    Args:
        size: the size asked for, for the error; choices: of the method, as `msmoe.plan`.

    Raises:
        UserError: if even the fewest do not fit; the message says which sizes do.
    """
    if METHODS[method].fixed:
        return None
    layers = planner.compressible(keep_layers)
    num_layers, most = len(layers), sum(layer.num_experts for layer in layers)
    stored: Callable[[int], int] = lambda total: planner.predicted_bytes(
        method, keep_layers=keep_layers, experts=total / num_layers, **choices
    )
    smallest = stored(num_layers)
    if smallest > limit:
        raise UserError(
            f"method {method} cannot reach the size of {size:g} per layer, {limit:,} bytes: with 1 expert "
            f"per layer it stores {smallest:,} bytes. Ask for {sizes_that_hold(planner, smallest, keep_layers)}"
        )
    return largest_within(stored, range(num_layers, most + 1), limit) / num_layers


def largest_within(size: Callable[[int], int], totals: Sequence[int], budget: int) -> int:
    """The largest total whose size is within the budget; sizes ascend, and the first one fits."""
    low, high = 0, len(totals) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(totals[middle]) <= budget else (low, middle - 1)
    return totals[low]


def sizes_that_hold(planner: Planner, needed: int, keep_layers: list[str] | None) -> str:
    """The whole numbers of experts whose budget holds so many bytes, in words."""
    most = min(layer.num_experts for layer in planner.compressible(keep_layers))
    fitting = [n for n in range(1, most + 1) if budget_bytes(planner, n, keep_layers=keep_layers) >= needed]
    return f"--experts {fitting[0]} to {most}" if fitting else "another method: no size of this checkpoint holds it"
