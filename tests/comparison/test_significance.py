"""Tests and intervals against hand-worked numbers, naive loops and simulated models whose skill is known."""

import itertools

import numpy as np
import pytest
from scipy.stats import binomtest, norm, t, ttest_1samp, ttest_ind

from msmoe.comparison.significance import (
    Resampled,
    bootstrap_test,
    detectable_difference,
    draw,
    holm,
    mcnemar,
    mean_of,
    mean_ranks,
    p_value,
    resample_means,
    resample_ratios,
)


def runs(outcomes_SN: np.ndarray, *, key: str = "task") -> Resampled:
    """A method whose runs answer examples right or wrong."""
    outcomes_SN = np.asarray(outcomes_SN, dtype=bool)
    single = outcomes_SN[0] if len(outcomes_SN) == 1 else None
    resampled = resample_means(outcomes_SN.astype(float), key=key)
    return Resampled(tuple(range(len(outcomes_SN))), outcomes_SN.mean(axis=1), resampled, outcomes_SN.shape[1], single)


def pairs(both: int, only_first: int, only_second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes of two models with so many examples of each sort."""
    counts = [both, only_first, only_second, neither]
    return np.repeat([True, True, False, False], counts), np.repeat([True, False, True, False], counts)


def test_mcnemar_of_ten_against_two_is_the_hand_worked_binomial_tail():
    # 12 fair coins, at most 2 on one side: (1 + 12 + 66) / 4096, times two sides
    assert mcnemar(*pairs(50, 10, 2, 30)) == pytest.approx(2 * 79 / 4096)


def test_mcnemar_of_five_against_none_cannot_be_significant():
    # all of 5 coins on one side: 2 / 32
    assert mcnemar(*pairs(90, 5, 0, 5)) == pytest.approx(1 / 16)


def test_mcnemar_looks_at_discordant_examples_only():
    assert mcnemar(*pairs(50, 10, 2, 30)) == mcnemar(*pairs(0, 10, 2, 0))


def test_mcnemar_does_not_depend_on_the_order_of_the_models():
    first, second = pairs(5, 9, 1, 3)
    assert mcnemar(first, second) == mcnemar(second, first)


@pytest.mark.parametrize("discordant", [0, 1, 7])
def test_as_many_wins_on_either_side_give_no_evidence(discordant):
    assert mcnemar(*pairs(10, discordant, discordant, 10)) == 1.0


def test_single_runs_are_compared_by_mcnemar():
    first, second = pairs(50, 10, 2, 30)
    assert p_value(runs([first]), runs([second])) == binomtest(10, 12).pvalue


def seeded(values: np.ndarray, *, is_fixed: bool = False) -> Resampled:
    """A method of which the examples are all alike: only seeds vary."""
    values = np.asarray(values, dtype=float)
    return Resampled(tuple(range(len(values))), values, np.tile(values, (1000, 1)), 100, is_fixed=is_fixed)


def test_seeds_that_alone_vary_are_compared_by_welchs_test():
    first, second = [0.4, 0.5, 0.7], [0.3, 0.35, 0.2, 0.3]
    expected = ttest_ind(first, second, equal_var=False).pvalue
    assert p_value(seeded(first), seeded(second)) == pytest.approx(expected)


def test_several_seeds_are_compared_with_the_original_by_the_test_of_one_sample():
    values = [0.4, 0.5, 0.7]
    original = seeded([0.8], is_fixed=True)
    assert p_value(seeded(values), original) == pytest.approx(ttest_1samp(values, 0.8).pvalue)


def test_the_seeds_of_a_single_run_are_taken_to_vary_as_those_of_the_other_method():
    # a new observation beside S others of standard deviation s: t = d / (s sqrt(1 + 1 / S)), S - 1 degrees of freedom
    values = np.array([0.4, 0.5, 0.7])
    expected = 2 * t.sf((0.9 - values.mean()) / (values.std(ddof=1) * np.sqrt(4 / 3)), 2)
    assert p_value(seeded(values), seeded([0.9])) == pytest.approx(expected)


def test_examples_that_explain_all_differences_of_seeds_leave_a_normal_test():
    outcomes = np.random.default_rng(0).random((2, 400)) < [[0.7], [0.6]]
    first, second = (runs([outcome, outcome]) for outcome in outcomes)
    deviation = (first.over_examples - second.over_examples).std()
    assert p_value(first, second) == pytest.approx(2 * norm.sf((first.value - second.value) / deviation))


def test_a_method_is_never_significantly_different_from_itself():
    outcomes = np.random.default_rng(1).random((3, 100)) < 0.6
    assert p_value(runs(outcomes), runs(outcomes)) == 1.0


def test_the_same_runs_under_other_seeds_are_not_significantly_different():
    outcomes = np.random.default_rng(2).random((3, 100)) < 0.6
    # sums of thirds in another order differ in the last bit
    assert p_value(runs(outcomes), runs(outcomes[[2, 0, 1]])) == 1.0


def test_clearly_different_methods_are_significant():
    rng = np.random.default_rng(3)
    assert p_value(runs(rng.random((3, 300)) < 0.9), runs(rng.random((3, 300)) < 0.6)) < 0.01


def test_a_bootstrap_counts_the_observed_difference_as_a_resample():
    # none of 99 resamples strays from 1.0 by 1.0
    assert bootstrap_test(1.0, np.full(99, 1.2)) == 1 / 100


def test_a_bootstrap_is_two_sided():
    # 0.5 away from the observed 0.5 on either side: 2 of 4 resamples, and the observed one
    assert bootstrap_test(0.5, np.array([0.0, 1.0, 0.4, 0.6])) == 3 / 5


def test_a_bootstrap_of_equal_methods_rejects_about_as_often_as_it_says():
    rng = np.random.default_rng(4)
    trials = 200
    rejected = sum(
        p_value(runs(rng.random((2, 150)) < 0.7), runs(rng.random((2, 150)) < 0.7)) < 0.05 for _ in range(trials)
    )
    assert rejected <= 20  # of 200; 10 expected, standard deviation 3.1


def test_holms_correction_of_three_tests_by_hand():
    # ascending 0.01, 0.03, 0.04: 3 x 0.01, 2 x 0.03, 1 x 0.04 but no less than the one before
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_holms_correction_never_exceeds_one():
    assert holm([0.9, 0.6]) == [1.0, 1.0]


def test_holms_correction_leaves_a_single_test_alone():
    assert holm([0.02]) == [0.02]


def test_holms_correction_of_no_tests_is_empty():
    assert holm([]) == []


def test_ranks_with_ties_by_hand():
    scores = np.array([[0.9, 0.5], [0.9, 0.7], [0.1, 0.5]])
    # first task 1.5, 1.5, 3; second 2.5, 1, 2.5
    np.testing.assert_allclose(mean_ranks(scores, lower_is_better=[False, False]), [2.0, 1.25, 2.75])


def test_the_lowest_loss_ranks_first():
    scores = np.array([[0.9, 4.0], [0.8, 3.0]])
    np.testing.assert_allclose(mean_ranks(scores, lower_is_better=[False, True]), [1.5, 1.5])


def test_ranks_add_up_whatever_the_ties():
    scores = np.random.default_rng(5).integers(3, size=(7, 4)).astype(float)
    assert mean_ranks(scores, lower_is_better=[False] * 4).sum() == pytest.approx(7 * 8 / 2)


def test_a_resample_has_as_many_examples_as_there_are():
    counts = draw(37, key="task") * 37
    np.testing.assert_allclose(counts, counts.round(), atol=1e-9)
    np.testing.assert_allclose(counts.sum(axis=1), 37)


def test_resamples_are_the_same_every_time_and_differ_between_tasks():
    np.testing.assert_array_equal(draw(20, key="a"), draw(20, key="a"))
    assert (draw(20, key="a") != draw(20, key="b")).any()


def test_resampled_means_are_those_of_a_naive_loop():
    values = np.random.default_rng(6).normal(size=(2, 9))
    counts = (draw(9, key="task") * 9).round().astype(int)
    expected = [[np.repeat(row, drawn).mean() for row in values] for drawn in counts]
    np.testing.assert_allclose(resample_means(values, key="task"), expected)


def test_resampled_losses_are_per_token_of_the_resample():
    losses, tokens = np.array([[2.0, 9.0, 4.0]]), np.array([[1.0, 3.0, 5.0]])
    counts = (draw(3, key="task") * 3).round().astype(int)
    expected = [[np.repeat(losses[0], c).sum() / np.repeat(tokens[0], c).sum()] for c in counts]
    np.testing.assert_allclose(resample_ratios(losses, tokens, key="task"), expected)


def test_all_runs_see_the_same_resampled_examples():
    outcomes = np.random.default_rng(7).random(80) < 0.5
    found = resample_means(np.stack([outcomes, outcomes]).astype(float), key="task")
    np.testing.assert_array_equal(found[:, 0], found[:, 1])


def test_the_interval_of_one_run_is_the_normal_one():
    outcomes = np.repeat([True, False], [280, 120])
    deviation = np.sqrt(0.7 * 0.3 / 400)
    # quantiles of 1000 draws have a standard error of 0.085 deviations
    np.testing.assert_allclose(runs([outcomes]).interval, 0.7 + 1.96 * deviation * np.array([-1, 1]), atol=0.3 * 0.023)


@pytest.mark.parametrize(("num_seeds", "deviation"), [(1, 0.0), (3, 0.03), (4, 0.06)])
def test_the_interval_covers_the_skill_of_a_method_about_as_often_as_it_says(num_seeds, deviation):
    rng = np.random.default_rng(num_seeds)
    covered = 0
    for _ in range(100):
        skills = rng.normal(0.7, deviation, size=num_seeds)
        difficulty_N = rng.random(200)  # the same examples are hard for all seeds
        low, high = runs(difficulty_N < skills[:, None]).interval
        covered += low <= 0.7 <= high
    assert covered >= 85  # of 100; 91 to 95 in 400 trials


def test_the_interval_widens_with_the_variance_between_seeds():
    outcomes = np.arange(300) < 210
    alike = runs([outcomes] * 3)
    unlike = runs([np.arange(300) < right for right in (180, 210, 240)])
    assert alike.value == pytest.approx(unlike.value)
    widths = [high - low for low, high in (alike.interval, unlike.interval)]
    assert widths[1] > 1.5 * widths[0]


def test_the_interval_over_seeds_alone_is_students():
    # mean 0.55, standard deviation 0.1291 / 2 of the mean, 3.1824 of them: 0.55 +- 0.2054
    assert seeded([0.4, 0.5, 0.6, 0.7]).interval == pytest.approx((0.3446, 0.7554), abs=1e-4)


def test_seeds_that_agree_add_nothing_to_the_interval():
    outcomes = np.random.default_rng(8).random(100) < 0.6
    assert runs([outcomes] * 3).interval == pytest.approx(runs([outcomes]).interval)


def test_a_mean_over_tasks_weighs_tasks_equally():
    small, large = runs([[True, False]], key="a"), runs([[True] * 9 + [False]], key="b")
    mean = mean_of([small, large])
    assert mean.value == pytest.approx((0.5 + 0.9) / 2)
    assert mean.num_examples == 12


def test_a_mean_over_tasks_is_over_the_seeds_that_all_have():
    first = Resampled((0, 1), np.array([0.2, 0.4]), np.zeros((5, 2)), 10)
    second = Resampled((1, 2), np.array([0.6, 0.8]), np.ones((5, 2)), 10)
    mean = mean_of([first, second])
    assert mean.seeds == (1,)
    assert mean.value == pytest.approx((0.4 + 0.6) / 2)


def test_there_is_no_mean_over_tasks_without_a_common_seed():
    first, second = (Resampled((seed,), np.zeros(1), np.zeros((5, 1)), 10) for seed in (0, 1))
    assert mean_of([first, second]) is None


def test_the_mean_over_independent_tasks_is_more_certain_than_a_task():
    tasks = [runs([np.arange(200) < 120], key=key) for key in "abcd"]
    widths = [high - low for low, high in (tasks[0].interval, mean_of(tasks).interval)]
    assert widths[1] == pytest.approx(widths[0] / 2, rel=0.15)  # four tasks halve the deviation


def test_the_detectable_difference_by_hand():
    # z: 1.9600 + 0.8416 = 2.8016; 2.8016 sqrt(0.2 / 400) = 0.06265
    assert detectable_difference(0.2, 400) == pytest.approx(0.06265, abs=1e-5)


def test_a_difference_of_the_detectable_size_is_found_four_times_of_five():
    rng = np.random.default_rng(9)
    difference = detectable_difference(0.2, 400)
    found = 0
    for _ in range(200):
        kind_N = rng.choice(3, size=400, p=[(0.2 + difference) / 2, (0.2 - difference) / 2, 0.8])
        found += mcnemar(kind_N == 0, kind_N == 1) < 0.05
    assert 144 <= found <= 176  # of 200; 160 expected, standard deviation 5.7


def test_models_that_hardly_disagree_need_eight_discordant_examples():
    # 2.8016 squared is 7.85: with as many on one side, 2 / 2**8 = 0.008; no fewer than 6 would do
    assert detectable_difference(0.0, 100) == pytest.approx(0.0785, abs=1e-4)


def test_more_examples_tell_smaller_differences():
    found = [detectable_difference(0.1, n) for n in (50, 100, 1000)]
    assert all(a > b for a, b in itertools.pairwise(found))
