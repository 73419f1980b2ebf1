"""The least-squares output matrix against its normal equations, and with few tokens."""

import pytest
import torch

from msmoe.layer.expert import Expert, switch_expert
from msmoe.merge.least_squares import least_squares_output

F, D = 12, 5
WEIGHTS = [0.2, 0.3, 0.5]


def random_members(count: int = 3, seed: int = 0) -> list[Expert]:
    """Experts that share an ancestor."""
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=generator)
    wi, wo = randn(F, D), randn(D, F)
    return [switch_expert(wi + 0.5 * randn(F, D), wo + 0.5 * randn(D, F)) for _ in range(count)]


def random_inputs(count: int) -> torch.Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(77))


def weighted(members: list[Expert], name: str) -> torch.Tensor:
    return sum(w * member.weights[name].double() for w, member in zip(WEIGHTS, members, strict=True)).float()


def with_inputs(front: torch.Tensor) -> Expert:
    """An expert whose output matrix must not be read."""
    return switch_expert(front, torch.full((D, F), torch.nan))


def target(members: list[Expert], inputs: torch.Tensor) -> torch.Tensor:
    return sum(w * member(inputs) for w, member in zip(WEIGHTS, members, strict=True))


def error(wo: torch.Tensor, members: list[Expert], inputs: torch.Tensor) -> float:
    return float((switch_expert(weighted(members, "wi"), wo)(inputs) - target(members, inputs)).square().sum())


def test_a_hand_worked_solution():
    single = lambda wi, wo: switch_expert(torch.tensor([[wi]]), torch.tensor([[wo]]))
    inputs = torch.tensor([[1.0], [2.0], [-1.0]])
    wo = least_squares_output(single(1.0, 0.0), [single(1.0, 2.0), single(3.0, 1.0)], [0.5, 0.5], inputs)
    # outputs 2x and 3x for positive x, their mean 2.5 x, and h = x
    assert wo.item() == pytest.approx(2.5, abs=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 4, F, F + 1, 300])
@pytest.mark.parametrize("ridge", [1e-6, 0.1, 3.0])
def test_the_solution_is_that_of_the_augmented_least_squares_problem(num_tokens, ridge):
    members, x = random_members(), random_inputs(num_tokens)
    counts = torch.rand(num_tokens, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 3 + 0.5
    front = weighted(members, "wi")
    wo = least_squares_output(with_inputs(front), members, WEIGHTS, x, counts, ridge=ridge)

    root = counts.sqrt()[:, None]
    hidden = torch.relu(x.double() @ front.double().T) * root
    wanted = root * sum(
        w * torch.relu(x.double() @ m.inputs["wi"].double().T) @ m.output.double().T
        for w, m in zip(WEIGHTS, members, strict=True)
    )
    pull = (ridge * hidden.square().sum(0).mean()).sqrt()
    start = sum(w * m.output.double() for w, m in zip(WEIGHTS, members, strict=True))
    rows = torch.cat([hidden, pull * torch.eye(F, dtype=torch.float64)])
    solution = torch.linalg.lstsq(rows, torch.cat([wanted, pull * start.T])).solution.T
    torch.testing.assert_close(wo.double(), solution, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [3, 100])
@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 10.0])
def test_the_fit_is_never_worse_than_the_average(num_tokens, ridge):
    members, x = random_members(), random_inputs(num_tokens)
    wo = least_squares_output(with_inputs(weighted(members, "wi")), members, WEIGHTS, x, ridge=ridge)
    assert error(wo, members, x) <= error(weighted(members, "output"), members, x)


def test_few_tokens_leave_the_directions_that_they_do_not_reach():
    members, x = random_members(), random_inputs(3)
    front = weighted(members, "wi")
    change = least_squares_output(with_inputs(front), members, WEIGHTS, x) - weighted(members, "output")
    _, _, directions = torch.linalg.svd(torch.relu(x @ front.T))
    assert (change @ directions[:3].T).norm() > 0.1
    torch.testing.assert_close(change @ directions[3:].T, torch.zeros(D, F - 3), rtol=0, atol=1e-5)


def test_few_tokens_are_fitted():
    members, x = random_members(), random_inputs(3)
    wo = least_squares_output(with_inputs(weighted(members, "wi")), members, WEIGHTS, x)
    assert error(wo, members, x) < 1e-6 * float(target(members, x).square().sum())


@pytest.mark.parametrize("num_tokens", [5, 200])
def test_equal_members_give_their_matrix(num_tokens):
    expert = random_members(1)[0]
    wo = least_squares_output(expert, [expert] * 3, WEIGHTS, random_inputs(num_tokens))
    torch.testing.assert_close(wo, expert.output, rtol=1e-6, atol=1e-8)


def test_one_member_behind_its_own_front_is_returned_bit_for_bit():
    expert = random_members(1)[0]
    assert torch.equal(least_squares_output(expert, [expert], [1.0], random_inputs(50)), expert.output)


def test_a_huge_ridge_gives_the_average():
    members = random_members()
    wo = least_squares_output(with_inputs(weighted(members, "wi")), members, WEIGHTS, random_inputs(100), ridge=1e9)
    torch.testing.assert_close(wo, weighted(members, "output"))


@pytest.mark.parametrize(("count", "token_weights"), [(0, None), (0, torch.ones(0)), (4, torch.zeros(4))])
def test_without_tokens_the_output_matrices_are_averaged(count, token_weights):
    members = random_members()
    wo = least_squares_output(
        with_inputs(weighted(members, "wi")), members, WEIGHTS, random_inputs(count), token_weights
    )
    assert torch.equal(wo, weighted(members, "output"))


def test_a_dead_neuron_keeps_its_averaged_column():
    members = random_members()
    front = weighted(members, "wi")
    front[3] = 0.0
    wo = least_squares_output(with_inputs(front), members, WEIGHTS, random_inputs(100))
    torch.testing.assert_close(wo[:, 3], weighted(members, "output")[:, 3])
    assert wo.isfinite().all()


def test_a_token_of_weight_three_counts_as_three_tokens():
    members, x, counts = random_members(), random_inputs(20), torch.arange(20) % 4
    front = weighted(members, "wi")
    expected = least_squares_output(with_inputs(front), members, WEIGHTS, x.repeat_interleave(counts, dim=0))
    torch.testing.assert_close(least_squares_output(with_inputs(front), members, WEIGHTS, x, counts.float()), expected)


def test_the_order_of_the_members_does_not_matter():
    members, x = random_members(), random_inputs(100)
    front = weighted(members, "wi")
    other = least_squares_output(with_inputs(front), members[::-1], WEIGHTS[::-1], x)
    torch.testing.assert_close(least_squares_output(with_inputs(front), members, WEIGHTS, x), other)


@pytest.mark.parametrize("ridge", [0.0, -1.0, float("nan")])
def test_a_ridge_that_is_not_positive_is_refused(ridge):
    with pytest.raises(ValueError, match=f"ridge must be positive, got {ridge}"):
        least_squares_output(
            switch_expert(torch.zeros(F, D), torch.zeros(D, F)),
            random_members(),
            WEIGHTS,
            random_inputs(3),
            ridge=ridge,
        )
