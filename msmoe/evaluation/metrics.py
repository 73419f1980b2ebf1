"""Metrics over examples with bootstrap 95 % confidence intervals (percentile method).

Shapes: N examples, R resamples, L labels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A value, its 95 % confidence interval and the number of examples."""

    value: float
    low: float
    high: float
    num_examples: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(statistic: Callable[[np.ndarray], float], num_examples: int, *, seed: int = 0) -> Estimate:
    """Estimate with an interval from resampled examples.

    Args:
        statistic: indices of examples (N,) -> value.
    """
    rng = np.random.default_rng([seed, num_examples])
    values = [statistic(rng.integers(num_examples, size=num_examples)) for _ in range(NUM_RESAMPLES)]
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(statistic(np.arange(num_examples)), float(low), float(high), num_examples)


def mean(values: np.ndarray) -> Estimate:
    """Mean of per-example values (N,)."""
    return bootstrap(lambda chosen: float(values[chosen].mean()), len(values))


def loss_per_token(losses: np.ndarray, num_tokens: np.ndarray) -> Estimate:
    """Summed losses (N,) over summed target tokens (N,): resampled by example."""
    return bootstrap(lambda chosen: float(losses[chosen].sum() / num_tokens[chosen].sum()), len(losses))


def perplexity(loss: Estimate) -> Estimate:
    """exp of a loss in nats per token, ends of the interval included."""
    with np.errstate(over="ignore"):
        value, low, high = (float(np.exp(x)) for x in (loss.value, loss.low, loss.high))
    return Estimate(value, low, high, loss.num_examples)


def macro_f1(predicted: Sequence[str], gold: Sequence[str], labels: Sequence[str] = ()) -> Estimate:
    """F1 averaged over the labels that are the gold one of an example.

    A prediction that is no label is wrong for its gold label only. One that is a label of the task, but of no example
    here, counts as that label's F1 of 0.

    Args:
        labels: of the task, where that has more than `gold`.
    """
    names = np.array(sorted({*gold, *labels}), dtype=object)
    index = {label: i for i, label in enumerate(names)}
    gold_ids = np.array([index[label] for label in gold])
    predicted_ids = np.array([index.get(p, len(names)) for p in predicted])
    is_gold = np.bincount(gold_ids, minlength=len(names)) > 0

    def statistic(chosen: np.ndarray) -> float:
        size = len(names) + 1
        true, guess = gold_ids[chosen], predicted_ids[chosen]
        hits = np.bincount(true[true == guess], minlength=size)[:-1]
        wanted, given = (np.bincount(ids, minlength=size)[:-1] for ids in (true, guess))
        counts = np.where(is_gold, wanted, given) > 0
        return float((2 * hits / np.maximum(wanted + given, 1))[counts].mean())

    return bootstrap(statistic, len(gold_ids))
