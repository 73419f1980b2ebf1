"""Neuron alignment: planted permutations, brute force for few neurons, functions preserved."""

from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msmoe.layer.expert import Expert, switch_expert
from msmoe.merge.align import canonical_scale, match, match_activations, match_cost, match_weights

F, D = 12, 7


def random_expert(seed: int = 0, *, f: int = F, dtype: torch.dtype = torch.float32) -> Expert:
    generator = torch.Generator().manual_seed(seed)
    return switch_expert(
        torch.randn(f, D, generator=generator, dtype=dtype), torch.randn(D, f, generator=generator, dtype=dtype)
    )


def random_inputs(count: int = 200, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(99), dtype=dtype)


def random_order(seed: int, f: int = F) -> torch.Tensor:
    return torch.randperm(f, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 10**6))
def test_a_planted_permutation_is_undone(seed):
    reference = random_expert(seed)
    target = reference.permuted(random_order(seed + 1))
    restored = target.permuted(match_weights(reference, target).permutation)
    assert torch.equal(restored.inputs["wi"], reference.inputs["wi"])
    assert torch.equal(restored.output, reference.output)


def test_a_planted_permutation_is_found_under_noise():
    reference, noise, order = random_expert(0), random_expert(1), random_order(2)
    target = switch_expert(
        reference.inputs["wi"] + 0.3 * noise.inputs["wi"], reference.output + 0.3 * noise.output
    ).permuted(order)
    assert torch.equal(order[match_weights(reference, target).permutation], torch.arange(F))


def test_activation_matching_undoes_a_planted_permutation():
    reference, order = random_expert(0), random_order(3)
    found = match_activations(reference, reference.permuted(order), random_inputs()).permutation
    assert torch.equal(order[found], torch.arange(F))


def test_activation_matching_sees_through_scaled_neurons():
    reference, order = random_expert(0), random_order(3)
    scale = torch.linspace(0.1, 10, F)
    target = switch_expert(reference.inputs["wi"] * scale[:, None], reference.output / scale).permuted(order)
    assert torch.equal(order[match_activations(reference, target, random_inputs()).permutation], torch.arange(F))


def test_neurons_that_never_fire_are_matched_by_their_weights():
    reference, order = random_expert(0), random_order(4)
    inputs = random_inputs().abs()
    reference.inputs["wi"][[2, 5, 8]] = -reference.inputs["wi"][[2, 5, 8]].abs()  # negative for all these inputs
    found = match_activations(reference, reference.permuted(order), inputs).permutation
    assert torch.equal(order[found], torch.arange(F))


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_tokens_move_nothing(count):
    found = match_activations(random_expert(0), random_expert(1), random_inputs(count))
    assert torch.equal(found.permutation, torch.arange(F))


@given(st.integers(0, 10**6))
def test_the_match_is_the_best_of_all_permutations(seed):
    reference, target = random_expert(seed, f=5), random_expert(seed + 1, f=5)
    cost = (reference.inputs["wi"] @ target.inputs["wi"].T + reference.output.T @ target.output).double()
    best = max(sum(float(cost[j, p[j]]) for j in range(5)) for p in permutations(range(5)))
    assert match_weights(reference, target).after == pytest.approx(best, rel=1e-5)


@given(st.lists(st.lists(st.integers(-2, 2), min_size=4, max_size=4), min_size=4, max_size=4))
def test_the_assignment_is_optimal_with_ties(rows):
    cost = torch.tensor(rows, dtype=torch.float64)
    found = match_cost(cost)
    best = max(sum(rows[j][p[j]] for j in range(4)) for p in permutations(range(4)))
    assert sorted(found.permutation.tolist()) == [0, 1, 2, 3]
    assert found.after == best == sum(rows[j][p] for j, p in enumerate(found.permutation.tolist()))


@given(st.integers(0, 10**6))
def test_the_objective_never_falls(seed):
    found = match_weights(random_expert(seed), random_expert(seed + 7))
    assert found.after >= found.before


def test_equal_experts_stay_in_place():
    found = match_weights(random_expert(0), random_expert(0))
    assert found.share_moved == 0


def test_neurons_that_tie_are_not_moved():
    expert = switch_expert(torch.ones(F, D), torch.ones(D, F))
    assert torch.equal(match_weights(expert, expert).permutation, torch.arange(F))


def test_share_moved_counts_displaced_neurons():
    cost = torch.zeros(4, 4)
    cost[[0, 1, 2, 3], [1, 0, 2, 3]] = 1  # neurons 0 and 1 swap: two of four
    assert match_cost(cost).share_moved == 0.5


@given(st.integers(0, 10**6))
def test_permuting_neurons_preserves_the_function(seed):
    expert, x = random_expert(seed, dtype=torch.float64), random_inputs(dtype=torch.float64)
    torch.testing.assert_close(expert.permuted(random_order(seed))(x), expert(x), rtol=1e-12, atol=1e-12)


@given(st.integers(0, 10**6))
def test_the_canonical_scale_preserves_the_function(seed):
    expert, x = random_expert(seed, dtype=torch.float64), random_inputs(dtype=torch.float64)
    torch.testing.assert_close(canonical_scale(expert)(x), expert(x), rtol=1e-12, atol=1e-12)


def test_the_canonical_scale_equalises_the_norms_of_every_neuron():
    scaled = canonical_scale(random_expert(0, dtype=torch.float64))
    torch.testing.assert_close(scaled.inputs["wi"].norm(dim=1), scaled.output.norm(dim=0))


def test_the_canonical_scale_of_a_hand_worked_neuron():
    scaled = canonical_scale(switch_expert(torch.tensor([[1.0, 0.0]]), torch.tensor([[4.0], [0.0]])))
    # c = sqrt(4 / 1) = 2: wi doubles, wo halves, both have norm 2
    assert scaled.inputs["wi"].tolist() == [[2.0, 0.0]]
    assert scaled.output.tolist() == [[2.0], [0.0]]


def test_a_neuron_with_a_zero_side_is_left_alone():
    expert = random_expert(0)
    expert.inputs["wi"][3] = 0
    expert.output[:, 5] = 0
    scaled = canonical_scale(expert)
    assert torch.equal(scaled.output[:, 3], expert.output[:, 3])
    assert torch.equal(scaled.inputs["wi"][5], expert.inputs["wi"][5])
    assert scaled.inputs["wi"].isfinite().all()


def test_extreme_scales_stay_finite():
    expert = random_expert(0)
    expert.inputs["wi"][0] *= 1e-30
    expert.output[:, 0] *= 1e30
    scaled = canonical_scale(expert)
    assert scaled.inputs["wi"].isfinite().all()
    assert scaled.output.isfinite().all()


def test_canonical_forms_of_a_rescaled_expert_are_equal():
    expert, scale = random_expert(0), torch.logspace(-2, 2, F)
    a, b = (
        canonical_scale(expert),
        canonical_scale(switch_expert(expert.inputs["wi"] * scale[:, None], expert.output / scale)),
    )
    torch.testing.assert_close(a.inputs["wi"], b.inputs["wi"])
    torch.testing.assert_close(a.output, b.output)


def test_experts_of_different_shape_are_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"\(12, 7\).* and .*\(5, 7\)"):
        match_weights(random_expert(0), random_expert(1, f=5))


def test_no_alignment_is_the_identity():
    found = match(random_expert(0), random_expert(1), alignment="none")
    assert torch.equal(found.permutation, torch.arange(F))
