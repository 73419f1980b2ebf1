"""ZipIt: which units join, what a cluster becomes, and what is kept exactly."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msmoe.layer.expert import Expert, switch_expert
from msmoe.merge import zipit
from msmoe.merge.align import match_activations
from msmoe.merge.zipit import assemble, join_most_similar, similarities, zip_experts

F, D = 12, 6


def random_expert(seed: int, num_hidden: int = F) -> Expert:
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=generator)
    return switch_expert(randn(num_hidden, D), randn(D, num_hidden))


def random_inputs(count: int = 300) -> torch.Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(77))


def order(seed: int) -> torch.Tensor:
    return torch.randperm(F, generator=torch.Generator().manual_seed(seed))


def mixture(members: list[Expert], weights: list[float], x: torch.Tensor) -> torch.Tensor:
    return sum(w * member(x) for w, member in zip(weights, members, strict=True))


def assert_equal(left: Expert, right: Expert):
    assert torch.equal(left.inputs["wi"], right.inputs["wi"])
    assert torch.equal(left.output, right.output)


def test_a_hand_worked_assembly():
    a = switch_expert(torch.tensor([[1.0], [2.0]]), torch.tensor([[4.0, 8.0]]))
    b = switch_expert(torch.tensor([[5.0], [6.0]]), torch.tensor([[2.0, 4.0]]))
    zipped = assemble([a, b], [0.25, 0.75], torch.tensor([0, 0, 1, 0]))
    # {a0, a1, b1}: (0.25 * 1 + 0.25 * 2 + 0.75 * 6) / (0.25 + 0.25 + 0.75) = 5.25 / 1.25; {b0} keeps its row
    torch.testing.assert_close(zipped.inputs["wi"], torch.tensor([[4.2], [5.0]]))
    torch.testing.assert_close(zipped.output, torch.tensor([[6.0, 1.5]]))  # 0.25 * 4 + 0.25 * 8 + 0.75 * 4; 0.75 * 2


def test_the_assembly_is_the_product_with_merge_and_unmerge_matrices():
    members, weights = [random_expert(s) for s in range(3)], [0.2, 0.3, 0.5]
    clusters = torch.randint(F, (3 * F,), generator=torch.Generator().manual_seed(1)).unique(return_inverse=True)[1]
    unmerge = torch.nn.functional.one_hot(clusters).float()
    merge = unmerge.T * torch.tensor(weights).repeat_interleave(F)
    merge /= merge.sum(1, keepdim=True)
    zipped = assemble(members, weights, clusters)
    torch.testing.assert_close(merge @ unmerge, torch.eye(int(clusters.max()) + 1))
    torch.testing.assert_close(zipped.inputs["wi"], merge @ torch.cat([m.inputs["wi"] for m in members]))
    columns = torch.cat([w * m.output for w, m in zip(weights, members, strict=True)], dim=1)
    torch.testing.assert_close(zipped.output, columns @ unmerge)


def test_duplicate_neurons_inside_an_expert_join_without_loss():
    small = [random_expert(s, F // 2) for s in (0, 1)]
    members = [
        switch_expert(m.inputs["wi"].repeat(2, 1), torch.randn(D, F, generator=torch.Generator().manual_seed(5)))
        for m in small
    ]
    zipped, report = zip_experts(members, [0.25, 0.75], random_inputs())
    x = random_inputs()
    torch.testing.assert_close(zipped(x), mixture(members, [0.25, 0.75], x), rtol=1e-5, atol=1e-5)
    assert report.num_joined == report.num_joined_within == F


@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("num_members", [2, 3, 5])
def test_shuffled_copies_of_an_expert_give_that_expert_bit_for_bit(num_members, within):
    expert = random_expert(0)
    members = [expert, *(expert.permuted(order(s)) for s in range(1, num_members))]
    weights = [(i + 1) / sum(range(num_members + 1)) for i in range(num_members)]
    zipped, report = zip_experts(members, weights, random_inputs(), within=within)
    assert_equal(zipped, expert)
    assert report.num_joined_within == 0
    assert report.largest_cluster == num_members


@pytest.mark.parametrize("within", [True, False])
def test_copies_with_dead_neurons_give_that_expert(within):
    expert, x = random_expert(0), random_inputs().abs()
    expert.inputs["wi"][[2, 3, 7]] = -expert.inputs["wi"][
        [2, 3, 7]
    ].abs()  # silent on positive inputs, told apart by their weights
    zipped, _ = zip_experts([expert, expert.permuted(order(1))], [0.5, 0.5], x, within=within)
    assert_equal(zipped, expert)


def test_zero_neurons_give_no_nan():
    members = [random_expert(0), random_expert(1)]
    for member in members:
        member.inputs["wi"][:4], member.output[:, 2:6] = 0.0, 0.0
    zipped, _ = zip_experts(members, [0.5, 0.5], random_inputs())
    assert zipped.inputs["wi"].isfinite().all()
    assert zipped.output.isfinite().all()


@pytest.mark.parametrize("num_members", [2, 3, 4, 7])
def test_without_joins_inside_an_expert_every_cluster_holds_one_unit_of_each(num_members):
    members = [random_expert(s) for s in range(num_members)]
    _, report = zip_experts(members, [1 / num_members] * num_members, random_inputs(), within=False)
    assert report.num_joined == (num_members - 1) * F
    assert report.num_joined_within == 0
    assert report.largest_cluster == num_members


def test_without_joins_inside_an_expert_it_is_the_activation_match():
    expert, other, x = random_expert(0), random_expert(1), random_inputs()
    twin = switch_expert(expert.inputs["wi"] + 0.1 * other.inputs["wi"], expert.output + other.output).permuted(
        order(2)
    )
    aligned = twin.permuted(match_activations(expert, twin, x).permutation)
    zipped, _ = zip_experts([expert, twin], [0.5, 0.5], x, within=False)
    torch.testing.assert_close(zipped.inputs["wi"], (expert.inputs["wi"] + aligned.inputs["wi"]) / 2)
    torch.testing.assert_close(zipped.output, (expert.output + aligned.output) / 2)


@pytest.mark.parametrize("within", [True, False])
def test_a_single_neuron_is_reached(within):
    members = [random_expert(s, 1) for s in range(3)]
    zipped, _ = zip_experts(members, [0.2, 0.3, 0.5], random_inputs(), within=within)
    torch.testing.assert_close(
        zipped.inputs["wi"],
        0.2 * members[0].inputs["wi"] + 0.3 * members[1].inputs["wi"] + 0.5 * members[2].inputs["wi"],
    )


def test_one_member_is_returned_bit_for_bit():
    zipped, report = zip_experts([random_expert(0)], [1.0], random_inputs())
    assert_equal(zipped, random_expert(0))
    assert report.num_joined == 0


def test_one_hot_weights_give_that_member_bit_for_bit():
    zipped, _ = zip_experts([random_expert(s) for s in range(3)], [0.0, 1.0, 0.0], random_inputs())
    assert_equal(zipped, random_expert(1))


def test_the_order_of_the_members_does_not_matter():
    members, weights, x = [random_expert(s) for s in range(3)], [0.2, 0.3, 0.5], random_inputs()
    one, _ = zip_experts(members, weights, x)
    other, _ = zip_experts(members[::-1], weights[::-1], x)
    torch.testing.assert_close(one(x), other(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("count", "token_weights"), [(0, None), (1, None), (3, torch.tensor([0.0, 2.0, 0.0]))])
def test_fewer_than_two_tokens_give_the_member_of_largest_weight(count, token_weights):
    members = [random_expert(s) for s in range(3)]
    zipped, report = zip_experts(members, [0.3, 0.5, 0.2], random_inputs(count), token_weights)
    assert_equal(zipped, members[1])
    assert (report.enough_tokens, report.num_joined) == (False, 0)


def test_more_members_than_fit_at_once_are_zipped_in_parts(monkeypatch):
    monkeypatch.setattr(zipit, "MAX_UNITS", 2 * F)
    expert = random_expert(0)
    members = [expert, *(expert.permuted(order(s)) for s in range(1, 5))]
    zipped, report = zip_experts(members, [0.1, 0.1, 0.2, 0.2, 0.4], random_inputs())
    assert_equal(zipped, expert)
    assert report.largest_cluster == 5


def test_parts_keep_the_weights_of_the_members(monkeypatch):
    monkeypatch.setattr(zipit, "MAX_UNITS", 2)
    members = [random_expert(s, 1) for s in range(3)]
    zipped, _ = zip_experts(members, [0.2, 0.3, 0.5], random_inputs())
    torch.testing.assert_close(
        zipped.output, 0.2 * members[0].output + 0.3 * members[1].output + 0.5 * members[2].output
    )


@pytest.mark.parametrize("damping", [-0.1, 1.5, float("nan")])
def test_an_impossible_damping_is_refused(damping):
    with pytest.raises(ValueError, match=rf"damping must be in \[0, 1\], got {damping}"):
        zip_experts([random_expert(0)], [1.0], random_inputs(), damping=damping)


def test_the_similarity_is_the_weighted_correlation_of_activations():
    members, x = [random_expert(0), random_expert(1)], random_inputs(700)
    counts = torch.randint(4, (700,), generator=torch.Generator().manual_seed(3))
    hidden = torch.cat([member.hidden(x) for member in members], dim=1).double().numpy()
    covariance = np.cov(hidden, rowvar=False, fweights=counts.numpy())
    deviation = np.sqrt(np.diag(covariance))
    similarity = similarities(members, x, counts.double())
    np.testing.assert_allclose(similarity.numpy(), covariance / np.outer(deviation, deviation), atol=1e-5)


def test_units_that_do_not_vary_compare_by_weights_and_are_below_all_others():
    wi = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-3.0, 0.0], [-1.0, 0.0], [0.0, -1.0]])
    wo = torch.tensor([[1.0, 1.0, 0.0, 0.0, 1.0]])
    x = torch.tensor([[1.0, 1.0], [2.0, 1.0], [1.0, 2.0], [2.0, 2.0]])
    similarity = similarities([switch_expert(wi, wo)], x, torch.ones(4).double())
    assert similarity[0, 1].item() == pytest.approx(0.0, abs=1e-6)  # the inputs are independent
    assert similarity[2, 3].item() == pytest.approx(0.5)  # (1 for wi + 0 for wo) / 2
    assert similarity[3, 4].item() == pytest.approx(0.0)
    assert similarity[1, 4].item() == pytest.approx(-3.0)  # (-1 for wi + 1 for wo) / 2 - 3
    assert similarity[2:, :2].amax() < -1


def symmetric(entries: dict[tuple[int, int], float], size: int = 4) -> torch.Tensor:
    matrix = torch.full((size, size), -0.9)
    for (i, j), value in entries.items():
        matrix[i, j] = matrix[j, i] = value
    return matrix


def test_a_joined_unit_is_damped_against_units_of_the_same_expert():
    owners = torch.tensor([0, 0, 1, 1])
    entries = {(0, 2): 0.9, (0, 1): 0.8, (1, 2): 0.8, (1, 3): 0.5}
    # {0, 2} joins first; it is 0.8 from unit 1, of the expert of unit 0: damped to 0.24, below the 0.5 of 1 and 3
    assert join_most_similar(symmetric(entries), owners, 2, damping=0.3).tolist() == [0, 1, 0, 1]
    assert join_most_similar(symmetric(entries), owners, 2, damping=1.0).tolist() == [0, 0, 0, 1]


def test_a_joined_unit_is_not_damped_against_another_expert():
    entries = {(0, 1): 0.9, (0, 2): 0.8, (1, 2): 0.8, (2, 3): 0.5}
    assert join_most_similar(symmetric(entries), torch.tensor([0, 1, 2, 3]), 2, damping=0.3).tolist() == [0, 0, 0, 1]


def test_a_negative_similarity_is_not_damped():
    entries = {(0, 2): 0.9, (0, 1): -0.2, (1, 2): -0.2, (1, 3): -0.1}
    # 0.3 * -0.2 = -0.06 would be above the -0.1 of 1 and 3
    labels = join_most_similar(symmetric(entries), torch.tensor([0, 0, 1, 1]), 2, damping=0.3)
    assert labels.tolist() == [0, 1, 0, 1]


def naive_joins(similarity: torch.Tensor, owners: torch.Tensor, num_clusters: int, damping: float) -> list[int]:
    """The same joins with a dictionary of all pairs."""
    between = {(i, j): float(similarity[i, j]) for i in range(len(owners)) for j in range(i)}
    clusters = {i: {i} for i in range(len(owners))}
    pair = lambda i, j: (max(i, j), min(i, j))
    experts = lambda units: {int(owners[u]) for u in units}
    while len(clusters) > num_clusters:
        gone, kept = max(between, key=lambda key: between[key])
        clusters[kept] |= clusters.pop(gone)
        for other in clusters.keys() - {kept}:
            value = min(between[pair(kept, other)], between.pop(pair(gone, other)))
            shared = experts(clusters[kept]) & experts(clusters[other])
            between[pair(kept, other)] = value * damping if value > 0 and shared else value
        del between[gone, kept]
    return [next(c for c, units in enumerate(clusters.values()) if u in units) for u in range(len(owners))]


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 8), st.sampled_from([0.0, 0.3, 1.0]))
@settings(max_examples=40, deadline=None)
def test_the_joins_are_those_of_a_naive_search(seed, num_members, num_clusters, damping):
    owners = torch.arange(num_members).repeat_interleave(8)
    noise = torch.randn(len(owners), len(owners), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    similarity = noise + noise.T
    expected = naive_joins(similarity, owners, num_clusters, damping)
    assert join_most_similar(similarity, owners, num_clusters, damping=damping).tolist() == expected
