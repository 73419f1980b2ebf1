"""Statistics of compressed models measured on the same examples: intervals, paired tests, corrections, ranks.

A run is one model (a method at one size, with one seed) on one task. A resample draws the same examples for every run
of the task, so that whatever is computed from resampled scores is paired.

A statement on a method is one on its seeds too: they are drawn from more seeds as the examples are from more examples,
and there are few of them. What examples and seeds contribute to the variance of a mean is estimated apart; the first
is known well and has a normal quantile, the second has Student's with the seeds' degrees of freedom.

Shapes: C runs, N examples, S runs of one method that differ by seed, R resamples, M methods, T tasks.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binomtest, norm, rankdata, t

from msmoe.evaluation.metrics import CONFIDENCE, NUM_RESAMPLES

POWER = 0.8
SMALLEST_P = 1e-9
ROUNDING = 1e-12  # differences of scores closer than this are the same number summed in another order


@dataclass(frozen=True)
class Resampled:
    """One method in one column of a table: its runs as measured, and on resampled examples.

    Attributes:
        seeds: of the runs.
        values: score of each run (S,).
        resampled: score of each run in each resample (R, S).
        num_examples: examples behind each value.
        outcomes: right or wrong per example (N,), bool, of a single run scored by exact match; else None.
        is_fixed: whether no seed could change it, such as the original model.
    """

    seeds: tuple[int, ...]
    values: np.ndarray
    resampled: np.ndarray
    num_examples: int
    outcomes: np.ndarray | None = None
    is_fixed: bool = False

    @property
    def value(self) -> float:
        """Mean over seeds."""
        return float(self.values.mean())

    @cached_property
    def over_examples(self) -> np.ndarray:
        """Mean over seeds in each resample (R,), the seeds as they are."""
        return self.resampled.mean(axis=1)

    @property
    def measured_variance(self) -> float:
        """Variance of the measured scores between several seeds, unbiased."""
        return float(self.values.var(ddof=1))

    @cached_property
    def between_seeds(self) -> float:
        """Variance of a run's score between several seeds that all examples there are would show.

        The variance of the measured scores, less what the choice of examples adds to each run on its own: that is in
        the variance over examples already. Not below 0.
        """
        apart_RS = self.resampled - self.resampled.mean(axis=1, keepdims=True)
        own = float(apart_RS.var(axis=0).sum()) / (len(self.values) - 1)
        return max(self.measured_variance - own, 0.0)

    @cached_property
    def interval(self) -> tuple[float, float]:
        """95 % interval over examples and seeds; of a single run over examples alone.

        The percentile interval over examples, widened by that over seeds, Student's with S - 1 degrees of freedom:
        distances from the mean add up in squares (Zou and Donner 2008, 10.1002/sim.3095).
        """
        low, high = np.quantile(self.over_examples, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        num_seeds = len(self.values)
        if num_seeds == 1:
            return float(low), float(high)
        widening = t.ppf((1 + CONFIDENCE) / 2, num_seeds - 1) * math.sqrt(self.between_seeds / num_seeds)
        return (
            self.value - math.hypot(self.value - float(low), widening),
            self.value + math.hypot(float(high) - self.value, widening),
        )


def draw(num_items: int, *, key: str, seed: int = 0) -> np.ndarray:
    """Share of every item in each of the resamples with replacement, (R, num_items); a row sums to 1.

    Args:
        key: name of what is drawn; other names draw independently.
    """
    rng = np.random.default_rng([seed, zlib.crc32(key.encode()), num_items])
    chosen = rng.integers(num_items, size=(NUM_RESAMPLES, num_items))
    offsets = np.arange(NUM_RESAMPLES)[:, None] * num_items
    counts = np.bincount((chosen + offsets).ravel(), minlength=NUM_RESAMPLES * num_items)
    return counts.reshape(NUM_RESAMPLES, num_items) / num_items


def resample_means(values: np.ndarray, *, key: str, seed: int = 0) -> np.ndarray:
    """Means of per-example values (C, N) on resampled examples, (R, C)."""
    return draw(values.shape[1], key=key, seed=seed) @ values.T


def resample_ratios(totals: np.ndarray, counts: np.ndarray, *, key: str, seed: int = 0) -> np.ndarray:
    """Summed totals (C, N) over summed counts (C, N), such as losses over tokens, on resampled examples, (R, C)."""
    drawn_RN = draw(totals.shape[1], key=key, seed=seed)
    return (drawn_RN @ totals.T) / np.maximum(drawn_RN @ counts.T, ROUNDING)


def mean_of(columns: Sequence[Resampled]) -> Resampled | None:
    """Mean over tasks of a method, whose examples are drawn independently; None if no seed has all of them."""
    seeds = sorted(set.intersection(*(set(column.seeds) for column in columns)))
    if not seeds:
        return None
    chosen = [[column.seeds.index(seed) for seed in seeds] for column in columns]
    return Resampled(
        seeds=tuple(seeds),
        values=np.mean([column.values[c] for column, c in zip(columns, chosen, strict=True)], axis=0),
        resampled=np.mean([column.resampled[:, c] for column, c in zip(columns, chosen, strict=True)], axis=0),
        num_examples=sum(column.num_examples for column in columns),
        is_fixed=all(column.is_fixed for column in columns),
    )


def p_value(first: Resampled, second: Resampled) -> float:
    """Two-sided p-value that two methods score the same; of two single runs, that these two models do.

    For single runs over the examples alone: McNemar's exact test where both are scored right or wrong, else a paired
    bootstrap. With several seeds of a method over seeds and examples together, see `compare_over_seeds`.
    """
    if len(first.values) > 1 or len(second.values) > 1:
        return compare_over_seeds(first, second)
    if first.outcomes is not None and second.outcomes is not None:
        return mcnemar(first.outcomes, second.outcomes)
    return bootstrap_test(first.value - second.value, first.over_examples - second.over_examples)


def compare_over_seeds(first: Resampled, second: Resampled) -> float:
    """Two-sided p-value of the difference of two means over seeds and paired examples.

    The level at which the difference is sqrt(z^2 V + t^2 W): V the variance of the difference over examples, with a
    normal quantile; W that between seeds, with Student's and Welch's degrees of freedom. Adding squares of quantiles
    never counts too little (Banerjee 1960). Seeds of two methods are taken as independent: where the same seed helps
    both, the test is on the careful side. Of a method with a single run, seeds are taken to vary as in the other one.
    """
    difference = abs(first.value - second.value)
    if difference < ROUNDING:
        return 1.0
    over_examples = float((first.over_examples - second.over_examples).var())
    between_seeds, freedom = seed_variance(first, second)

    def excess(level: float) -> float:
        quantiles = norm.isf(level / 2) ** 2 * over_examples
        if between_seeds > 0:
            quantiles += t.isf(level / 2, freedom) ** 2 * between_seeds
        return math.sqrt(quantiles) - difference

    return SMALLEST_P if excess(SMALLEST_P) <= 0 else float(brentq(excess, SMALLEST_P, 1.0))


def seed_variance(first: Resampled, second: Resampled) -> tuple[float, float]:
    """Variance between seeds of the difference of two means, of which one at least is over several; its freedom.

    Welch's degrees of freedom are those of the variances as measured, what examples add to them included.
    """
    known = first if len(first.values) > 1 else second
    other = second if known is first else first
    if len(other.values) == 1:
        runs = 1 / len(known.values) + (0 if other.is_fixed else 1)
        return known.between_seeds * runs, len(known.values) - 1
    measured = [(method.measured_variance / len(method.values), len(method.values) - 1) for method in (known, other)]
    total = sum(variance for variance, _ in measured)
    between = sum(method.between_seeds / len(method.values) for method in (known, other))
    return between, total**2 / max(sum(v**2 / freedom for v, freedom in measured), ROUNDING**2)


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Exact McNemar test of two models on the same examples (N,), bool: are discordant pairs a fair coin?"""
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    if only_first == only_second:
        return 1.0
    return float(binomtest(only_first, only_first + only_second).pvalue)


def bootstrap_test(difference: float, resampled: np.ndarray) -> float:
    """Two-sided p-value of a difference from its resamples (R,): how often they stray from it as far as it is from 0.

    The smallest is 1 / (R + 1): the observed difference counts as one of the resamples (Davison and Hinkley 1997,
    chapter 4).
    """
    strayed = np.abs(resampled - difference) >= abs(difference) - ROUNDING
    return float((1 + strayed.sum()) / (1 + len(resampled)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p-values that may each be compared with the level for the whole family."""
    p_M = np.asarray(p_values, dtype=float)
    order = np.argsort(p_M, kind="stable")
    adjusted_M = np.empty_like(p_M)
    adjusted_M[order] = np.minimum(np.maximum.accumulate(p_M[order] * np.arange(len(p_M), 0, -1)), 1.0)
    return adjusted_M.tolist()


def mean_ranks(scores: np.ndarray, *, lower_is_better: Sequence[bool]) -> np.ndarray:
    """Ranks of methods by scores (M, T), 1 the best, averaged over tasks, (M,); ties share the mean of their ranks."""
    signed_MT = np.where(lower_is_better, scores, -scores)
    return rankdata(signed_MT, axis=0).mean(axis=1)


def detectable_difference(discordance: float, num_examples: int) -> float:
    """Smallest difference in exact match that McNemar's test finds with a power of 80 %, approximately.

    (z_0.975 + z_0.8) sqrt(discordance / N), the normal approximation for small differences (Connor 1987). Where that
    is more than the discordance, models differ in too few examples for it: then all discordant examples on one side.

    Args:
        discordance: share of examples, 0 to 1, that one of two models gets right and the other wrong.
    """
    needed = (norm.ppf((1 + CONFIDENCE) / 2) + norm.ppf(POWER)) ** 2 / num_examples
    return float(min(math.sqrt(max(discordance, needed) * needed), 1.0))
