"""Decompositions against torch's SVD and brute-force optima with explicit roots and inverses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from msmoe.lowrank.decompose import RIDGE, Decomposition, decompose
from msmoe.lowrank.factors import truncate
from msmoe.lowrank.shapes import FactorShape

SHAPES = [(6, 11), (9, 9), (11, 6)]  # fewer, as many and more outputs than inputs: two branches of the code


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def low_rank(weights: Tensor, decomposition: Decomposition, rank: int) -> Tensor:
    """The matrices that the first `rank` vectors give, without kept rows."""
    return truncate(weights, decomposition, FactorShape(rank, 0)).dense()


def symmetric_root(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    return vectors @ values.sqrt().diag() @ vectors.T


def gram_of(x: Tensor, ridge: float = RIDGE) -> Tensor:
    """X^T X with the ridge on its diagonal, one token at a time."""
    gram = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for token in x.double():
        gram += torch.outer(token, token)
    return gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def best_by_hand(weight: Tensor, gram: Tensor, scale: Tensor, rank: int) -> Tensor:
    """D^-1 (the first components of D W G^1/2) G^-1/2, the roots and inverses spelled out."""
    root = symmetric_root(gram)
    u, s, vt = torch.linalg.svd(scale.double().diag() @ weight.double() @ root, full_matrices=False)
    kept = u[:, :rank] @ s[:rank].diag() @ vt[:rank]
    return (torch.linalg.inv(scale.double().diag()) @ kept @ torch.linalg.inv(root)).float()


@pytest.mark.parametrize(("num_outputs", "num_inputs"), SHAPES)
def test_without_tokens_the_vectors_and_energies_are_those_of_the_svd(num_outputs, num_inputs):
    weights = normal(3, num_outputs, num_inputs)
    result = decompose(weights)
    for weight, left, energy in zip(weights, result.left, result.energy, strict=True):
        u, s, _ = torch.linalg.svd(weight.double(), full_matrices=False)
        torch.testing.assert_close(energy, s.square())
        torch.testing.assert_close((left.double() * u).sum(0).abs(), torch.ones_like(s))  # up to their signs


@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), SHAPES)
def test_without_tokens_the_error_of_a_rank_is_the_smallest_possible(num_outputs, num_inputs, rank):
    weights = normal(2, num_outputs, num_inputs)
    errors = (weights - low_rank(weights, decompose(weights), rank)).double().square().sum((1, 2))
    tail = torch.linalg.svdvals(weights.double())[:, rank:].square().sum(1)  # Eckart and Young
    torch.testing.assert_close(errors, tail, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 4, 6])
@pytest.mark.parametrize("num_tokens", [3, 40])  # the Gram matrix alone is singular, or not
@pytest.mark.parametrize(("num_outputs", "num_inputs"), SHAPES)
def test_with_tokens_the_matrix_is_the_one_that_explicit_roots_give(num_outputs, num_inputs, num_tokens, rank):
    weights, x = normal(1, num_outputs, num_inputs), normal(num_tokens, num_inputs, seed=1)
    expected = best_by_hand(weights[0], gram_of(x), torch.ones(num_outputs), rank)
    torch.testing.assert_close(low_rank(weights, decompose(weights, [x]), rank)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), SHAPES)
def test_a_row_scale_weighs_the_outputs(num_outputs, num_inputs, rank):
    weights, x = normal(1, num_outputs, num_inputs), normal(30, num_inputs, seed=1)
    scale = normal(1, num_outputs, seed=2).abs() + 0.1
    result = low_rank(weights, decompose(weights, [x], row_scale=scale), rank)[0]
    torch.testing.assert_close(result, best_by_hand(weights[0], gram_of(x), scale[0], rank), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("num_outputs", "num_inputs"), SHAPES)
def test_without_ridge_the_outputs_on_the_tokens_are_as_close_as_a_rank_can_bring_them(num_outputs, num_inputs):
    weights, x = normal(1, num_outputs, num_inputs), normal(50, num_inputs, seed=1)
    result = low_rank(weights, decompose(weights, [x], ridge=1e-12), 3)[0]
    error = (x @ (weights[0] - result).T).double().square().sum()
    outputs = x.double() @ weights[0].double().T
    torch.testing.assert_close(error, torch.linalg.svdvals(outputs)[3:].square().sum(), rtol=1e-4, atol=0)


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 8), st.integers(2, 8), st.integers(1, 12))
def test_no_other_matrix_of_the_rank_gives_a_smaller_output_error(seed, num_outputs, num_inputs, num_tokens):
    weights, x = normal(1, num_outputs, num_inputs, seed=seed), normal(num_tokens, num_inputs, seed=seed + 1)
    gram, rank = gram_of(x), min(num_outputs, num_inputs) - 1
    error = lambda w: float(((weights[0] - w).double() @ gram * (weights[0] - w).double()).sum())
    best = low_rank(weights, decompose(weights, [x]), rank)[0]
    u, s, vt = torch.linalg.svd(weights[0])
    plain = u[:, :rank] @ s[:rank].diag() @ vt[:rank]
    rows = torch.linalg.svd(best).Vh[:rank]  # adding combinations of these keeps the rank
    moved = best + 0.01 * normal(num_outputs, rank, seed=seed + 2) @ rows
    for other in (plain, moved):
        assert error(best) <= error(other) + 1e-5 * error(torch.zeros_like(best))


@pytest.mark.parametrize(("num_outputs", "num_inputs"), SHAPES)
def test_a_token_of_twice_the_norm_counts_four_times(num_outputs, num_inputs):
    weights, x = normal(1, num_outputs, num_inputs), normal(20, num_inputs, seed=1)
    doubled = torch.cat([2 * x[:5], x[5:]])
    repeated = torch.cat([x[:5]] * 4 + [x[5:]])
    one, other = (low_rank(weights, decompose(weights, [tokens]), 2) for tokens in (doubled, repeated))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("num_outputs", "num_inputs"), SHAPES)
@pytest.mark.parametrize("silent", [torch.zeros(0, 1), torch.zeros(4, 1)])
def test_an_expert_that_saw_nothing_gets_the_plain_decomposition(num_outputs, num_inputs, silent):
    weights = normal(2, num_outputs, num_inputs)
    tokens = [normal(20, num_inputs, seed=1), silent.expand(-1, num_inputs)]
    mixed, plain = decompose(weights, tokens), decompose(weights)
    torch.testing.assert_close(mixed.energy[1], plain.energy[1])
    torch.testing.assert_close(low_rank(weights, mixed, 3)[1], low_rank(weights, plain, 3)[1])
    assert not torch.allclose(low_rank(weights, mixed, 3)[0], low_rank(weights, plain, 3)[0], rtol=1e-2)


@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), SHAPES)
def test_row_errors_are_what_the_rank_leaves_in_each_output(num_outputs, num_inputs, rank, with_scale):
    weights, x = normal(2, num_outputs, num_inputs), normal(25, num_inputs, seed=1)
    scale = normal(2, num_outputs, seed=2).abs() + 0.1 if with_scale else None
    result = decompose(weights, [x, x[:7]], row_scale=scale)
    left = weights - low_rank(weights, result, rank)
    for g, tokens in enumerate((x, x[:7])):
        gram = gram_of(tokens)
        for row in range(num_outputs):
            difference = left[g, row].double() * (1.0 if scale is None else float(scale[g, row]))
            expected = float(difference @ gram @ difference)
            total = float(result.row_energy[g].sum())
            assert float(result.row_errors(rank)[g, row]) == pytest.approx(expected, rel=1e-4, abs=1e-6 * total)


@pytest.mark.parametrize(("num_outputs", "num_inputs"), SHAPES)
def test_the_errors_of_all_rows_are_the_energy_that_was_not_captured(num_outputs, num_inputs):
    weights, x = normal(1, num_outputs, num_inputs), normal(25, num_inputs, seed=1)
    result = decompose(weights, [x])
    for rank in range(1, 6):
        missing = 1 - float(result.captured(rank))
        assert float(result.row_errors(rank).sum() / result.row_energy.sum()) == pytest.approx(missing, abs=1e-6)


def test_captured_energy_of_a_diagonal_matrix_is_known():
    # singular values 4, 2, 1: energies 16, 4, 1 of 21
    weights = torch.diag(torch.tensor([2.0, 4.0, 1.0]))[None]
    result = decompose(weights)
    assert [float(result.captured(rank)) for rank in (1, 2, 3)] == pytest.approx([16 / 21, 20 / 21, 1])
    assert result.row_errors(1)[0].tolist() == pytest.approx([4, 0, 1])


def test_a_row_scale_can_turn_the_order_of_the_components():
    # rows of norm 2 and 3, errors of the first counting 10 times: 20 against 3
    weights = torch.tensor([[[2.0, 0.0], [0.0, 3.0]]])
    scaled = decompose(weights, row_scale=torch.tensor([[10.0, 1.0]]))
    assert scaled.energy[0].tolist() == pytest.approx([400, 9])
    torch.testing.assert_close(low_rank(weights, scaled, 1)[0], torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(low_rank(weights, decompose(weights), 1)[0], torch.tensor([[0.0, 0.0], [0.0, 3.0]]))


def test_the_ridge_is_a_share_of_the_mean_diagonal():
    # X^T X = diag(8, 0), mean diagonal 4, ridge 0.25 of it: G = diag(9, 1), so that W G^1/2 = diag(3, 2)
    weights, x = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]), torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    assert decompose(weights, [x], ridge=0.25).energy[0].tolist() == pytest.approx([9, 4])
    tall = torch.cat([weights, torch.zeros(1, 1, 2)], 1)  # the branch of more outputs than inputs
    assert decompose(tall, [x], ridge=0.25).energy[0].tolist() == pytest.approx([9, 4])


@pytest.mark.parametrize(("num_outputs", "num_inputs"), SHAPES)
def test_experts_together_come_out_as_experts_one_at_a_time(num_outputs, num_inputs):
    weights = normal(4, num_outputs, num_inputs)
    tokens = [normal(n, num_inputs, seed=n) for n in (0, 1, 12, 50)]
    scale = normal(4, num_outputs, seed=2).abs() + 0.1
    together = decompose(weights, tokens, row_scale=scale)
    for g in range(4):
        alone = decompose(weights[g : g + 1], tokens[g : g + 1], row_scale=scale[g : g + 1])
        torch.testing.assert_close(together.energy[g], alone.energy[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            low_rank(weights, together, 4)[g], low_rank(weights[g : g + 1], alone, 4)[0], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(("num_outputs", "num_inputs"), SHAPES)
def test_a_matrix_of_zeros_has_no_energy_and_loses_nothing(num_outputs, num_inputs):
    weights = torch.zeros(1, num_outputs, num_inputs)
    result = decompose(weights, [normal(10, num_inputs)])
    assert result.captured(1).tolist() == [1]
    assert float(result.row_errors(2).abs().sum()) == 0
    assert not low_rank(weights, result, 2).any()


@pytest.mark.parametrize("with_tokens", [False, True])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), SHAPES)
def test_a_matrix_of_lower_rank_is_reproduced_at_any_rank_above_it(num_outputs, num_inputs, with_tokens):
    for seed in range(20):  # which of the vanishing singular values round to zero is chance
        weights = normal(1, num_outputs, 2, seed=seed) @ normal(1, 2, num_inputs, seed=seed + 100)
        result = decompose(weights, [normal(30, num_inputs)] if with_tokens else None)
        for rank in range(2, min(num_outputs, num_inputs) + 1):
            torch.testing.assert_close(low_rank(weights, result, rank), weights, rtol=1e-4, atol=1e-4)
            assert float(result.row_errors(rank).sum()) <= 1e-6 * float(result.row_energy.sum())


def test_cutting_keeps_what_lower_ranks_need():
    weights = normal(2, 8, 12)
    whole = decompose(weights)
    cut = whole.cut(3)
    assert torch.equal(cut.row_errors(3), whole.row_errors(3))
    assert torch.equal(cut.captured(2), whole.captured(2))
    assert torch.equal(low_rank(weights, cut, 3), low_rank(weights, whole, 3))
