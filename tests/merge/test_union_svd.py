"""The merge in the shared left singular space of the members."""

import pytest
import torch

from msmoe.layer.expert import Expert, switch_expert
from msmoe.merge.union_svd import num_leading, union_svd


def random_expert(seed: int, num_hidden: int = 12, width: int = 5) -> Expert:
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=generator)
    return switch_expert(randn(num_hidden, width), randn(width, num_hidden))


def average(members: list[Expert], weights: list[float]) -> Expert:
    mean = lambda name: sum(w * m.weights[name].double() for w, m in zip(weights, members, strict=True)).float()
    return switch_expert(mean("wi"), mean("output"))


def test_a_hand_worked_truncation():
    first, second = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    members = [switch_expert(first, first), switch_expert(second, first)]
    # wi: the joined matrix has the Gram matrix diag(4 + 4, 0 + 1): the first direction holds 8/9 = 0.889
    merged, ranks = union_svd(members, [0.5, 0.5], energy=0.85)
    torch.testing.assert_close(
        merged.inputs["wi"], torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    )  # of the average diag(2, 0.5)
    assert ranks == {"wi": 1, "output": 1}
    merged, ranks = union_svd(members, [0.5, 0.5], energy=0.9)
    torch.testing.assert_close(merged.inputs["wi"], torch.tensor([[2.0, 0.0], [0.0, 0.5]]))
    assert ranks == {"wi": 2, "output": 1}  # wo: diag(8, 0) has rank 1


@pytest.mark.parametrize(("num_hidden", "width"), [(4, 4), (12, 5), (5, 12), (20, 3)])
@pytest.mark.parametrize("energy", [0.3, 0.7, 0.95])
def test_the_projection_is_the_formula_of_the_paper(num_hidden, width, energy):
    members, weights = [random_expert(s, num_hidden, width) for s in range(3)], [0.2, 0.3, 0.5]
    merged, ranks = union_svd(members, weights, energy=energy)
    for name in ("wi", "output"):
        joined = torch.cat([member.weights[name].double() for member in members], dim=1)
        u, s, vh = torch.linalg.svd(joined, full_matrices=False)
        parts = vh.split(members[0].weights[name].shape[1], dim=1)
        rank = next(r for r in range(len(s) + 1) if s[:r].square().sum() >= energy * s.square().sum())
        mixed = sum(w * part for w, part in zip(weights, parts, strict=True))
        expected = u[:, :rank] @ torch.diag(s[:rank]) @ mixed[:rank]
        assert ranks[name] == rank
        torch.testing.assert_close(merged.weights[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_with_all_the_energy_it_is_the_weighted_average():
    members, weights = [random_expert(s) for s in range(3)], [0.2, 0.3, 0.5]
    merged, ranks = union_svd(members, weights, energy=1.0)
    torch.testing.assert_close(merged.inputs["wi"], average(members, weights).inputs["wi"])
    torch.testing.assert_close(merged.output, average(members, weights).output)
    assert ranks == {"wi": 12, "output": 5}  # the joined matrices are 12 x 15 and 5 x 36


def test_more_energy_never_takes_the_result_further_from_the_average():
    members, weights = [random_expert(s) for s in range(3)], [0.2, 0.3, 0.5]
    mean = average(members, weights)
    results = [union_svd(members, weights, energy=energy) for energy in (0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0)]
    for name in ("wi", "output"):
        errors = [float((merged.weights[name] - mean.weights[name]).norm()) for merged, _ in results]
        ranks = [ranks[name] for _, ranks in results]
        assert errors == sorted(errors, reverse=True)
        assert ranks == sorted(ranks)


def test_members_of_one_small_space_lose_nothing():
    generator = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=generator)
    space_in, space_out = randn(12, 2), randn(5, 2)
    members = [switch_expert(space_in @ randn(2, 5), space_out @ randn(2, 12)) for _ in range(3)]
    merged, ranks = union_svd(members, [0.2, 0.3, 0.5], energy=1 - 1e-9)
    assert ranks == {"wi": 2, "output": 2}
    torch.testing.assert_close(
        merged.inputs["wi"], average(members, [0.2, 0.3, 0.5]).inputs["wi"], rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(merged.output, average(members, [0.2, 0.3, 0.5]).output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", range(2, 24))
def test_exactly_the_asked_energy_needs_no_further_direction(count):
    squares = torch.full((count,), 0.1, dtype=torch.float64)  # 0.1 + ... + 0.1 is rarely a multiple of 0.1
    assert [num_leading(squares, rank / count) for rank in range(1, count)] == list(range(1, count))
    assert num_leading(squares, 1.001 / count) == 2


def test_one_member_is_returned_bit_for_bit():
    expert = random_expert(0)
    merged, ranks = union_svd([expert], [1.0], energy=0.5)
    assert torch.equal(merged.inputs["wi"], expert.inputs["wi"])
    assert torch.equal(merged.output, expert.output)
    assert ranks == {"wi": 5, "output": 5}


def test_equal_members_give_that_member_when_all_the_energy_is_kept():
    expert = random_expert(0)
    merged, _ = union_svd([expert] * 3, [0.2, 0.3, 0.5], energy=1.0)
    assert torch.equal(merged.inputs["wi"], expert.inputs["wi"])
    assert torch.equal(merged.output, expert.output)


def test_equal_members_give_that_member_by_default():
    expert = random_expert(0)
    merged, ranks = union_svd([expert] * 3, [0.2, 0.3, 0.5])
    torch.testing.assert_close(merged.inputs["wi"], expert.inputs["wi"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged.output, expert.output, rtol=1e-4, atol=1e-5)
    assert ranks == {"wi": 5, "output": 5}


def test_by_default_as_many_directions_are_kept_as_one_matrix_has():
    members = [random_expert(s) for s in range(3)]  # wi is 12 x 5, the joined matrix 12 x 15
    merged, ranks = union_svd(members, [0.2, 0.3, 0.5])
    assert ranks == {"wi": 5, "output": 5}
    assert torch.linalg.matrix_rank(merged.inputs["wi"], rtol=1e-5) == 5
    assert not torch.allclose(merged.inputs["wi"], average(members, [0.2, 0.3, 0.5]).inputs["wi"], atol=1e-3)


def test_the_order_of_the_members_does_not_matter():
    members, weights = [random_expert(s) for s in range(4)], [0.1, 0.2, 0.3, 0.4]
    one, other = union_svd(members, weights)[0], union_svd(members[::-1], weights[::-1])[0]
    torch.testing.assert_close(one.inputs["wi"], other.inputs["wi"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one.output, other.output, rtol=1e-5, atol=1e-6)


def test_zero_matrices_stay_zero():
    zero = switch_expert(torch.zeros(12, 5), random_expert(0).output)
    merged, ranks = union_svd([zero, zero], [0.5, 0.5])
    assert torch.equal(merged.inputs["wi"], zero.inputs["wi"])
    assert ranks["wi"] == 0


@pytest.mark.parametrize("energy", [0.0, -0.5, 1.01, float("nan")])
def test_an_impossible_energy_is_refused(energy):
    with pytest.raises(ValueError, match=rf"energy must be in \(0, 1\], got {energy}"):
        union_svd([random_expert(0)], [1.0], energy=energy)
