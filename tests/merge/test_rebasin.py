"""Lining up several experts with one another."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msmoe.layer.expert import Expert, switch_expert
from msmoe.merge.align import match_weights
from msmoe.merge.rebasin import match_many, objective


def random_expert(seed: int, num_hidden: int = 10, width: int = 4) -> Expert:
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=generator)
    return switch_expert(randn(num_hidden, width), randn(width, num_hidden))


def order(seed: int, size: int = 10) -> torch.Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def copies(count: int, *, noise: float = 0.0, num_hidden: int = 40) -> list[Expert]:
    """Shuffled copies of one expert, the first in its own order."""
    expert, members = random_expert(0, num_hidden), []
    for i in range(count):
        other = random_expert(100 + i, num_hidden)
        copy = switch_expert(expert.inputs["wi"] + noise * other.inputs["wi"], expert.output + noise * other.output)
        members.append(copy.permuted(order(i, num_hidden)) if i else copy)
    return members


def identity(members: list[Expert]) -> list[torch.Tensor]:
    return [torch.arange(len(members[0].inputs["wi"]))] * len(members)


def test_a_hand_worked_match():
    straight = switch_expert(torch.tensor([[1.0], [5.0]]), torch.tensor([[1.0, 5.0]]))
    members = [straight, straight.permuted(torch.tensor([1, 0])), straight]
    permutations, _ = match_many(members)
    assert [p.tolist() for p in permutations] == [[0, 1], [1, 0], [0, 1]]
    assert objective(members, permutations) == 156.0  # three pairs of 2 * (1 * 1 + 5 * 5)
    assert objective(members, identity(members)) == 92.0  # 52 + two pairs of 2 * (1 * 5 + 5 * 1)


def test_the_objective_is_the_sum_over_pairs():
    members = [random_expert(s) for s in range(4)]
    permutations = [order(s) for s in range(4)]
    moved = [m.permuted(p) for m, p in zip(members, permutations, strict=True)]
    pairs = sum(
        float((a.inputs["wi"] * b.inputs["wi"]).sum() + (a.output * b.output).sum())
        for a, b in itertools.combinations(moved, 2)
    )
    assert objective(members, permutations) == pytest.approx(pairs, rel=1e-4)


@pytest.mark.parametrize("count", [2, 4, 7])
def test_shuffled_copies_of_one_expert_all_line_up(count):
    members = copies(count)
    permutations, _ = match_many(members)
    for member, permutation in zip(members, permutations, strict=True):
        assert torch.equal(member.permuted(permutation).inputs["wi"], members[0].inputs["wi"])
        assert torch.equal(member.permuted(permutation).output, members[0].output)


def test_noisy_shuffled_copies_all_line_up():
    permutations, _ = match_many(copies(5, noise=0.3))
    for i in range(1, 5):
        assert torch.equal(permutations[i], order(i, 40).argsort())


@given(st.integers(0, 10**6), st.integers(3, 5))
@settings(max_examples=15, deadline=None)
def test_the_objective_never_falls(seed, count):
    members = [random_expert(seed + s) for s in range(count)]
    values = [objective(members, match_many(members, max_rounds=rounds)[0]) for rounds in range(6)]
    tolerance = 1e-12 * sum(float(m.inputs["wi"].square().sum() + m.output.square().sum()) for m in members)
    assert values[0] >= objective(members, identity(members)) - tolerance
    assert all(later >= earlier - tolerance for earlier, later in itertools.pairwise(values))


def test_rounds_go_on_after_the_start():
    members = [random_expert(s, 30) for s in range(5)]
    start, rounds = match_many(members, max_rounds=0)
    permutations, more = match_many(members)
    assert rounds == 0
    assert 1 < more < 100
    assert objective(members, permutations) > 1.01 * objective(members, start)


@pytest.mark.parametrize("seed", range(5))
def test_no_other_order_of_a_single_member_is_better(seed):
    members = [random_expert(10 * seed + s, 4, 3) for s in range(4)]
    permutations, _ = match_many(members)
    reached = objective(members, permutations)
    for i in range(4):
        for other in itertools.permutations(range(4)):
            changed = [*permutations[:i], torch.tensor(other), *permutations[i + 1 :]]
            assert objective(members, changed) <= reached + 1e-5


def test_two_members_take_one_assignment():
    members = [random_expert(0), random_expert(1)]
    permutations, rounds = match_many(members)
    assert torch.equal(permutations[0], torch.arange(10))
    assert torch.equal(permutations[1], match_weights(*members).permutation)
    assert rounds == 1


def test_a_single_member_stays():
    permutations, rounds = match_many([random_expert(0)])
    assert [p.tolist() for p in permutations] == [list(range(10))]
    assert rounds == 0


def test_equal_members_stay_and_one_round_finds_that_out():
    permutations, rounds = match_many([random_expert(0)] * 4)
    assert all(torch.equal(p, torch.arange(10)) for p in permutations)
    assert rounds == 1


@pytest.mark.parametrize("seed", range(4))
def test_the_first_member_keeps_its_order_and_the_others_a_permutation(seed):
    permutations, rounds = match_many([random_expert(10 * seed + s, 30) for s in range(5)])
    assert rounds > 1
    assert torch.equal(permutations[0], torch.arange(30))
    assert all(torch.equal(p.sort().values, torch.arange(30)) for p in permutations)


@pytest.mark.parametrize("seed", range(4))
def test_members_that_line_up_already_stay_where_they_are(seed):
    members = [random_expert(10 * seed + s, 20) for s in range(5)]
    aligned = [m.permuted(p) for m, p in zip(members, match_many(members)[0], strict=True)]
    permutations, rounds = match_many(aligned)
    assert all(torch.equal(p, torch.arange(20)) for p in permutations)
    assert rounds == 1


def test_the_order_of_noisy_copies_does_not_matter():
    members = copies(5, noise=0.3)
    forward, _ = match_many(members)
    backward = match_many(members[::-1])[0][::-1]
    for one, other in zip(forward, backward, strict=True):
        assert torch.equal(one, other[backward[0].argsort()])


def test_a_dead_member_does_not_disturb_the_others():
    members = copies(4)
    dead = switch_expert(torch.zeros_like(members[0].inputs["wi"]), torch.zeros_like(members[0].output))
    permutations, _ = match_many([dead, *members])
    aligned = [m.permuted(p) for m, p in zip(members, permutations[1:], strict=True)]
    assert all(torch.equal(expert.inputs["wi"], aligned[0].inputs["wi"]) for expert in aligned)


@pytest.mark.parametrize("scale", [2.0**-30, 2.0**20])
def test_the_scale_of_the_weights_does_not_matter(scale):
    members = [random_expert(s, 30) for s in range(5)]
    permutations, rounds = match_many(members)
    scaled, scaled_rounds = match_many([switch_expert(m.inputs["wi"] * scale, m.output * scale) for m in members])
    assert rounds == scaled_rounds
    assert all(torch.equal(one, other) for one, other in zip(permutations, scaled, strict=True))
