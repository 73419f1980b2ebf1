"""One budget of stored bytes for every method: how many experts each may keep.

The budget of a size is what m-smoe stores at that many experts per layer. A method that stores more for each expert
keeps fewer, one that stores less keeps more.
"""

from collections.abc import Callable, Sequence
from typing import Any

from msmoe.comparison.summary import count
from msmoe.errors import UserError
from msmoe.families import MoELayer
from msmoe.planning.methods import METHODS, resolve
from msmoe.planning.planner import Planner

REFERENCE = "m-smoe"


def budget_bytes(planner: Planner, experts: float, *, keep_layers: list[str] | None, export: str | None = None) -> int:
    """Stored bytes that no method may exceed at a size."""
    return planner.predicted_bytes(REFERENCE, keep_layers=keep_layers, export=export or "exact", experts=experts)


def experts_within(
    planner: Planner,
    method: str,
    limit: int,
    /,
    *,
    keep_layers: list[str] | None,
    size: float,
    export: str = "exact",
    budget_export: str | None = None,
    **choices: Any,
) -> float | None:
    """Experts per compressible layer, on average, that a method can keep within a budget; None for its own number.

    Args:
        size: the size asked for, and the export that its budget is of, for the error.
        export: of the method; choices: of it, as `msmoe.plan`.

    Raises:
        UserError: if even the fewest do not fit; the message says which sizes do.
    """
    if METHODS[method].fixed:
        return None
    layers = planner.compressible(keep_layers)
    num_layers = len(layers)
    stored: Callable[[int], int] = lambda total: planner.predicted_bytes(
        method, keep_layers=keep_layers, export=export, experts=total / num_layers, **choices
    )
    totals = totals_of(planner, layers, export, loses_rows=resolve(method, choices).loses_rows)
    smallest = stored(totals[0])
    if smallest > limit:
        fewest = count(totals[0] // num_layers, "expert")
        raise UserError(
            f"method {method} cannot reach the size of {size:g} per layer, {limit:,} bytes: with {fewest} "
            f"per layer it stores {smallest:,} bytes. Ask for "
            f"{sizes_that_hold(planner, smallest, keep_layers, budget_export)}"
        )
    return largest_within(stored, totals, limit) / num_layers


def totals_of(planner: Planner, layers: Sequence[MoELayer], export: str, *, loses_rows: bool) -> Sequence[int]:
    """Numbers of experts over all layers that an export can hold, ascending.

    A router that loses rows keeps as many as a token goes to.
    """
    if export == "native":
        return [number * len(layers) for number in whole_numbers(planner, export)]
    fewest = sum(layer.top_k if loses_rows else 1 for layer in layers)
    return range(fewest, sum(layer.num_experts for layer in layers) + 1)


def whole_numbers(planner: Planner, export: str | None) -> Sequence[int]:
    """Numbers of experts that every compressible layer of an export can have."""
    if export == "native":
        return planner.family.counts(planner.source)
    return range(1, min(layer.num_experts for layer in planner.layers) + 1)


def largest_within(size: Callable[[int], int], totals: Sequence[int], budget: int) -> int:
    """The largest total whose size is within the budget; sizes ascend, and the first one fits."""
    low, high = 0, len(totals) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(totals[middle]) <= budget else (low, middle - 1)
    return totals[low]


def sizes_that_hold(planner: Planner, needed: int, keep_layers: list[str] | None, export: str | None) -> str:
    """The whole numbers of experts whose budget holds so many bytes, in words."""
    numbers = whole_numbers(planner, export)
    fitting = [n for n in numbers if budget_bytes(planner, n, keep_layers=keep_layers, export=export) >= needed]
    if not fitting:
        return "another method: no size of this checkpoint holds it"
    return f"--experts {fitting[0]} to {numbers[-1]}"
