"""Spend a budget of bytes on ranks and kept rows of many matrices so that the summed output error is smallest.

Every matrix stack (one layer, front or output) has a curve: error against bytes, read off its decomposition. On the
lower convex hulls of the curves the best allocation for any budget follows from one price per byte, found by taking
the steepest steps of all hulls first (Lagrangian relaxation, exact at the corners). What is left of the budget then
goes to the best single exchanges, also off the hulls. Errors of different matrices are taken to add up.

Shapes: G experts, O outputs, R rank, K kept rows.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from msmoe.lowrank.decompose import Decomposition
from msmoe.lowrank.shapes import FactorShape

NUM_RANKS = 48
ROW_SHARES = (0, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 0.9)


class Option(NamedTuple):
    """One way to store a stack of matrices; `shape` None is the dense one."""

    shape: FactorShape | None
    num_bytes: int
    error: float


def curve(decomposition: Decomposition, num_inputs: int, *, itemsize: int, max_rank: int) -> list[Option]:
    """Error and bytes of a stack of experts at many shapes, and as it is.

    Args:
        decomposition: of the G matrices, to `max_rank` at least.
        itemsize: bytes of a stored number.
        max_rank: largest rank worth storing, see `largest_rank`; 0 leaves only the dense option.
    """
    num_experts, num_outputs = decomposition.row_energy.shape
    options = [Option(None, num_experts * num_outputs * num_inputs * itemsize, 0.0)]
    steps = (round(max_rank ** (i / (NUM_RANKS - 1))) for i in range(NUM_RANKS))
    linear = (round(max_rank * (i + 1) / NUM_RANKS) for i in range(NUM_RANKS))
    for rank in sorted({r for r in (*steps, *linear) if 1 <= r <= max_rank}):
        errors = decomposition.row_errors(rank).sort(dim=-1, descending=True).values.sum(0).cumsum(0)
        for num_rows in sorted({round(share * num_outputs) for share in ROW_SHARES}):
            shape = FactorShape(rank, num_rows)
            if shape.saves(num_outputs, num_inputs, itemsize):
                left = float(errors[-1] - errors[num_rows - 1]) if num_rows else float(errors[-1])
                size = num_experts * shape.num_bytes(num_outputs, num_inputs, itemsize)
                options.append(Option(shape, size, max(left, 0.0)))
    return options


def allocate(curves: Sequence[Sequence[Option]], budget: int) -> list[Option]:
    """Choose one option per curve; the bytes add up to at most `budget`.

    Raises:
        ValueError: if not even the smallest options fit; the message gives their sum.
    """
    hulls = [lower_hull(options) for options in curves]
    chosen = [hull[0] for hull in hulls]
    spent = sum(option.num_bytes for option in chosen)
    if spent > budget:
        raise ValueError(f"the smallest allocation takes {spent} bytes, the budget is {budget}")
    steps = sorted(
        (-(before.error - after.error) / (after.num_bytes - before.num_bytes), i, after.num_bytes, before, after)
        for i, hull in enumerate(hulls)
        for before, after in pairwise(hull)
    )
    for _, i, _, before, after in steps:
        extra = after.num_bytes - before.num_bytes
        if spent + extra > budget:
            break
        if chosen[i] is before:
            chosen[i] = after
            spent += extra
    while (exchange := best_exchange(curves, chosen, budget - spent)) is not None:
        i, option = exchange
        spent += option.num_bytes - chosen[i].num_bytes
        chosen[i] = option
    return chosen


def lower_hull(options: Iterable[Option]) -> list[Option]:
    """Options on the lower convex hull of error over bytes, smallest first, errors strictly falling."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.num_bytes, o.error)):
        if hull and option.error >= hull[-1].error:
            continue
        while len(hull) > 1 and slope(hull[-1], option) <= slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def slope(a: Option, b: Option) -> float:
    return (b.error - a.error) / (b.num_bytes - a.num_bytes)


def best_exchange(curves: Sequence[Sequence[Option]], chosen: Sequence[Option], room: int) -> tuple[int, Option] | None:
    """The single exchange within `room` extra bytes that lowers the error most; None if none does."""
    better = [
        (chosen[i].error - option.error, -i, -option.num_bytes, option)
        for i, options in enumerate(curves)
        for option in options
        if option.error < chosen[i].error and option.num_bytes - chosen[i].num_bytes <= room
    ]
    if not better:
        return None
    _, i, _, option = max(better, key=lambda b: b[:3])
    return -i, option
