"""Statistics of compressed models measured on the same examples: intervals, paired tests, corrections, ranks.

A run is one model (a method at one size, with one seed) on one task. A resample draws the same examples for every run
of the task, so that whatever is computed from resampled scores is paired.

Shapes: C runs, N examples, S runs of one method that differ by seed, R resamples, M methods, T tasks.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.stats import binomtest, norm, rankdata

from msmoe.evaluate.metrics import CONFIDENCE, NUM_RESAMPLES

ALPHA = 0.05
POWER = 0.8
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
    """

    seeds: tuple[int, ...]
    values: np.ndarray
    resampled: np.ndarray
    num_examples: int
    outcomes: np.ndarray | None = None

    @property
    def value(self) -> float:
        """Mean over seeds."""
        return float(self.values.mean())

    @cached_property
    def over_examples(self) -> np.ndarray:
        """Mean over seeds in each resample (R,), the seeds as they are."""
        return self.resampled.mean(axis=1)

    @cached_property
    def interval(self) -> tuple[float, float]:
        """95 % percentile interval over examples and seeds, both drawn with replacement in every resample.

        Examples and seeds are crossed, every seed sees all examples (pigeonhole bootstrap, Owen 2007, arXiv 0712.1111;
        on the wide side). A mean of S drawn seeds varies only (S - 1) / S as much as seeds do; with two or three of
        them that hides a third of the variance or more, so its deviations are scaled up (Rao and Wu 1988).
        """
        num_seeds = len(self.values)
        means_R = self.over_examples
        if num_seeds > 1:
            drawn_RS = draw(num_seeds, key="seeds")
            deviation_R = ((drawn_RS - 1 / num_seeds) * self.resampled).sum(axis=1)
            means_R = means_R + deviation_R * math.sqrt(num_seeds / (num_seeds - 1))
        low, high = np.quantile(means_R, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return float(low), float(high)


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
    )


def p_value(first: Resampled, second: Resampled) -> float:
    """Two-sided p-value that two methods score the same on the examples' population.

    McNemar's exact test where both are a single run scored right or wrong; else a paired bootstrap over examples of
    the difference between means over seeds. Seeds are not drawn: the question is about these models.
    """
    if first.outcomes is not None and second.outcomes is not None:
        return mcnemar(first.outcomes, second.outcomes)
    return bootstrap_test(first.value - second.value, first.over_examples - second.over_examples)


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
