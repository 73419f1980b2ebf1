"""The tests of a comparison keep their level where nothing differs, and its intervals cover what they say."""

import pytest
from simulate_significance import simulate


@pytest.mark.parametrize("num_seeds", [2, 3])
@pytest.mark.parametrize("deviation", [0.0, 0.1])
def test_a_true_same_is_seldom_rejected_at_few_seeds(num_seeds, deviation):
    assert simulate(num_seeds, deviation, trials=150).rejected <= 0.12  # 0.05 expected, standard deviation 0.018


@pytest.mark.parametrize("num_seeds", [2, 3])
def test_intervals_cover_the_true_score_at_few_seeds(num_seeds):
    assert simulate(num_seeds, 0.1, trials=150).covered >= 0.88  # 0.95 expected, standard deviation 0.018


def test_taking_the_seeds_as_they_are_rejects_a_true_same_where_seeds_vary():
    assert simulate(2, 0.1, trials=100).examples_alone >= 0.5
