"""Refit of a whole layer for the routing that it will do: separable and overlapping groups."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msmoe.layer.expert import Activation, Expert, switch_expert
from msmoe.layer.routing import Routing
from msmoe.merge.layer_refit import LayerRefit, LayerTokens, refit_group
from msmoe.merge.refit import RIDGES, refit_output

F, D = 10, 4
SILU = Activation("silu", lambda gate, up: torch.nn.functional.silu(gate) * up, scales="up")


def experts_of(num_groups: int, *, seed: int = 0, gated: bool = False) -> list[Expert]:
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=generator)
    if not gated:
        return [switch_expert(randn(F, D), randn(D, F)) for _ in range(num_groups)]
    inputs = lambda: {"gate": randn(F, D), "gate_bias": randn(F), "up": randn(F, D), "up_bias": randn(F)}
    return [Expert(inputs(), randn(D, F), randn(D), SILU) for _ in range(num_groups)]


def problem(num_tokens: int, top_k: int, *, num_groups: int = 3, seed: int = 0, gated: bool = False):
    """Experts of a layer, and tokens whose targets other experts gave under another routing."""
    generator = torch.Generator().manual_seed(seed + 1)
    experts = experts_of(num_groups, seed=seed, gated=gated)
    others = experts_of(num_groups, seed=seed + 100, gated=gated)
    x = torch.randn(num_tokens, D, generator=generator)
    weights, chosen = torch.randn(num_tokens, num_groups, generator=generator).softmax(-1).topk(top_k)
    near = [e.like([0.6 * a + 0.4 * b for a, b in zip(e.tensors, o.tensors, strict=True)])
            for e, o in zip(experts, others, strict=True)]  # fmt: skip
    targets = outputs_of(near, x, Routing(chosen, weights))
    moved = torch.rand(weights.shape, generator=generator) + 0.3
    counts = torch.rand(num_tokens, generator=generator, dtype=torch.float64) * 3 + 0.5
    held_out = torch.rand(num_tokens, generator=generator) < 0.5
    return experts, LayerTokens(x, Routing(chosen, moved * weights), targets, counts, held_out)


def outputs_of(experts: list[Expert], x, routing: Routing, constants=None):
    """What a layer gives, one token and one choice at a time."""
    y = torch.zeros_like(x)
    for t in range(len(x)):
        for g, weight in zip(routing.experts[t].tolist(), routing.weights[t], strict=True):
            given = experts[g](x[t : t + 1])[0] if g < len(experts) else constants[g - len(experts)]
            y[t] += weight * given
    return y


def error_of(experts, tokens: LayerTokens, used=None, constants=None) -> float:
    used = tokens.held_out if used is None else used
    difference = outputs_of(experts, tokens.inputs, tokens.routing, constants) - tokens.targets
    squares = lambda values: float((values.double().square().sum(1) * tokens.weights)[used].sum())
    return squares(difference) / squares(tokens.targets)


def solved(experts, tokens, **options):
    """The layer's refit and the experts that come of it."""
    layer = LayerRefit(experts.__getitem__, len(experts), tokens, **options)
    refits = dict(layer.groups())
    after = [e.with_output(refits[g].output) if g in refits else e for g, e in enumerate(experts)]
    return layer, refits, after


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("num_tokens", [40, 300])
def test_with_one_choice_each_group_is_refitted_bit_by_bit_as_by_itself(num_tokens, gated):
    experts, tokens = problem(num_tokens, 1, gated=gated)
    layer, refits, _ = solved(experts, tokens)
    for g, expert in enumerate(experts):
        mine = tokens.routing.experts[:, 0] == g
        alone = refit_output(
            expert, tokens.inputs[mine], tokens.routing.weights[mine, 0], tokens.targets[mine], tokens.weights[mine],
            tokens.held_out[mine],
        )  # fmt: skip
        assert torch.equal(refits[g].output, alone.output)
        assert refits[g].describe() == alone.describe() == refit_group(expert, tokens, g).describe()
    assert layer.num_sweeps == 1


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("gated", [False, True])
def test_the_error_before_is_that_of_the_layer_as_it_was(top_k, gated):
    experts, tokens = problem(200, top_k, gated=gated)
    layer, _, _ = solved(experts, tokens)
    assert layer.error_before == pytest.approx(error_of(experts, tokens), rel=1e-4)
    assert layer.error_after < layer.error_before


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.integers(1, 120), st.integers(1, 3))
def test_the_held_out_error_never_rises(seed, num_tokens, top_k):
    experts, tokens = problem(num_tokens, top_k, seed=seed)
    layer, refits, after = solved(experts, tokens)
    steps = [layer.error_before, *layer.history]
    assert all(after <= before for before, after in itertools.pairwise(steps))
    assert not layer.error_after > layer.error_before
    assert all(refit.output.isfinite().all() for refit in refits.values())
    assert error_of(after, tokens, torch.ones_like(tokens.held_out)) <= 1.0001 * error_of(
        experts, tokens, torch.ones_like(tokens.held_out)
    )  # the sum over all tokens, which the returned matrices minimise with a ridge


def test_the_error_after_is_that_of_solutions_on_the_fitted_tokens():
    """With one ridge and one sweep, solved here group after group by least squares on the fitted half."""
    experts, tokens = problem(160, 2)
    layer, _, _ = solved(experts, tokens, ridges=(0.05,), max_sweeps=1)
    current = list(experts)
    for g, expert in enumerate(experts):
        without = [e if i != g else e.with_output(torch.zeros_like(e.output)) for i, e in enumerate(current)]
        at, gate = tokens.of_group(g)
        at, gate = at[~tokens.held_out[at]], gate[~tokens.held_out[at]]
        scale = tokens.weights[at].sqrt()[:, None]
        left = tokens.targets - outputs_of(without, tokens.inputs, tokens.routing)
        rows = expert.hidden(tokens.inputs[at]).double() * gate[:, None] * scale
        residual = left[at].double() * scale - rows @ expert.output.double().T
        pull = 0.05 * float(rows.square().sum()) / F
        change = torch.linalg.solve(rows.T @ rows + pull * torch.eye(F, dtype=torch.float64), rows.T @ residual)
        current[g] = expert.with_output((expert.output + change.T).float())
    assert layer.error_after == pytest.approx(error_of(current, tokens), rel=1e-3)


def test_many_sweeps_with_a_tiny_ridge_reach_the_joint_least_squares_solution():
    """All groups of every token, solved at once: one system of G F unknowns."""
    experts, tokens = problem(600, 2)
    _, _, after = solved(experts, tokens, ridges=(1e-9,), max_sweeps=60)
    columns = torch.zeros(600, len(experts) * F, dtype=torch.float64)
    for g, expert in enumerate(experts):
        at, gate = tokens.of_group(g)
        columns[at, g * F : (g + 1) * F] = (expert.hidden(tokens.inputs[at]) * gate[:, None]).double()
    scale = tokens.weights.sqrt()[:, None]
    joint = torch.linalg.lstsq(columns * scale, tokens.targets.double() * scale).solution
    best = (columns @ joint - tokens.targets).square().sum(1) @ tokens.weights
    every = torch.ones_like(tokens.held_out)
    total = tokens.targets.double().square().sum(1) @ tokens.weights
    assert error_of(after, tokens, every) < 1.05 * float(best / total) < 0.5 * error_of(experts, tokens, every)


def test_more_sweeps_lower_the_error_further():
    experts, tokens = problem(300, 2)
    one, _, _ = solved(experts, tokens, max_sweeps=1)
    more, _, _ = solved(experts, tokens, max_sweeps=4)
    assert 1 < more.num_sweeps <= 4
    assert more.error_after < one.error_after


def test_two_choices_that_lead_to_one_group_count_as_one_of_their_summed_weight():
    experts, tokens = problem(120, 1)
    twice = Routing(tokens.routing.experts.repeat(1, 2), tokens.routing.weights * torch.tensor([[0.25, 0.75]]))
    _, once, _ = solved(experts, tokens)
    layer, refits, _ = solved(experts, replace(tokens, routing=twice))
    assert layer.num_sweeps == 1
    for g in once:
        torch.testing.assert_close(refits[g].output, once[g].output, rtol=1e-4, atol=1e-5)


def test_a_second_choice_of_weight_zero_changes_nothing():
    experts, tokens = problem(200, 1)
    second = (tokens.routing.experts + 1) % len(experts)
    weights = tokens.routing.weights
    both = Routing(torch.cat([tokens.routing.experts, second], 1), torch.cat([weights, torch.zeros_like(weights)], 1))
    alone, _, _ = solved(experts, tokens)
    layer, _, _ = solved(experts, replace(tokens, routing=both), max_sweeps=1)
    assert layer.error_after == pytest.approx(alone.error_after, rel=1e-4)


@pytest.mark.parametrize("top_k", [1, 2])
def test_constants_and_groups_that_stay_are_taken_from_the_targets(top_k):
    experts, tokens = problem(200, top_k, num_groups=4)
    constants = torch.randn(1, D, generator=torch.Generator().manual_seed(3))
    layer, refits, after = solved(experts[:3], tokens, constants=constants, changing=(0, 2))
    assert list(refits) == [0, 2]
    assert layer.error_before == pytest.approx(error_of(experts[:3], tokens, None, constants), rel=1e-4)
    assert layer.error_after < layer.error_before
    every = torch.ones_like(tokens.held_out)
    assert error_of(after, tokens, every, constants) < error_of(experts[:3], tokens, every, constants)


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_layer_that_gives_its_targets_stays_as_it_is(top_k):
    experts, tokens = problem(200, top_k)
    tokens = replace(tokens, targets=outputs_of(experts, tokens.inputs, tokens.routing))
    layer, _, after = solved(experts, tokens)
    assert layer.error_after <= layer.error_before < 1e-10
    for before, now in zip(experts, after, strict=True):
        torch.testing.assert_close(now.output, before.output, rtol=1e-4, atol=1e-5)


def test_groups_that_no_token_meets_keep_their_matrix():
    experts, tokens = problem(150, 2)
    extra = experts_of(1, seed=9)[0]
    _, refits, _ = solved([*experts, extra], tokens)
    assert torch.equal(refits[3].output, extra.output)
    assert refits[3].ridge is None
    assert (refits[3].num_fitted, refits[3].num_held_out) == (0, 0)


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_errors_of_a_group_are_those_of_the_layer_at_its_held_out_tokens(top_k):
    experts, tokens = problem(200, top_k)
    _, refits, _ = solved(experts, tokens)
    for g, refit in refits.items():
        used = tokens.held_out & (tokens.routing.experts == g).any(1)
        assert refit.error_before == pytest.approx(error_of(experts, tokens, used), rel=1e-3)
        assert refit.num_held_out == int(used.sum())


@pytest.mark.parametrize("num_tokens", [0, 1, 2])
@pytest.mark.parametrize("top_k", [1, 2])
def test_layers_with_few_tokens_stay_finite_and_no_worse(num_tokens, top_k):
    layer, refits, _ = solved(*problem(num_tokens, top_k))
    assert all(refit.output.isfinite().all() for refit in refits.values())
    assert not layer.error_after > layer.error_before
    assert math.isnan(layer.error_after) == (layer.describe()["error_after"] is None)


def test_experts_are_asked_for_once_and_once_more_in_a_descent():
    for top_k, times in ((1, 1), (2, 2)):
        experts, tokens = problem(100, top_k)
        asked = []
        layer = LayerRefit(lambda g: asked.append(g) or experts[g], 3, tokens)  # noqa: B023
        assert len(list(layer.groups())) == 3
        assert sorted(asked) == sorted([0, 1, 2] * times)


def test_routing_beyond_the_groups_is_refused_with_its_range():
    experts, tokens = problem(20, 2)
    with pytest.raises(ValueError, match=r"routing must lead to 0\.\.1 \(groups and constants\), got 0\.\.2"):
        LayerRefit(experts.__getitem__, 2, tokens)


def test_a_huge_ridge_changes_nothing():
    experts, tokens = problem(200, 2)
    _, _, after = solved(experts, tokens, ridges=(*(1e12 * r for r in RIDGES),))
    for before, now in zip(experts, after, strict=True):
        torch.testing.assert_close(now.output, before.output, rtol=1e-6, atol=1e-6)
