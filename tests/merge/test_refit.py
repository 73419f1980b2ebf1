"""Refit of the output matrix: normal equations, held-out error, and groups with few tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msmoe.layer.expert import switch_expert
from msmoe.merge import refit_output
from msmoe.merge.refit import NeuronSpace, TokenSpace

F, D = 12, 5


def problem(num_tokens: int, *, seed: int = 0, num_members: int = 3):
    """Tokens of members that share an ancestor, and the plain average of the members."""
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=generator)
    ancestor = switch_expert(randn(F, D), randn(D, F))
    members = [
        switch_expert(ancestor.inputs["wi"] + 0.5 * randn(F, D), ancestor.output + 0.5 * randn(D, F))
        for _ in range(num_members)
    ]
    merged = switch_expert(
        sum(m.inputs["wi"] for m in members) / num_members, sum(m.output for m in members) / num_members
    )
    x, gate = randn(num_tokens, D), torch.rand(num_tokens, generator=generator) * 0.8 + 0.2
    owner = torch.randint(num_members, (num_tokens,), generator=generator)
    outputs = torch.stack([member(x) for member in members])
    targets = outputs[owner, torch.arange(num_tokens)] * gate[:, None]
    weights = torch.rand(num_tokens, generator=generator, dtype=torch.float64) * 3 + 0.5
    held_out = torch.rand(num_tokens, generator=generator) < 0.5
    return merged, x, gate, targets, weights, held_out


def relative_error(wo, merged, x, gate, targets, weights, used):
    """|g wo h - y|^2 / |y|^2 over some tokens, each counted by its weight; one token at a time."""
    error = total = 0.0
    for t in used.nonzero().flatten().tolist():
        difference = gate[t] * (wo @ (merged.inputs["wi"] @ x[t]).relu()) - targets[t]
        error += float(weights[t] * difference.square().sum())
        total += float(weights[t] * targets[t].square().sum())
    return error / total


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 200))
def test_the_held_out_error_is_never_worse_than_without_refit(seed, num_tokens):
    result = refit_output(*problem(num_tokens, seed=seed))
    if result.num_fitted and result.num_held_out:
        assert result.error_after <= result.error_before


def test_the_reported_errors_are_those_of_the_held_out_tokens():
    merged, x, gate, targets, weights, held_out = problem(150)
    result = refit_output(merged, x, gate, targets, weights, held_out)
    arguments = merged, x, gate, targets, weights, held_out
    assert result.error_before == pytest.approx(relative_error(merged.output, *arguments), rel=1e-4)
    assert result.error_after == pytest.approx(relative_error(result.output, *arguments), rel=1e-4)
    assert (result.num_fitted, result.num_held_out) == (int((~held_out).sum()), int(held_out.sum()))


@pytest.mark.parametrize("num_tokens", [16, 400])
@pytest.mark.parametrize("ridge", [1e-3, 0.1, 3.0])
def test_the_solution_satisfies_the_normal_equations(num_tokens, ridge):
    good, x, gate, targets, weights, held_out = problem(num_tokens)
    merged = switch_expert(good.inputs["wi"], torch.full_like(good.output, 5.0))  # so far off that any fit helps
    result = refit_output(merged, x, gate, targets, weights, held_out, ridges=(ridge,))
    assert result.ridge == ridge
    h = ((x @ merged.inputs["wi"].T).relu() * gate[:, None]).double()  # of all tokens: the ridge is chosen by then
    y, w = targets.double(), weights
    gram = h.T @ (w[:, None] * h)
    pull = ridge * gram.diagonal().mean()
    residual = (result.output.double() @ h.T - y.T) @ (w[:, None] * h) + pull * (result.output - merged.output).double()
    assert residual.abs().max() < 1e-4 * float(gram.abs().max())


def test_the_training_objective_is_below_that_of_the_average_for_every_ridge():
    merged, x, gate, targets, weights, held_out = problem(200)
    for ridge in (1e-3, 1e-1, 3.0):
        result = refit_output(merged, x, gate, targets, weights, held_out, ridges=(ridge,))
        fitted = relative_error(result.output, merged, x, gate, targets, weights, ~held_out)
        assert fitted <= relative_error(merged.output, merged, x, gate, targets, weights, ~held_out)


def test_a_huge_ridge_gives_the_merged_matrix():
    merged, *rest = problem(200)
    result = refit_output(merged, *rest, ridges=(1e12,))
    torch.testing.assert_close(result.output, merged.output, rtol=1e-6, atol=1e-6)


def test_equal_experts_reproduce_their_output_matrix():
    merged, x, gate, _, weights, held_out = problem(300)
    result = refit_output(merged, x, gate, merged(x) * gate[:, None], weights, held_out)
    torch.testing.assert_close(result.output, merged.output, rtol=1e-4, atol=1e-5)


def test_a_realisable_target_is_found():
    merged, x, gate, _, weights, held_out = problem(2000)
    truth = torch.randn(D, F, generator=torch.Generator().manual_seed(5))
    targets = switch_expert(merged.inputs["wi"], truth)(x) * gate[:, None]
    result = refit_output(merged, x, gate, targets, weights, held_out, ridges=(1e-9,))
    torch.testing.assert_close(result.output, truth, rtol=1e-3, atol=1e-3)


def test_the_order_of_the_tokens_does_not_matter():
    merged, *tokens = problem(200)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    one, other = refit_output(merged, *tokens), refit_output(merged, *(t[order] for t in tokens))
    assert one.ridge == other.ridge
    torch.testing.assert_close(one.output, other.output, rtol=1e-3, atol=1e-4)


def test_a_weight_of_two_is_the_token_twice():
    merged, x, gate, targets, _, held_out = problem(120)
    doubled = torch.ones(120, dtype=torch.float64)
    doubled[:40] = 2
    twice = torch.cat([torch.arange(120), torch.arange(40)])
    one = refit_output(merged, x, gate, targets, doubled, held_out)
    other = refit_output(
        merged, x[twice], gate[twice], targets[twice], torch.ones(160, dtype=torch.float64), held_out[twice]
    )
    torch.testing.assert_close(one.output, other.output, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 3])
def test_a_group_with_few_tokens_stays_finite_and_no_worse(num_tokens):
    result = refit_output(*problem(num_tokens))
    assert result.output.isfinite().all()
    assert not result.error_after > result.error_before


@pytest.mark.parametrize("all_held_out", [True, False])
def test_with_one_side_empty_the_merged_matrix_is_kept(all_held_out):
    merged, *tokens, held_out = problem(30)
    result = refit_output(merged, *tokens, torch.full_like(held_out, all_held_out))
    assert torch.equal(result.output, merged.output)
    assert result.ridge is None


def test_neurons_that_never_fire_keep_their_column():
    merged, x, gate, targets, weights, held_out = problem(400)
    wi = merged.inputs["wi"].clone()
    wi[3] = 0
    result = refit_output(switch_expert(wi, merged.output), x, gate, targets, weights, held_out)
    assert result.ridge is not None
    torch.testing.assert_close(result.output[:, 3], merged.output[:, 3])


def test_silent_neurons_everywhere_keep_the_merged_matrix():
    merged, *tokens = problem(50)
    result = refit_output(switch_expert(torch.zeros_like(merged.inputs["wi"]), merged.output), *tokens)
    assert torch.equal(result.output, merged.output)


@pytest.mark.parametrize("num_rows", [3, F - 1, F, F + 1, 60])
@pytest.mark.parametrize("ridge", [1e-3, 1.0])
@pytest.mark.parametrize("space", [TokenSpace, NeuronSpace])
def test_the_solution_agrees_with_an_augmented_least_squares_problem(space, num_rows, ridge):
    generator = torch.Generator().manual_seed(num_rows)
    rows = torch.randn(num_rows, F, generator=generator)
    residuals = torch.randn(num_rows, D, generator=generator)
    pull = ridge * float(rows.double().square().sum()) / F  # ridge times the mean diagonal of H^T H
    augmented = torch.cat([rows.double(), pull**0.5 * torch.eye(F, dtype=torch.float64)])
    wanted = torch.cat([residuals.double(), torch.zeros(F, D, dtype=torch.float64)])
    expected = torch.linalg.lstsq(augmented, wanted).solution.T
    torch.testing.assert_close(space(rows, residuals, 2).solve(ridge), expected.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("num_fitted", [4, 25])
@pytest.mark.parametrize("space", [TokenSpace, NeuronSpace])
def test_the_held_out_error_is_that_of_the_solution_on_the_fitted_tokens(space, num_fitted):
    generator = torch.Generator().manual_seed(0)
    rows, residuals = torch.randn(40, F, generator=generator), torch.randn(40, D, generator=generator)
    fitted = space(rows[:num_fitted], residuals[:num_fitted], num_fitted - 1).solve(0.01)
    expected = float((rows[num_fitted:] @ fitted.T - residuals[num_fitted:]).double().square().sum())
    assert space(rows, residuals, num_fitted).held_out_error(0.01) == pytest.approx(expected, rel=1e-4)
