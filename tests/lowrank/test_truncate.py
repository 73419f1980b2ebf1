"""Factors of a shape: which rows are kept, that they are exact, and how errors fall with rank and rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from msmoe.lowrank.decompose import decompose
from msmoe.lowrank.factors import Factors, truncate
from msmoe.lowrank.shapes import FactorShape

SHAPES = [(7, 12), (10, 10), (12, 7)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def multiplied_out(factors: Factors, g: int) -> Tensor:
    """U V + S of one matrix, entry by entry of the definition."""
    u, v, s, rows = (part[g].double() for part in factors)
    dense = torch.zeros(len(u), v.shape[1], dtype=torch.float64)
    for r in range(u.shape[1]):
        dense += torch.outer(u[:, r], v[r])
    for k, row in enumerate(rows.int().tolist()):
        dense[row] += s[k]
    return dense.float()


@pytest.mark.parametrize(("num_outputs", "num_inputs"), SHAPES)
def test_factors_stand_for_u_v_plus_s(num_outputs, num_inputs):
    weights = normal(3, num_outputs, num_inputs)
    factors = truncate(weights, decompose(weights), FactorShape(2, 4))
    for g in range(3):
        torch.testing.assert_close(factors.dense()[g], multiplied_out(factors, g))


def test_the_factors_of_one_expert_alone_stand_for_its_matrix():
    weights = normal(3, 9, 5)
    factors = truncate(weights, decompose(weights), FactorShape(2, 4))
    for g in range(3):
        alone = Factors(*(part[g] for part in factors))
        torch.testing.assert_close(alone.dense(), multiplied_out(factors, g))


@pytest.mark.parametrize("with_tokens", [False, True])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), SHAPES)
def test_full_rank_reproduces_the_matrix(num_outputs, num_inputs, with_tokens):
    weights = normal(2, num_outputs, num_inputs)
    tokens = [normal(30, num_inputs, seed=g + 1) for g in range(2)] if with_tokens else None
    scale = normal(2, num_outputs, seed=5).abs() + 0.1
    shape = FactorShape(min(num_outputs, num_inputs), 0)
    dense = truncate(weights, decompose(weights, tokens, row_scale=scale), shape).dense()
    torch.testing.assert_close(dense, weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 7])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), SHAPES)
def test_keeping_every_row_reproduces_the_matrix_at_any_rank(num_outputs, num_inputs, rank):
    weights = normal(2, num_outputs, num_inputs)
    dense = truncate(weights, decompose(weights), FactorShape(rank, num_outputs)).dense()
    torch.testing.assert_close(dense, weights, rtol=1e-6, atol=1e-6)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(2, 9), st.integers(2, 9), st.booleans())
def test_the_output_error_falls_with_every_rank_and_every_row(seed, num_outputs, num_inputs, with_tokens):
    weights, x = normal(1, num_outputs, num_inputs, seed=seed), normal(20, num_inputs, seed=seed + 1)
    result = decompose(weights, [x] if with_tokens else None, ridge=0)
    seen = x if with_tokens else torch.eye(num_inputs)

    def error(rank: int, num_rows: int) -> float:
        dense = truncate(weights, result, FactorShape(rank, num_rows)).dense()[0]
        return float((seen @ (weights[0] - dense).T).double().square().sum())

    total = float((seen @ weights[0].T).double().square().sum())
    ranks, rows = range(1, min(num_outputs, num_inputs) + 1), range(num_outputs + 1)
    errors = torch.tensor([[error(rank, num_rows) for num_rows in rows] for rank in ranks])
    assert (errors.diff(dim=0)[:, 0] <= 1e-5 * total).all()
    assert (errors.diff(dim=1) <= 1e-5 * total).all()


@pytest.mark.parametrize("row_score", ["activation", "magnitude"])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), SHAPES)
def test_kept_rows_are_exact_and_the_others_are_the_low_rank_part(num_outputs, num_inputs, row_score):
    weights = normal(2, num_outputs, num_inputs)
    tokens = [normal(30, num_inputs, seed=g + 1) for g in range(2)]
    factors = truncate(weights, decompose(weights, tokens), FactorShape(2, 3), row_score=row_score)
    dense, low_rank = factors.dense(), factors.u @ factors.v
    for g in range(2):
        kept = factors.rows[g].tolist()
        others = [row for row in range(num_outputs) if row not in kept]
        torch.testing.assert_close(dense[g, kept], weights[g, kept], rtol=1e-6, atol=1e-6)
        assert torch.equal(dense[g, others], low_rank[g, others])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_kept_rows_are_exact_to_the_rounding_of_the_remainder(dtype):
    weights = normal(2, 12, 7)
    factors = truncate(weights, decompose(weights), FactorShape(2, 12), dtype=dtype)
    assert (factors.u.dtype, factors.v.dtype, factors.s.dtype) == (dtype, dtype, dtype)
    remainder = weights - factors.u.float() @ factors.v.float()  # of the rounded U and V
    allowed = torch.finfo(dtype).eps / 2 * remainder.abs() + 1e-6
    assert ((factors.dense() - weights).abs() <= allowed).all()


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 9), st.data())
def test_exactly_the_rows_asked_for_are_kept_in_ascending_order(seed, num_outputs, data):
    num_rows = data.draw(st.integers(0, num_outputs))
    weights = normal(3, num_outputs, 4, seed=seed)
    rows = truncate(weights, decompose(weights), FactorShape(1, num_rows)).rows
    assert rows.dtype == torch.int32
    for kept in rows.tolist():
        assert kept == sorted(set(kept))
        assert len(kept) == num_rows
        assert all(0 <= row < num_outputs for row in kept)


def test_rows_that_tie_are_kept_lowest_index_first():
    # after rank 1 took the first row, the others are left whole, each of norm 1
    weights = torch.eye(5)[None] + torch.diag(torch.tensor([2.0, 0, 0, 0, 0]))
    for row_score in ("activation", "magnitude"):
        factors = truncate(weights, decompose(weights), FactorShape(1, 2), row_score=row_score)
        assert factors.rows.tolist() == [[1, 2]]


def test_the_rows_kept_are_those_with_the_largest_output_error():
    # rank 1 takes row 0; rows 1 and 2 are (0, 3, 0) and (0, 0, 2), seen by tokens 1 and 4 times as large:
    # output errors 9 and 64, remainders in weights 9 and 4
    weights = torch.tensor([[[50.0, 0, 0], [0, 3, 0], [0, 0, 2]]])
    x = torch.diag(torch.tensor([1.0, 1, 4]))
    result = decompose(weights, [x], ridge=0)
    kept = lambda score: truncate(weights, result, FactorShape(1, 1), row_score=score).rows.tolist()
    assert kept("activation") == [[2]]
    assert kept("magnitude") == [[1]]


def test_a_row_scale_decides_which_rows_count():
    # remainders of norm 3 and 2 in rows 1 and 2; errors of row 2 count twice: 3 against 4
    weights = torch.tensor([[[50.0, 0, 0], [0, 3, 0], [0, 0, 2]]])
    result = decompose(weights, row_scale=torch.tensor([[1.0, 1, 2]]))
    assert truncate(weights, result, FactorShape(1, 1)).rows.tolist() == [[2]]
    assert truncate(weights, result, FactorShape(1, 1), row_score="magnitude").rows.tolist() == [[1]]


@pytest.mark.parametrize("row_score", ["activation", "magnitude"])
def test_kept_rows_are_chosen_as_by_hand(row_score):
    weights = normal(1, 9, 14)
    u, s, vt = torch.linalg.svd(weights[0])
    remainder = weights[0] - u[:, :3] @ s[:3].diag() @ vt[:3]
    largest = sorted(range(9), key=lambda row: -float(remainder[row].norm()))[:4]
    factors = truncate(weights, decompose(weights), FactorShape(3, 4), row_score=row_score)
    assert factors.rows.tolist() == [sorted(largest)]
    torch.testing.assert_close(factors.s[0], remainder[sorted(largest)], rtol=1e-4, atol=1e-5)


def test_without_tokens_both_factors_hold_the_root_of_the_singular_values():
    weights = normal(1, 9, 14)
    factors = truncate(weights, decompose(weights), FactorShape(4, 0))
    values = torch.linalg.svdvals(weights[0])[:4]
    torch.testing.assert_close(factors.u[0].norm(dim=0), values.sqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(factors.v[0].norm(dim=1), values.sqrt(), rtol=1e-5, atol=0)


def test_both_parts_of_a_component_have_the_same_norm_whatever_the_weighting():
    weights, x = normal(2, 12, 7), normal(30, 7, seed=1)
    scale = normal(2, 12, seed=2).abs() + 0.01
    factors = truncate(weights, decompose(weights, [x, x], row_scale=scale), FactorShape(5, 2))
    torch.testing.assert_close(factors.u.norm(dim=1), factors.v.norm(dim=2), rtol=1e-4, atol=0)


def test_other_weights_of_the_same_outputs_are_projected_and_their_kept_rows_are_exact():
    weights, refitted = normal(1, 8, 12), normal(1, 8, 12, seed=1)
    result = decompose(weights)
    basis = result.left[0, :, :3]
    factors = truncate(refitted, result, FactorShape(3, 2))
    torch.testing.assert_close(factors.u[0] @ factors.v[0], basis @ basis.T @ refitted[0], rtol=1e-4, atol=1e-5)
    kept = factors.rows[0].tolist()
    torch.testing.assert_close(factors.dense()[0, kept], refitted[0, kept], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 1), (8, 0), (2, 13), (2, -1)])
def test_a_shape_that_does_not_fit_is_refused_with_the_sizes(shape):
    weights = normal(1, 12, 7)
    with pytest.raises(ValueError, match=rf"rank={shape[0]}, num_rows={shape[1]}.* does not fit .* 12 x 7"):
        truncate(weights, decompose(weights), FactorShape(*shape))


def test_a_rank_beyond_a_cut_decomposition_is_refused():
    weights = normal(1, 12, 7)
    with pytest.raises(ValueError, match="rank=4"):
        truncate(weights, decompose(weights).cut(3), FactorShape(4, 0))
