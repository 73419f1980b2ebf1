"""Metrics against hand-worked numbers and scikit-learn, their intervals against the analytic ones."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as distributions
from sklearn.metrics import f1_score

from msmoe.evaluation.metrics import bootstrap, loss_per_token, macro_f1, mean

ANSWERS = st.lists(
    st.tuples(st.sampled_from(["cat", "dog", "eel", "fox", "no label", ""]), st.sampled_from(["cat", "dog", "eel"])),
    min_size=1,
    max_size=30,
)


@pytest.mark.parametrize(("right", "total"), [(120, 400), (388, 400), (50, 100)])
def test_the_interval_of_a_share_is_the_binomial_one(right, total):
    estimate = mean(np.repeat([1.0, 0.0], [right, total - right]))
    # resampling 0/1 values draws a binomial count with the observed share
    expected = distributions.binom.ppf([0.025, 0.975], total, right / total) / total
    deviation = np.sqrt(right * (total - right) / total) / total
    # quantile of 1000 draws: standard error sqrt(0.025 * 0.975 / 1000) / 0.0584 = 0.085 deviations; steps of 1 / total
    np.testing.assert_allclose([estimate.low, estimate.high], expected, atol=0.3 * deviation + 1 / total)


def test_the_interval_of_a_mean_is_the_normal_one():
    values = np.random.default_rng(0).normal(5.0, 2.0, size=500)
    deviation = values.std() / np.sqrt(500)
    estimate = mean(values)
    expected = values.mean() + 1.96 * deviation * np.array([-1, 1])
    np.testing.assert_allclose([estimate.low, estimate.high], expected, atol=0.35 * deviation)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    estimates = [mean(rng.binomial(1, 0.7, size=150).astype(float)) for _ in range(60)]
    covered = sum(e.low <= 0.7 <= e.high for e in estimates)
    assert covered >= 51  # of 60; 57 expected, standard deviation 1.7


def test_four_times_the_examples_halve_the_interval():
    few, many = (mean(np.tile([1.0, 0.0], n // 2)) for n in (250, 1000))
    assert (few.high - few.low) / (many.high - many.low) == pytest.approx(2, rel=0.15)


def test_the_same_answer_for_every_example_leaves_no_doubt():
    estimate = mean(np.ones(30))
    assert (estimate.value, estimate.low, estimate.high, estimate.num_examples) == (1, 1, 1, 30)


def test_an_interval_is_the_same_every_time_and_another_for_another_seed():
    values = np.random.default_rng(2).normal(size=60)
    statistic = lambda chosen: float(values[chosen].mean())
    assert bootstrap(statistic, 60, seed=3) == bootstrap(statistic, 60, seed=3)
    assert bootstrap(statistic, 60, seed=3) != bootstrap(statistic, 60, seed=4)


def test_the_value_is_of_the_examples_themselves_not_of_a_resample():
    assert mean(np.array([1.0, 2.0, 6.0])).value == 3.0


def test_macro_f1_of_a_hand_worked_table():
    gold = ["a", "a", "b", "b"]
    predicted = ["a", "b", "b", "neither"]
    # a: 1 hit, 1 predicted, 2 gold: 2 * 1 / 3; b: 1 hit, 2 predicted, 2 gold: 2 * 1 / 4; mean 7 / 12
    assert macro_f1(predicted, gold).value == pytest.approx(7 / 12)


@settings(max_examples=30, deadline=None)
@given(ANSWERS)
def test_macro_f1_is_that_of_scikit_learn_over_the_gold_labels(pairs):
    predicted, gold = zip(*pairs, strict=True)
    expected = f1_score(gold, predicted, labels=sorted(set(gold)), average="macro", zero_division=0)
    assert macro_f1(predicted, gold).value == pytest.approx(expected)


def test_answers_that_are_no_label_never_help():
    gold = ["a", "b"] * 20
    assert macro_f1(["a"] * 20 + ["nonsense"] * 20, gold).value < macro_f1(["a"] * 40, gold).value


def test_macro_f1_counts_a_rare_label_as_much_as_a_frequent_one():
    gold = ["often"] * 98 + ["rarely"] * 2
    # often: 2 * 98 / (98 + 100), rarely: 0
    assert macro_f1(["often"] * 100, gold).value == pytest.approx(98 / 198 * 2 / 2)


def test_the_interval_of_macro_f1_holds_its_value():
    rng = np.random.default_rng(5)
    gold = rng.choice(["a", "b", "c"], size=200)
    predicted = np.where(rng.random(200) < 0.7, gold, rng.choice(["a", "b", "c"], size=200))
    estimate = macro_f1(predicted.tolist(), gold.tolist())
    assert 0 < estimate.low < estimate.value < estimate.high < 1


def test_the_loss_counts_tokens_not_examples():
    # 2 over 1 token and 9 over 3: 11 / 4, not (2 + 3) / 2
    assert loss_per_token(np.array([2.0, 9.0]), np.array([1, 3])).value == 11 / 4


def test_the_interval_of_the_loss_lies_between_the_extreme_examples():
    estimate = loss_per_token(np.array([2.0, 9.0, 8.0, 1.0]), np.array([1, 3, 2, 2]))
    assert 1 / 2 <= estimate.low < estimate.value < estimate.high <= 8 / 2


def test_an_estimate_prints_its_interval():
    estimate = mean(np.ones(5))
    assert str(estimate) == "1.000 [1.000, 1.000]"
