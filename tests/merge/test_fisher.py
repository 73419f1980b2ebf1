"""Fisher information from per-token gradients, and the average that it weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msmoe.layer.expert import Expert, switch_expert
from msmoe.merge.fisher import expert_fisher, fisher_average

F, D = 7, 5


def random_expert(seed: int, *, dtype=torch.float32) -> Expert:
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)
    return switch_expert(randn(F, D), randn(D, F))


def random_fisher(seed: int) -> Expert:
    generator = torch.Generator().manual_seed(1000 + seed)
    rand = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64) + 0.1
    return switch_expert(rand(F, D), rand(D, F))


def zero_fisher() -> Expert:
    return switch_expert(torch.zeros(F, D), torch.zeros(D, F))


def tokens(count: int, seed: int = 5) -> tuple[torch.Tensor, ...]:
    """Inputs, gates, output gradients and weights."""
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=generator)
    gate, weights = torch.rand(count, generator=generator), torch.rand(count, generator=generator) * 3
    return randn(count, D), gate, randn(count, D), weights


def assert_close(left: Expert, right: Expert, **tolerance):
    for a, b in zip(left.tensors, right.tensors, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_a_hand_worked_fisher():
    expert = switch_expert(torch.tensor([[1.0], [-1.0]]), torch.tensor([[2.0, 3.0]]))
    x, gate, delta, weights = (torch.tensor(v) for v in ([[2.0]], [0.5], [[4.0]], [3.0]))
    fisher = expert_fisher(expert, x, gate, delta, weights)
    # h = relu(2, -2) = (2, 0); g delta = 2; dh = 2 * (2, 3) * (1, 0) = (4, 0)
    assert fisher.output.tolist() == [[48.0, 0.0]]  # 3 * 2^2 * (2^2, 0)
    assert fisher.inputs["wi"].tolist() == [[192.0], [0.0]]  # 3 * (4^2, 0) * 2^2


def test_the_fisher_is_the_sum_of_squared_gradients_of_single_tokens():
    exact = random_expert(0).map(lambda weight: weight.double().requires_grad_())
    x, gate, _, weights = (tensor.double() for tensor in tokens(530))  # more than one block
    head = torch.randn(D, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    label = torch.randint(4, (len(x),), generator=torch.Generator().manual_seed(2))
    expected, deltas = [torch.zeros(F, D, dtype=torch.float64), torch.zeros(D, F, dtype=torch.float64)], []
    for t in range(len(x)):
        output = gate[t] * exact(x[t])
        log_likelihood = (output @ head).log_softmax(0)[label[t]]
        *gradients, delta = torch.autograd.grad(log_likelihood, [*exact.tensors, output])
        deltas.append(delta)
        for total, gradient in zip(expected, gradients, strict=True):
            total += weights[t] * gradient.square()
    detached = exact.map(torch.Tensor.detach)
    fisher = expert_fisher(detached, x, gate, torch.stack(deltas), weights)
    assert_close(fisher, switch_expert(*expected), rtol=1e-10, atol=1e-15)


def test_opposite_gradients_do_not_cancel():
    expert = switch_expert(torch.tensor([[1.0]]), torch.tensor([[1.0]]))
    x, ones = torch.ones(2, 1), torch.ones(2)
    fisher = expert_fisher(expert, x, ones, torch.tensor([[1.0], [-1.0]]), ones)
    assert fisher.output.item() == 2.0  # 1^2 + (-1)^2
    assert fisher.inputs["wi"].item() == 2.0


def test_a_token_of_weight_three_counts_as_three_tokens():
    expert, (x, gate, delta, _) = random_expert(0), tokens(4)
    counts = torch.tensor([3, 1, 0, 2])
    repeated = (tensor.repeat_interleave(counts, dim=0) for tensor in (x, gate, delta, torch.ones(4)))
    weighted = expert_fisher(expert, x, gate, delta, counts.float())
    assert_close(weighted, expert_fisher(expert, *repeated), rtol=1e-5, atol=0)


@pytest.mark.parametrize("first", [1, 511, 512, 513])
def test_the_fishers_of_two_batches_add_up(first):
    expert, batch = random_expert(0), tokens(1030)
    parts = [expert_fisher(expert, *(tensor[half] for tensor in batch)) for half in (slice(first), slice(first, None))]
    added = switch_expert(parts[0].inputs["wi"] + parts[1].inputs["wi"], parts[0].output + parts[1].output)
    assert_close(expert_fisher(expert, *batch), added, rtol=1e-5, atol=0)


def test_an_expert_without_tokens_has_no_fisher():
    fisher = expert_fisher(random_expert(0), *tokens(0))
    assert_close(fisher, zero_fisher(), check_dtype=False)


def test_permuting_the_neurons_permutes_the_fisher():
    expert, batch, order = random_expert(0), tokens(50), torch.randperm(F, generator=torch.Generator().manual_seed(3))
    expected = expert_fisher(expert, *batch).permuted(order)
    assert_close(expert_fisher(expert.permuted(order), *batch), expected, rtol=1e-5, atol=0)


def pair(wi: tuple[float, float], wo: tuple[float, float]) -> list[Expert]:
    """Two experts, or Fishers, of a single neuron and a single input."""
    return [switch_expert(torch.tensor([[wi[e]]]), torch.tensor([[wo[e]]])) for e in (0, 1)]


def test_a_hand_worked_average():
    members, fishers = pair(wi=(1.0, 5.0), wo=(2.0, 10.0)), pair(wi=(3.0, 1.0), wo=(0.0, 0.0))
    merged, share = fisher_average(members, fishers, [0.25, 0.75], floor=0.5)
    # wi: the floor is 0.5 * (3 + 1) = 2 and the weighted average 4
    assert merged.inputs["wi"].item() == pytest.approx((3 * 1 + 1 * 5 + 2 * 4) / (3 + 1 + 2))
    assert merged.output.item() == 8.0  # no Fisher at all: 0.25 * 2 + 0.75 * 10
    assert share == 0.5


def test_the_share_at_the_floor_counts_entries_of_both_matrices():
    members = [switch_expert(torch.ones(2, 1), torch.ones(1, 2))] * 2
    fisher = switch_expert(torch.tensor([[4.0], [0.0]]), torch.tensor([[1.0, 1.5e-6]]))
    # wi: floor 1e-6 * mean(8, 0) = 4e-6, one entry below; wo: 1e-6 * mean(2, 3e-6) = 1e-6 < 3e-6, none
    assert fisher_average(members, [fisher, fisher], [0.5, 0.5])[1] == 0.25


def test_equal_fishers_give_the_plain_average_whatever_the_weights():
    members = [random_expert(0), random_expert(1)]
    merged, _ = fisher_average(members, [random_fisher(0)] * 2, [0.9, 0.1])
    mean = switch_expert(
        (members[0].inputs["wi"] + members[1].inputs["wi"]) / 2, (members[0].output + members[1].output) / 2
    )
    assert_close(merged, mean, rtol=0, atol=1e-4)  # the floor of 1e-6 is 1e-5 of the smallest Fisher


def test_without_any_fisher_the_members_are_averaged_by_weight():
    members = [random_expert(0), random_expert(1)]
    merged, share = fisher_average(members, [zero_fisher()] * 2, [0.75, 0.25])
    assert share == 1.0
    torch.testing.assert_close(merged.inputs["wi"], 0.75 * members[0].inputs["wi"] + 0.25 * members[1].inputs["wi"])
    torch.testing.assert_close(merged.output, 0.75 * members[0].output + 0.25 * members[1].output)


def test_a_dead_member_drops_out():
    members = [random_expert(0), random_expert(1)]
    merged, _ = fisher_average(members, [random_fisher(0), zero_fisher()], [0.5, 0.5])
    assert_close(merged, members[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e12])
def test_scaling_all_fishers_changes_nothing(scale):
    members, fishers = [random_expert(e) for e in range(3)], [random_fisher(e) for e in range(3)]
    scaled = [switch_expert(f.inputs["wi"] * scale, f.output * scale) for f in fishers]
    weights = [0.2, 0.3, 0.5]
    assert_close(fisher_average(members, scaled, weights)[0], fisher_average(members, fishers, weights)[0])


def test_one_member_is_returned_bit_for_bit():
    expert = random_expert(0)
    merged, _ = fisher_average([expert], [random_fisher(0)], [1.0])
    assert_close(merged, expert, rtol=0, atol=0)


def test_equal_members_give_that_member_bit_for_bit():
    expert = random_expert(0)
    merged, _ = fisher_average([expert] * 3, [random_fisher(0), random_fisher(1), zero_fisher()], [0.2, 0.3, 0.5])
    assert_close(merged, expert, rtol=0, atol=0)


@given(st.permutations(range(4)))
@settings(max_examples=10)
def test_the_order_of_the_members_does_not_matter(order):
    members, fishers = [random_expert(e) for e in range(4)], [random_fisher(e) for e in range(4)]
    weights = [0.1, 0.2, 0.3, 0.4]
    shuffled = fisher_average(*([items[e] for e in order] for items in (members, fishers, weights)))[0]
    assert_close(shuffled, fisher_average(members, fishers, weights)[0])


def test_entries_lie_between_those_of_the_members():
    members, fishers = [random_expert(e) for e in range(3)], [random_fisher(e) for e in range(3)]
    merged = fisher_average(members, fishers, [0.2, 0.5, 0.3])[0].inputs["wi"]
    stacked = torch.stack([member.inputs["wi"] for member in members])
    assert ((merged >= stacked.amin(0) - 1e-6) & (merged <= stacked.amax(0) + 1e-6)).all()
