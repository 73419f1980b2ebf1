"""Groups and layers whose tokens go to two experts each: members that share a token add up."""

import itertools

import numpy as np
import pytest
import torch
from gated import SoftmaxTopK, assert_same_weights, layer_stats, near, random_expert, random_order

from msmoe.compression.group import group_tokens, routed_inputs
from msmoe.compression.layer_errors import compare_layers
from msmoe.layer.layer import Layer
from msmoe.layer.routing import Routing
from msmoe.merge import RULES, merge_group
from msmoe.merge.layer_refit import LayerRefit, LayerTokens
from msmoe.planning.outputs import layer_outputs
from msmoe.planning.plan import Group
from msmoe.planning.progressive import live_usage, router_routes
from msmoe.planning.similarity import BASES, LayerView, similarity
from msmoe.planning.subset import RoutedSubsetErrors, best_subset

E, D = 5, 7
ROUTER = SoftmaxTopK(torch.randn(E, D, generator=torch.Generator().manual_seed(4)))
GROUPS = (Group(0, (0, 2, 3), (0.5, 0.3, 0.2)), Group(1, (1, 4), (0.5, 0.5)))
PLACES = torch.tensor([0, 1, 0, 0, 1])
FORMS = pytest.mark.parametrize("form", ["swiglu", "gpt-oss"])
HOW = {"tokens": 1000, "every": True, "stable_ranks": False, "seen": False}


def layer_of(experts, targets=None) -> Layer:
    targets = torch.arange(E) if targets is None else targets
    return Layer(ROUTER, targets, len(experts), experts.__getitem__, torch.zeros(0, D))


def merged_layer(experts, stats, *, refit: bool = False) -> Layer:
    merged = [
        merge_group(group.members, group.weights, experts.__getitem__, reference=group.dominant).expert
        for group in GROUPS
    ]
    if refit:
        sample = stats.tokens()
        routing = Routing(PLACES[sample.expert], sample.gate)
        targets, weights = naive_outputs(experts, stats), sample.weights(stats.dispatched)
        tokens = LayerTokens(sample.inputs, routing, targets, weights, sample.held_out)
        solved = LayerRefit(merged.__getitem__, len(GROUPS), tokens).groups()
        merged = [merged[g].with_output(result.output) for g, result in solved]
    return layer_of(merged, PLACES)


def naive_outputs(experts, stats) -> torch.Tensor:
    """One token and one choice at a time."""
    sample = stats.tokens()
    outputs = torch.zeros(len(sample), D)
    for t, (x, chosen, gates) in enumerate(zip(sample.inputs, sample.expert, sample.gate, strict=True)):
        for e, gate in zip(chosen.tolist(), gates, strict=True):
            outputs[t] += gate * experts[e](x[None])[0]
    return outputs


@FORMS
def test_a_layer_gives_the_sum_of_its_weighted_experts(form):
    experts, stats = [random_expert(form, seed) for seed in range(E)], layer_stats(ROUTER)
    layer, sample = layer_of(experts), stats.tokens()
    outputs = layer.run(sample.inputs, layer.route(sample, layer))
    torch.testing.assert_close(outputs, naive_outputs(experts, stats), rtol=1e-4, atol=1e-4)


def test_choices_that_lead_to_one_expert_or_to_constants_add_their_weights():
    expert, x = random_expert("swiglu"), torch.ones(2, D)
    layer = Layer(ROUTER, torch.zeros(E).long(), 1, lambda _: expert, torch.tensor([[1.0] * D, [10.0] * D]))
    outputs = layer.run(x, Routing(torch.tensor([[0, 0], [2, 1]]), torch.tensor([[0.5, 0.25], [0.5, 2.0]])))
    torch.testing.assert_close(outputs[0], 0.75 * expert(x[:1])[0])
    assert outputs[1].tolist() == [7.0] * D  # 0.5 * 10 + 2 * 1


@FORMS
def test_merged_permuted_copies_leave_no_error_though_members_share_tokens(form):
    expert, stats = random_expert(form), layer_stats(ROUTER)
    experts = [expert.permuted(random_order(seed)) for seed in range(E)]
    assert any(len({int(PLACES[e]) for e in chosen}) == 1 for chosen in stats.tokens().expert.tolist())
    found = compare_layers(layer_of(experts), merged_layer(experts, stats), PLACES, stats, **HOW)
    assert found.error < 1e-9
    assert found.rerouted == 0


@FORMS
def test_a_refit_of_the_groups_lowers_the_layers_error(form):
    experts, stats = [near(random_expert(form), seed, 0.3) for seed in range(E)], layer_stats(ROUTER, count=1500)
    errors = [
        compare_layers(layer_of(experts), merged_layer(experts, stats, refit=refit), PLACES, stats, **HOW).error
        for refit in (False, True)
    ]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if not rule.needs_gradients])
def test_every_rule_reads_the_tokens_of_its_group(rule):
    expert, stats = random_expert("swiglu"), layer_stats(ROUTER)
    tokens = group_tokens(GROUPS[0], stats)
    assert len(tokens.inputs) == len(routed_inputs(stats, GROUPS[0].members))
    assert tokens.routed.sum() == sum(int(stats.routed[e]) for e in GROUPS[0].members)
    merged, _ = RULES[rule].apply([expert] * 3, GROUPS[0].weights, tokens)
    assert_same_weights(merged, expert, rtol=1e-3, atol=1e-3)


def test_another_router_is_seen_to_send_tokens_elsewhere():
    experts, stats = [random_expert("swiglu", seed) for seed in range(E)], layer_stats(ROUTER)
    moved = Layer(SoftmaxTopK(ROUTER.rows.flip(0)), torch.arange(E), E, experts.__getitem__, torch.zeros(0, D))
    found = compare_layers(layer_of(experts), moved, torch.arange(E), stats, **HOW)
    assert found.rerouted > 0.5
    same = Layer(SoftmaxTopK(ROUTER.rows.flip(0)), torch.arange(E).flip(0), E, experts.__getitem__, torch.zeros(0, D))
    found = compare_layers(layer_of(experts), same, torch.arange(E), stats, **HOW)
    assert found.rerouted == 0
    assert found.error < 1e-9


@pytest.mark.parametrize("base", [base for base in BASES if "gradient" not in base and not base.startswith("feature.")])
def test_every_basis_compares_gated_experts_of_two_choices(base):
    experts, stats = [random_expert("swiglu", seed) for seed in range(E)], layer_stats(ROUTER)
    result = similarity(LayerView(stats, ROUTER, experts.__getitem__), base=base)
    assert torch.equal(result, result.T)
    assert ((result >= 0) & (result <= 1)).all()


def test_the_error_of_a_subset_is_that_of_the_layer_with_the_others_masked():
    experts, stats = [random_expert("swiglu", seed) for seed in range(E)], layer_stats(ROUTER, count=200)
    out = layer_outputs(stats, ROUTER, experts.__getitem__)
    errors = RoutedSubsetErrors(ROUTER, out.routed_on, out.inner, out.products, out.target, out.weights.numpy())
    sample, wanted, naive = stats.tokens(), naive_outputs(experts, stats), {}
    for subset in itertools.combinations(range(E), 3):
        layer = Layer(ROUTER.keeping(subset), torch.tensor(subset), E, experts.__getitem__, torch.zeros(0, D))
        given = layer.run(sample.inputs, layer.route(sample, layer_of(experts)))
        naive[subset] = float((given - wanted).double().square().sum())
    found = errors(np.array(list(naive)))
    np.testing.assert_allclose(found, list(naive.values()), rtol=1e-3)
    assert best_subset(errors, 3).experts == min(naive, key=naive.__getitem__)


def test_tokens_of_masked_experts_count_for_those_that_take_them():
    stats = layer_stats(ROUTER)
    sample, live = stats.tokens(), np.array([True, False, True, True, False])
    usage = live_usage(router_routes(ROUTER, sample.inputs), np.arange(len(sample)), np.ones(len(sample)), live)
    chosen = torch.tensor([0, 2, 3])[ROUTER.keeping([0, 2, 3])(sample.inputs).experts]
    counts = torch.bincount(chosen.flatten(), minlength=E).double()
    np.testing.assert_allclose(usage, (counts / counts.sum()).numpy())
