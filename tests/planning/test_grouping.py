"""Budgets over layers and groups of experts."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msmoe.errors import UserError
from msmoe.planning.grouping import (
    GROUPINGS,
    assign_to_kept,
    centroids_first,
    dominant_experts,
    group_counts,
    group_experts,
)


def random_similarity(num_experts: int, seed: int = 0) -> torch.Tensor:
    vectors = torch.randn(num_experts, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    return ((1 + unit @ unit.T) / 2).clamp(0, 1).fill_diagonal_(1)


def random_usage(num_experts: int, seed: int = 0) -> torch.Tensor:
    usage = torch.rand(num_experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return usage / usage.sum()


# Few distinct values and zeros: ties everywhere.
tied_usage = st.lists(
    st.lists(st.integers(0, 3), min_size=6, max_size=6).map(lambda c: np.array(c) / max(sum(c), 1)),
    min_size=1,
    max_size=6,
)


@given(tied_usage, st.data())
def test_the_adaptive_total_is_exact_with_ties(usage, draw):
    total = draw.draw(st.integers(len(usage), 6 * len(usage)))
    counts = group_counts(usage, total / len(usage))
    assert sum(counts) == total
    assert all(1 <= count <= 6 for count in counts)


@given(tied_usage)
def test_raising_the_budget_never_takes_an_expert_from_a_layer(usage):
    previous = [0] * len(usage)
    for total in range(len(usage), 6 * len(usage) + 1):
        counts = group_counts(usage, total / len(usage))
        assert all(now >= before for now, before in zip(counts, previous, strict=True))
        previous = counts


@given(tied_usage)
def test_a_budget_of_every_expert_keeps_every_expert(usage):
    assert group_counts(usage, 6) == [6] * len(usage)


def test_the_adaptive_budget_goes_to_the_most_used_experts_of_all_layers():
    usage = [np.array([0.9, 0.04, 0.03, 0.03]), np.array([0.3, 0.28, 0.22, 0.2])]
    # one each, then of 6 - 2 places: .28, .22, .2 in the second layer and .04 in the first
    assert group_counts(usage, 3) == [2, 4]


def test_equal_usage_goes_to_the_earlier_layer():
    assert group_counts([np.full(4, 0.25)] * 3, 4 / 3) == [2, 1, 1]


def test_a_fractional_average_is_rounded_over_all_layers():
    assert sum(group_counts([np.full(4, 0.25)] * 3, 2.3)) == 7  # round(6.9)


def test_a_uniform_budget_gives_every_layer_the_same():
    assert group_counts([np.array([0.9, 0.1, 0.0]), np.full(3, 1 / 3)], 2, budget="uniform") == [2, 2]


def test_a_uniform_budget_that_is_not_whole_gives_one_more_where_the_next_expert_is_used_most():
    usage = [np.array([0.4, 0.3, 0.3]), np.array([0.5, 0.48, 0.02]), np.array([0.6, 0.25, 0.15])]
    # 4 experts for 3 layers: one each, and the fourth to the largest of the second-most used .3, .48, .25
    assert group_counts(usage, 4 / 3, budget="uniform") == [1, 2, 1]


@pytest.mark.parametrize("average", [0, 0.9, 4.1, -2, float("nan")])
@pytest.mark.parametrize("budget", ["adaptive", "uniform"])
def test_an_impossible_budget_is_refused(average, budget):
    with pytest.raises(UserError, match="must be between 1 and 4"):
        group_counts([np.full(4, 0.25)] * 2, average, budget=budget)


def test_dominant_experts_are_the_most_used_and_ties_go_to_the_lower_index():
    assert dominant_experts(np.array([0.1, 0.4, 0.1, 0.4]), 3) == [1, 3, 0]


@pytest.mark.parametrize("grouping", GROUPINGS)
class TestEveryGrouping:
    @pytest.mark.parametrize("count", range(1, 9))
    def test_makes_the_asked_number_of_groups_out_of_all_experts(self, grouping, count):
        groups = group_experts(random_usage(8), random_similarity(8), count, grouping=grouping)
        assert len(groups) == count
        assert sorted(e for _, members in groups for e in members) == list(range(8))
        assert all(members == sorted(members) and members for _, members in groups)

    def test_the_dominant_expert_is_the_most_used_member(self, grouping):
        usage = random_usage(8)
        for dominant, members in group_experts(usage, random_similarity(8), 3, grouping=grouping):
            assert dominant == max(members, key=lambda e: float(usage[e]))

    def test_groups_are_ordered_by_the_usage_of_their_dominant_expert(self, grouping):
        usage = random_usage(8)
        dominants = [float(usage[d]) for d, _ in group_experts(usage, random_similarity(8), 4, grouping=grouping)]
        assert dominants == sorted(dominants, reverse=True)

    def test_identical_experts_still_fill_every_group(self, grouping):
        groups = group_experts(torch.full((6,), 1 / 6), torch.ones(6, 6, dtype=torch.float64), 4, grouping=grouping)
        assert len(groups) == 4
        assert sorted(e for _, members in groups for e in members) == list(range(6))

    def test_the_same_seed_gives_the_same_groups(self, grouping):
        arguments = random_usage(8), random_similarity(8), 3
        assert group_experts(*arguments, grouping=grouping, seed=5) == group_experts(
            *arguments, grouping=grouping, seed=5
        )

    def test_nan_in_the_similarity_is_refused(self, grouping):
        broken = random_similarity(4)
        broken[1, 2] = torch.nan
        with pytest.raises(UserError, match="not finite"):
            group_experts(random_usage(4), broken, 2, grouping=grouping)


@pytest.mark.parametrize("grouping", ["dominant", "hierarchical", "spectral", "kmeans"])
def test_groupings_recover_planted_clusters(grouping):
    planted = [0, 1, 2, 0, 1, 2, 0, 1, 2]
    similarity = torch.tensor([[1.0 if a == b else 0.1 for b in planted] for a in planted], dtype=torch.float64)
    similarity += 0.01 * random_similarity(9)
    similarity = similarity.clamp(0, 1).fill_diagonal_(1)
    usage = torch.tensor([9.0, 8.0, 7.0, 1.0, 1.1, 1.2, 2.0, 2.1, 2.2], dtype=torch.float64)
    groups = group_experts(usage / usage.sum(), similarity, 3, grouping=grouping)
    assert groups == [(0, [0, 3, 6]), (1, [1, 4, 7]), (2, [2, 5, 8])]


@pytest.mark.parametrize("grouping", ["dominant", "hierarchical"])
def test_permuting_the_experts_permutes_the_groups(grouping):
    order = [4, 2, 7, 0, 6, 1, 5, 3]
    usage, similarity = random_usage(8), random_similarity(8)
    groups = group_experts(usage, similarity, 3, grouping=grouping)
    moved = group_experts(usage[order], similarity[order][:, order], 3, grouping=grouping)
    assert [(order[d], sorted(order[e] for e in members)) for d, members in moved] == groups


def test_every_other_expert_joins_the_most_similar_dominant_one():
    usage, similarity = random_usage(8), random_similarity(8)
    groups = group_experts(usage, similarity, 3)
    dominants = [d for d, _ in groups]
    assert dominants == dominant_experts(usage.numpy(), 3)
    for dominant, members in groups:
        for e in set(members) - {dominant}:
            assert dominant == max(dominants, key=lambda d: float(similarity[e, d]))


def test_equal_similarity_goes_to_the_more_used_dominant_expert():
    usage = torch.tensor([0.2, 0.1, 0.7], dtype=torch.float64)
    similarity = torch.tensor([[1, 0.5, 0.3], [0.5, 1, 0.5], [0.3, 0.5, 1]], dtype=torch.float64)
    assert group_experts(usage, similarity, 2) == [(2, [1, 2]), (0, [0])]


@given(st.integers(0, 200), st.integers(1, 8), st.integers(1, 8))
def test_capacity_is_respected_or_refused(seed, count, capacity):
    usage, similarity = random_usage(8, seed), random_similarity(8, seed)
    if count * capacity < 8:
        with pytest.raises(UserError, match=f"{count} groups of at most {capacity} cannot hold 8 experts"):
            group_experts(usage, similarity, count, capacity=capacity)
    else:
        assert (
            max(len(members) for _, members in group_experts(usage, similarity, count, capacity=capacity)) <= capacity
        )


def test_with_capacity_the_more_used_expert_chooses_first():
    usage = torch.tensor([0.4, 0.3, 0.1, 0.2], dtype=torch.float64)
    similarity = torch.tensor(
        [[1, 0.1, 0.9, 0.8], [0.1, 1, 0.2, 0.2], [0.9, 0.2, 1, 0.5], [0.8, 0.2, 0.5, 1]], dtype=torch.float64
    )
    # both 3 and 2 prefer group 0, which has room for one: 3 is used more, 2 goes to group 1
    assert group_experts(usage, similarity, 2, capacity=2) == [(0, [0, 3]), (1, [1, 2])]


def test_unused_experts_dominate_by_index():
    groups = group_experts(torch.zeros(4, dtype=torch.float64), random_similarity(4), 2)
    assert [dominant for dominant, _ in groups] == [0, 1]


def test_every_expert_goes_to_the_most_similar_kept_one():
    similarity = np.array([[1.0, 0.9, 0.2, 0.1], [0.9, 1.0, 0.3, 0.4], [0.2, 0.3, 1.0, 0.8], [0.1, 0.4, 0.8, 1.0]])
    usage = np.array([0.4, 0.3, 0.2, 0.1])
    assert assign_to_kept(usage, similarity, [0, 2]).tolist() == [0, 0, 1, 1]
    assert assign_to_kept(usage, similarity, [1, 3]).tolist() == [0, 0, 1, 1]


def test_of_equally_similar_kept_experts_the_more_used_one_takes():
    assert assign_to_kept(np.array([0.1, 0.6, 0.3]), np.ones((3, 3)), [0, 1]).tolist() == [0, 1, 1]


def test_a_kept_expert_stays_with_itself_even_if_another_is_as_similar():
    assert assign_to_kept(np.array([0.5, 0.4, 0.1]), np.ones((3, 3)), [0, 1, 2]).tolist() == [0, 1, 2]


def test_centroids_take_their_nearest_in_the_order_of_their_scores():
    scores = np.array([0.5, 0.4, 0.1, 0.1, 0.1])
    similarity = np.eye(5)
    similarity[0] = [1.0, 0.0, 0.6, 0.9, 0.8]
    similarity[1] = [0.0, 1.0, 0.9, 0.9, 0.9]
    # capacity 3: expert 0 takes 3 (.9) and 4 (.8) before expert 1 may choose; 2 is left for it
    assert centroids_first(scores, similarity, 2, capacity=3).tolist() == [0, 1, 1, 0, 0]


def test_with_room_for_all_the_first_centroid_takes_all():
    scores = np.array([0.1, 0.5, 0.4, 0.2])
    assert centroids_first(scores, np.ones((4, 4)), 2).tolist() == [0, 0, 1, 0]


def test_centroids_without_room_for_all_are_refused():
    with pytest.raises(UserError, match="2 groups of at most 16 cannot hold 40 experts"):
        centroids_first(np.ones(40), np.ones((40, 40)), 2)
