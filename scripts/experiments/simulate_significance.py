"""How often the tests of `msmoe compare` find a difference where there is none, and what its intervals cover.

    python scripts/experiments/simulate_significance.py                    the table, about four minutes on one core
    python scripts/experiments/simulate_significance.py --trials 200

Two methods of the same skill answer the same examples. A score is the difficulty of the example (standard deviation 1,
shared by all runs), plus what the seed of the run adds to all of them, plus noise of the run on the example. Both
numbers should be near 0.05 and 0.95; "examples alone" is the test that takes the seeds as they are.
"""

import argparse
from itertools import product
from typing import NamedTuple

import numpy as np

from msmoe.comparison.significance import Resampled, bootstrap_test, p_value, resample_means

NUM_EXAMPLES, LEVEL = 400, 0.05
SEEDS = (2, 3, 5)
DEVIATIONS = (0.0, 0.03, 0.1)  # between seeds
NOISES = (0.3, 1.0)  # of a run on an example


class Rates(NamedTuple):
    """Shares of the trials: a true "same" rejected, the same over examples alone, an interval that covers its mean."""

    rejected: float
    examples_alone: float
    covered: float


def simulate(num_seeds: int, deviation: float, *, noise: float = 0.3, trials: int = 1000, seed: int = 0) -> Rates:
    """Compare two methods of the same skill, `num_seeds` runs each.

    Args:
        deviation: standard deviation between seeds; noise: that of a run on an example.
    """
    rng = np.random.default_rng(seed)
    counts = np.zeros(3)
    for _ in range(trials):
        difficulty_N = rng.normal(size=NUM_EXAMPLES)
        first, second = (method(rng, difficulty_N, num_seeds, deviation, noise) for _ in range(2))
        resampled = first.over_examples - second.over_examples
        low, high = first.interval
        counts += (
            p_value(first, second) < LEVEL,
            bootstrap_test(first.value - second.value, resampled) < LEVEL,
            low <= 0 <= high,
        )
    return Rates(*(counts / trials).tolist())


def method(
    rng: np.random.Generator, difficulty_N: np.ndarray, num_seeds: int, deviation: float, noise: float
) -> Resampled:
    """Runs of a method whose true score is 0."""
    scores_SN = difficulty_N + rng.normal(0, deviation, size=(num_seeds, 1))
    scores_SN += rng.normal(0, noise, size=(num_seeds, len(difficulty_N)))
    resampled_RS = resample_means(scores_SN, key="task")
    return Resampled(tuple(range(num_seeds)), scores_SN.mean(axis=1), resampled_RS, len(difficulty_N))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000, help="of each line")
    trials = parser.parse_args().trials
    print("| noise | seeds | sd between seeds | rejected | examples alone | covered |\n|---|---|---|---|---|---|")
    for noise, num_seeds, deviation in product(NOISES, SEEDS, DEVIATIONS):
        found = simulate(num_seeds, deviation, noise=noise, trials=trials)
        numbers = " | ".join(f"{rate:.3f}" for rate in found)
        print(f"| {noise:g} | {num_seeds} | {deviation:g} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
