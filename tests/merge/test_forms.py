"""Alignment, every merge rule and the refit on experts of every form: gated, with biases, and Switch's."""

import pytest
import torch
from gated import FORMS, assert_same_weights, near, random_expert, random_inputs, random_order

from msmoe.layer.expert import Expert
from msmoe.merge import RULES, GroupTokens, merge_group, refit_output
from msmoe.merge.align import canonical_scale, match
from msmoe.merge.fisher import expert_fisher
from msmoe.merge.rebasin import match_many
from msmoe.merge.repair import repair
from msmoe.merge.zipit import zip_experts

F, D = 12, 7
FORM = pytest.mark.parametrize("form", FORMS)
SCALED = pytest.mark.parametrize("form", [form for form, (_, _, activation) in FORMS.items() if activation.scales])


def rescaled(expert: Expert, seed: int) -> Expert:
    """The same function with other scales of its neurons, of either sign where the activation is linear."""
    role, generator = expert.activation.scales, torch.Generator().manual_seed(seed)
    scale = torch.rand(F, generator=generator) * 3 + 0.2
    if expert.activation.is_linear:
        scale = torch.where(torch.rand(F, generator=generator) < 0.5, -scale, scale)
    inputs = dict(expert.inputs)
    inputs[role] = inputs[role] * scale[:, None]
    if f"{role}_bias" in inputs:
        inputs[f"{role}_bias"] = inputs[f"{role}_bias"] * scale
    return Expert(inputs, expert.output / scale, expert.output_bias, expert.activation)


@FORM
@pytest.mark.parametrize("alignment", ["weight", "activation", "ream"])
def test_a_planted_permutation_is_recovered_under_noise(form, alignment):
    reference, order = random_expert(form), random_order(1)
    target = near(reference, 2, 0.05).permuted(order)
    found = match(reference, target, alignment=alignment, inputs=random_inputs()).permutation
    assert torch.equal(order[found], torch.arange(F))


@FORM
def test_members_of_many_orders_are_lined_up_with_one_another(form):
    expert = random_expert(form)
    orders = [torch.arange(F), random_order(1), random_order(2), random_order(3)]
    permutations, _ = match_many([near(expert, i, 0.02).permuted(order) for i, order in enumerate(orders)])
    for order, permutation in zip(orders, permutations, strict=True):
        assert torch.equal(order[permutation], torch.arange(F))


@SCALED
def test_canonical_scales_leave_the_function_unchanged_and_are_found_whatever_the_scales_were(form):
    expert, x = random_expert(form), random_inputs()
    canonical = canonical_scale(expert)
    torch.testing.assert_close(canonical(x), expert(x), rtol=1e-4, atol=1e-4)
    role = expert.activation.scales
    torch.testing.assert_close(canonical.inputs[role].norm(dim=1), canonical.output.norm(dim=0))
    assert_same_weights(canonical_scale(rescaled(expert, 3)), canonical, rtol=1e-4, atol=1e-5)


def test_neurons_without_a_scale_to_choose_are_refused_by_the_name_of_their_activation():
    with pytest.raises(ValueError, match="activation clamped swiglu have no scale"):
        canonical_scale(random_expert("gpt-oss"))


@SCALED
def test_rescaled_and_permuted_copies_merge_into_the_expert(form):
    expert, x = random_expert(form), random_inputs()
    copies = [expert, rescaled(expert, 1).permuted(random_order(1)), rescaled(expert, 2).permuted(random_order(2))]
    merged = merge_group((0, 1, 2), (0.2, 0.3, 0.5), copies.__getitem__, reference=0, canonical=True).expert
    torch.testing.assert_close(merged(x), expert(x), rtol=1e-3, atol=1e-3)


def tokens_of(num_members: int, count: int = 300) -> GroupTokens:
    generator = torch.Generator().manual_seed(5)
    x, gate = random_inputs(count), torch.rand(count, num_members, generator=generator)
    routed = torch.rand(count, num_members, generator=generator) < 0.6
    gradient, weights = torch.randn(count, D, generator=generator), torch.ones(count, dtype=torch.float64)
    return GroupTokens(x, routed, gate * routed, weights, gradient, torch.ones(count).bool(), x, weights)


@FORM
@pytest.mark.parametrize("rule", RULES)
def test_permuted_copies_merge_into_the_expert_under_every_rule(form, rule):
    expert, x = random_expert(form), random_inputs()
    copies = [expert.permuted(random_order(i)) for i in range(3)]
    aligned = [e.permuted(match(copies[0], e, alignment="weight").permutation) for e in copies]
    merged, _ = RULES[rule].apply(aligned, (0.2, 0.3, 0.5), tokens_of(3))
    torch.testing.assert_close(merged(x), expert(x), rtol=1e-3, atol=1e-3)


@FORM
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_gives_finite_weights_of_the_members_form(form, rule):
    members = [near(random_expert(form), seed, 0.5) for seed in range(3)]
    merged, _ = RULES[rule].apply(members, (0.2, 0.3, 0.5), tokens_of(3))
    assert {role: w.shape for role, w in merged.weights.items()} == {r: w.shape for r, w in members[0].weights.items()}
    assert all(weight.isfinite().all() for weight in merged.tensors)


@FORM
def test_zipping_unaligned_copies_gives_the_expert(form):
    expert, x = random_expert(form), random_inputs()
    zipped, _ = zip_experts([expert, expert.permuted(random_order(4))], (0.3, 0.7), x)
    torch.testing.assert_close(zipped(x), expert(x), rtol=1e-3, atol=1e-3)


@FORM
def test_the_fisher_is_the_sum_of_squared_gradients_of_single_tokens(form):
    exact = random_expert(form, dtype=torch.float64).map(torch.Tensor.requires_grad_)
    x, generator = random_inputs(30, dtype=torch.float64), torch.Generator().manual_seed(1)
    gate, weights = torch.rand(2, 30, generator=generator, dtype=torch.float64)
    delta = torch.randn(30, D, generator=generator, dtype=torch.float64)
    expected = [torch.zeros_like(t) for t in exact.tensors]
    for t in range(30):
        gradients = torch.autograd.grad(gate[t] * exact(x[t : t + 1])[0] @ delta[t], exact.tensors)
        for total, gradient in zip(expected, gradients, strict=True):
            total += weights[t] * gradient.square()
    expert = exact.map(torch.Tensor.detach)
    fisher = expert_fisher(expert, x, gate, delta, weights)
    assert_same_weights(fisher, expert.like([t.detach() for t in expected]), rtol=1e-10, atol=1e-14)


def refit_problem(form: str, *, noise: float, count: int = 400):
    """Tokens that go to one or two of three members, their gate values, and what the members give together."""
    expert, generator = random_expert(form), torch.Generator().manual_seed(3)
    members = [near(expert, seed, noise) for seed in range(3)]
    x = random_inputs(count)
    gates = torch.rand(count, 3, generator=generator) * (torch.rand(count, 3, generator=generator) < 0.5)
    targets = sum(gates[:, i, None] * member(x) for i, member in enumerate(members))
    held_out = torch.rand(count, generator=generator) < 0.5
    weights = torch.ones(count, dtype=torch.float64)
    merged = expert.like([sum(ts) / 3 for ts in zip(*(m.tensors for m in members), strict=True)])
    return expert, merged, (x, gates.sum(1), targets, weights, held_out)


@FORM
def test_a_refit_never_raises_the_held_out_error(form):
    _, merged, tokens = refit_problem(form, noise=0.3)
    result = refit_output(merged, *tokens)
    assert result.error_after < result.error_before


@FORM
def test_a_refit_recovers_the_output_of_copies(form):
    expert, _, tokens = refit_problem(form, noise=0.0, count=2000)
    damaged = expert.with_output(torch.zeros_like(expert.output))
    result = refit_output(damaged, *tokens, ridges=(1e-9,))
    torch.testing.assert_close(result.output, expert.output, rtol=1e-2, atol=1e-2)
    assert refit_output(expert, *tokens).error_after == pytest.approx(0, abs=1e-10)


@FORM
def test_a_repair_restores_spread_and_where_there_is_a_bias_the_mean(form):
    members, weights, x = [random_expert(form, seed) for seed in range(3)], (0.2, 0.3, 0.5), random_inputs(500)
    merged = members[0].like([sum(ts) / 3 for ts in zip(*(m.tensors for m in members), strict=True)])
    repaired, _ = repair(merged, members, weights, x)
    seen = [[z.double() for z in expert.pre_activations(x)] for expert in (repaired, *members)]
    for i, role in enumerate(merged.matrices):
        goal = sum(w * z[i].std(0, correction=0) for w, z in zip(weights, seen[1:], strict=True))
        torch.testing.assert_close(seen[0][i].std(0, correction=0), goal, rtol=1e-4, atol=1e-5)
        if f"{role}_bias" in merged.inputs:
            mean = sum(w * z[i].mean(0) for w, z in zip(weights, seen[1:], strict=True))
            torch.testing.assert_close(seen[0][i].mean(0), mean, rtol=1e-4, atol=1e-4)
