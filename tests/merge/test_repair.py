"""REPAIR: the standard deviation of hidden pre-activations after a merge."""

import itertools

import pytest
import torch

from msmoe.layer.expert import Expert, switch_expert
from msmoe.merge.repair import repair

F, D = 9, 6


def random_expert(seed: int) -> Expert:
    generator = torch.Generator().manual_seed(seed)
    return switch_expert(torch.randn(F, D, generator=generator), torch.randn(D, F, generator=generator))


def random_inputs(count: int = 600) -> torch.Tensor:
    """Correlated inputs away from zero."""
    generator = torch.Generator().manual_seed(77)
    return torch.randn(count, D, generator=generator) @ torch.randn(D, D, generator=generator) + 0.5


def problem(num_members: int = 3) -> tuple[Expert, list[Expert], list[float]]:
    members = [random_expert(seed) for seed in range(num_members)]
    merged = switch_expert(
        sum(m.inputs["wi"] for m in members) / num_members, sum(m.output for m in members) / num_members
    )
    return merged, members, [0.2, 0.3, 0.5][:num_members]


def spread(expert: Expert, inputs: torch.Tensor) -> torch.Tensor:
    """Standard deviation of the pre-activations, from the pre-activations themselves."""
    return (inputs.double() @ expert.inputs["wi"].double().T).std(0, correction=0)


def test_a_hand_worked_scale():
    single = lambda wi: switch_expert(torch.tensor([[wi]]), torch.tensor([[7.0]]))
    inputs = torch.tensor([[-1.0], [1.0]])  # standard deviation 1
    repaired, report = repair(single(1.0), [single(2.0), single(-6.0)], [0.75, 0.25], inputs)
    assert repaired.inputs["wi"].tolist() == [[3.0]]  # goal 0.75 * 2 + 0.25 * 6 = 3, measured 1
    assert repaired.output.tolist() == [[7.0]]
    assert report.mean_ratio == 3.0


def test_the_average_of_two_uncorrelated_units_gains_the_square_root_of_two():
    inputs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=2)))  # covariance: the identity
    members = [switch_expert(torch.tensor([row]), torch.ones(2, 1)) for row in ([1.0, 0.0], [0.0, 1.0])]
    merged = switch_expert(torch.tensor([[0.5, 0.5]]), torch.ones(2, 1))  # variance 0.25 + 0.25, not 1
    repaired, report = repair(merged, members, [0.5, 0.5], inputs)
    assert report.mean_ratio == pytest.approx(2**0.5)
    torch.testing.assert_close(repaired.inputs["wi"], torch.tensor([[0.5**0.5, 0.5**0.5]]))


def test_the_measured_deviation_becomes_the_weighted_mean_of_the_members():
    merged, members, weights = problem()
    inputs = random_inputs()
    repaired, _ = repair(merged, members, weights, inputs)
    goal = sum(w * spread(member, inputs) for w, member in zip(weights, members, strict=True))
    torch.testing.assert_close(spread(repaired, inputs), goal, rtol=1e-6, atol=0)


def test_a_large_mean_does_not_spoil_the_deviation():
    merged, members, weights = problem()
    inputs = random_inputs() + 1000
    repaired, _ = repair(merged, members, weights, inputs)
    goal = sum(w * spread(member, inputs) for w, member in zip(weights, members, strict=True))
    torch.testing.assert_close(spread(repaired, inputs), goal, rtol=1e-5, atol=0)


def test_the_reported_ratio_is_the_mean_over_units():
    merged, members, weights = problem()
    inputs = random_inputs()
    goal = sum(w * spread(member, inputs) for w, member in zip(weights, members, strict=True))
    _, report = repair(merged, members, weights, inputs)
    assert report.mean_ratio == pytest.approx(float((goal / spread(merged, inputs)).mean()))


def test_a_second_repair_changes_nothing():
    merged, members, weights = problem()
    once, _ = repair(merged, members, weights, random_inputs())
    twice, report = repair(once, members, weights, random_inputs())
    torch.testing.assert_close(twice.inputs["wi"], once.inputs["wi"], rtol=1e-6, atol=0)
    assert report.mean_ratio == pytest.approx(1.0)


def test_equal_members_are_returned_bit_for_bit():
    expert = random_expert(0)
    repaired, report = repair(expert, [expert] * 3, [0.2, 0.3, 0.5], random_inputs())
    assert torch.equal(repaired.inputs["wi"], expert.inputs["wi"])
    assert report.mean_ratio == pytest.approx(1.0)


def test_units_without_spread_are_left_alone():
    merged, members, weights = problem()
    merged.inputs["wi"][2] = 0.0  # dead in the merged expert
    for member in members:
        member.inputs["wi"][5] = 0.0  # dead in every member
    repaired, report = repair(merged, members, weights, random_inputs())
    assert torch.equal(repaired.inputs["wi"][[2, 5]], merged.inputs["wi"][[2, 5]])
    assert repaired.inputs["wi"].isfinite().all()
    assert report.num_constant == 2


def test_a_unit_that_sees_a_constant_input_only_is_left_alone():
    merged, members, weights = problem()
    inputs = random_inputs()
    inputs[:, 0] = 0.1
    merged.inputs["wi"][4] = torch.tensor([0.3] + [0.0] * (D - 1))
    repaired, report = repair(merged, members, weights, inputs)
    assert torch.equal(repaired.inputs["wi"][4], merged.inputs["wi"][4])
    assert report.num_constant == 1


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_tokens_leave_the_expert_bit_for_bit(count):
    merged, members, weights = problem()
    repaired, report = repair(merged, members, weights, random_inputs(count))
    assert torch.equal(repaired.inputs["wi"], merged.inputs["wi"])
    assert (report.mean_ratio, report.num_constant) == (1.0, F)


def test_a_token_of_weight_three_counts_as_three_tokens():
    merged, members, weights = problem()
    inputs, counts = random_inputs(5), torch.tensor([3, 1, 0, 2, 1])
    weighted, _ = repair(merged, members, weights, inputs, counts.double())
    repeated, _ = repair(merged, members, weights, inputs.repeat_interleave(counts, dim=0))
    torch.testing.assert_close(weighted.inputs["wi"], repeated.inputs["wi"])


def test_the_order_of_the_members_does_not_matter():
    merged, members, weights = problem()
    one, _ = repair(merged, members, weights, random_inputs())
    other, _ = repair(merged, members[::-1], weights[::-1], random_inputs())
    torch.testing.assert_close(one.inputs["wi"], other.inputs["wi"])


def test_permuting_the_neurons_permutes_the_result():
    merged, members, weights = problem()
    order = torch.randperm(F, generator=torch.Generator().manual_seed(4))
    permuted = repair(merged.permuted(order), [m.permuted(order) for m in members], weights, random_inputs())[0]
    torch.testing.assert_close(
        permuted.inputs["wi"], repair(merged, members, weights, random_inputs())[0].inputs["wi"][order]
    )
