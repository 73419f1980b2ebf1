"""The progressive schedule of task-specific pruning."""

import numpy as np
import pytest

from msmoe.planning.progressive import live_usage, logit_routes, progressive_subset


def logits_for(expert: np.ndarray, num_experts: int, *, second: dict[int, int] | None = None) -> np.ndarray:
    """Logits whose largest is the given expert's, and whose second largest is its heir's."""
    logits = np.zeros((len(expert), num_experts))
    for heir, by in (second or {}).items():
        logits[expert == heir, by] = 1.0
    logits[np.arange(len(expert)), expert] = 2.0
    return logits


def test_the_most_used_experts_stay():
    expert = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3], [50, 300, 100, 200]))
    assert progressive_subset(logit_routes(logits_for(expert, 4)), 4, np.ones(650), 2) == (1, 3)


def test_tokens_of_a_dropped_expert_count_for_the_one_that_takes_them():
    """Expert 3 is least used and goes first; its tokens lift expert 2 above expert 1."""
    counts = [6000, 520, 500, 100]  # shares .84 .073 .070 .014; 3 is below .1 / 4, then 2 has .084
    expert = np.random.default_rng(1).permutation(np.repeat(np.arange(4), counts))
    assert progressive_subset(logit_routes(logits_for(expert, 4, second={3: 2})), 4, np.ones(7120), 2) == (0, 2)
    assert progressive_subset(logit_routes(logits_for(expert, 4, second={3: 0})), 4, np.ones(7120), 2) == (0, 1)


def test_no_token_goes_to_a_dropped_expert_whatever_the_sign_of_its_logits():
    logits = np.array([[-3.0, -1.0, -2.0], [-5.0, -1.0, -4.0]])
    assert live_usage(logit_routes(logits), np.arange(2), np.ones(2), np.array([True, False, True])).tolist() == [
        0.0,
        0.0,
        1.0,
    ]


def test_weights_count_tokens():
    logits = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert live_usage(logit_routes(logits), np.arange(2), np.array([3.0, 1.0]), np.ones(2, dtype=bool)).tolist() == [
        0.75,
        0.25,
    ]


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_exactly_as_many_stay_as_were_asked_for(count):
    rng = np.random.default_rng(2)
    assert len(progressive_subset(logit_routes(rng.normal(size=(300, 6))), 6, np.ones(300), count)) == count


def test_ties_go_to_the_lower_index():
    assert progressive_subset(logit_routes(np.zeros((0, 4))), 4, np.ones(0), 2) == (0, 1)
