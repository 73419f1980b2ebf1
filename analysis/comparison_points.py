"""Where the methods of a comparison stand, before anything is drawn: points, front, order, references, labels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.isotonic import isotonic_regression

from msmoe.comparison.summary import Row, Score, Summary

SAME_BYTES = 0.01  # models closer than this in bytes are equal on the Pareto front


@dataclass(frozen=True)
class Point:
    """A method at one size in the plane of bytes and mean score; `x` is where it is drawn."""

    method: str
    size: int
    num_bytes: int
    score: Score
    x: float


def points(summary: Summary, steps: int) -> list[Point]:
    """Points of all methods; those of one size are drawn side by side, the best on the right."""
    sign = -1 if summary.mean_metric == "loss" else 1
    sizes: dict[int, list[tuple[str, int, Score]]] = {}
    for i, size in enumerate(summary.sizes):
        measured = [(row.method, row.measurements[steps]) for row in size.methods if steps in row.measurements]
        rows = [(method, max(m.num_bytes, 1), m.mean) for method, m in measured if m.mean is not None]
        if rows:
            sizes[i] = sorted(rows, key=lambda row: sign * row[2].value)
    middles = [float(np.median([np.log10(num_bytes) for _, num_bytes, _ in rows])) for rows in sizes.values()]
    apart = np.diff(sorted(middles))
    room = 0.8 * float(apart[apart > 0].min()) if (apart > 0).any() else 0.3
    found = []
    for i, rows in sizes.items():
        step = min(room / len(rows), 0.012)
        for place, (method, num_bytes, score) in enumerate(rows):
            shift = (place - (len(rows) - 1) / 2) * step
            found.append(Point(method, i, num_bytes, score, num_bytes * 10**shift))
    return found


def pareto_front(found: Sequence[Point], *, lower_is_better: bool = False) -> list[Point]:
    """Points that no other beats in score without more bytes, from the smallest to the largest."""
    sign = -1 if lower_is_better else 1

    def beats(other: Point, point: Point) -> bool:
        fits = other.num_bytes <= point.num_bytes * (1 + SAME_BYTES)
        gain = sign * (other.score.value - point.score.value)
        return fits and (gain > 0 or (gain == 0 and other.num_bytes < point.num_bytes))

    front = [point for point in found if not any(beats(other, point) for other in found)]
    return sorted(front, key=lambda point: (point.num_bytes, sign * point.score.value))


def standing(summary: Summary) -> list[str]:
    """Methods from the best to the worst: by their place in the order of means, averaged over sizes and recovery."""
    places: dict[str, list[float]] = {row.method: [] for size in summary.sizes for row in size.methods}
    sign = 1 if summary.mean_metric == "loss" else -1
    for size in summary.sizes:
        for steps in summary.recover_steps:
            means = {row.method: m.mean for row in size.methods if (m := row.measurements.get(steps)) and m.mean}
            order = sorted(means, key=lambda method: sign * means[method].value)
            for place, method in enumerate(order):
                places[method].append(place / len(order))
    return sorted(places, key=lambda method: (np.mean(places[method]) if places[method] else math.inf, method))


def references(summary: Summary, steps: int, *, task: str | None = None) -> list[tuple[Row, Score]]:
    """References after as many steps, the full model else untrained, with their mean or their score on a task."""
    found = {}
    for row in (row for size in summary.sizes for row in size.rows if row.is_reference):
        measured = row.measurements.get(steps) or row.measurements.get(0)
        score = measured and (measured.mean if task is None else measured.scores.get(task))
        if score:
            found[row.method] = (row, score)
    return list(found.values())


def value_range(summary: Summary, scores: Sequence[Score]) -> tuple[float, float]:
    """Range of intervals and references, with a margin."""
    named = [score for steps in summary.recover_steps for _, score in references(summary, steps)]
    low = min(score.low for score in [*scores, *named])
    high = max(score.high for score in [*scores, *named])
    margin = 0.05 * (high - low) or 0.05
    return low - margin, high + margin


def spread(positions: Sequence[float] | np.ndarray, gap: float) -> np.ndarray:
    """Positions moved as little as possible (least squares) to lie in [0, 1], half a gap inside, and a gap apart.

    With the k-th smallest lowered by k gaps, that is isotonic regression. Where there is no room, the gap shrinks.
    """
    positions = np.asarray(positions, dtype=float)
    if not positions.size:
        return positions
    gap = min(gap, 1 / len(positions))
    order = np.argsort(positions, kind="stable")
    steps = gap * np.arange(len(positions))
    moved = np.empty_like(positions)
    moved[order] = isotonic_regression(positions[order] - steps, y_min=gap / 2, y_max=1 - gap / 2 - steps[-1]) + steps
    return moved
