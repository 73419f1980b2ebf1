"""NAEE: subsets by brute force over real outputs, and the beam against the optimum."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from tiny import LAYERS, load_tensors

from msmoe.layer.expert import Expert, switch_expert
from msmoe.layer.routing import SoftmaxTop1
from msmoe.planning.outputs import layer_outputs
from msmoe.planning.subset import BEAM_WIDTH, SubsetErrors, best_subset

E, T, D, F = 6, 80, 5, 7
LAYER = LAYERS[0]


def make_errors(seed: int = 0, num_experts: int = E) -> tuple[SubsetErrors, torch.Tensor, torch.Tensor, list[Expert]]:
    """A random layer: what the errors follow from, its inputs, router rows and experts."""
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    x, rows = randn(T, D), randn(num_experts, D)
    experts = [switch_expert(randn(F, D), randn(D, F)) for _ in range(num_experts)]
    outputs = torch.stack([e(x) for e in experts], dim=1)
    gate, chosen = (x @ rows.T).softmax(-1).max(-1)
    y = gate[:, None] * outputs[torch.arange(T), chosen]
    weights = torch.arange(1, T + 1, dtype=torch.float64)
    arrays = (x @ rows.T, torch.einsum("ted,td->te", outputs, y), outputs.square().sum(-1), y.square().sum(-1), weights)
    return SubsetErrors(*(a.numpy() for a in arrays)), x, rows, experts


def error_by_hand(subset, x, rows, experts, weights) -> float:
    """Run the layer with every other row at minus infinity, one token at a time."""
    total = 0.0
    for token, weight in zip(x, weights, strict=True):
        logits = rows @ token
        e = int(logits.argmax())
        before = logits.softmax(0)[e] * experts[e](token[None])[0]
        masked = torch.full_like(logits, -math.inf)
        masked[list(subset)] = logits[list(subset)]
        kept = int(masked.argmax())
        after = masked.softmax(0)[kept] * experts[kept](token[None])[0]
        total += float(weight * (before - after).square().sum())
    return total


def test_the_error_of_a_subset_is_that_of_the_masked_layer():
    errors, x, rows, experts = make_errors()
    for subset in [(0,), (1, 4), (0, 2, 3, 5), tuple(range(E))]:
        by_hand = error_by_hand(subset, x, rows, experts, errors.weights)
        assert errors(np.array([subset]))[0] == pytest.approx(by_hand, rel=1e-9, abs=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1000.0], ids=["equal logits", "logits", "logits of hundreds"])
def test_the_errors_without_one_expert_are_those_of_the_smaller_subsets(scale):
    errors = make_errors(5)[0]
    errors = dataclasses.replace(errors, logits=scale * errors.logits)
    for subset in [(0, 3), (1, 2, 4), tuple(range(E))]:
        smaller = np.array([subset[:i] + subset[i + 1 :] for i in range(len(subset))])
        np.testing.assert_allclose(errors.without_one(subset), errors(smaller), rtol=1e-12)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_the_exhaustive_search_finds_the_best_of_all_subsets(count):
    errors, x, rows, experts = make_errors(1)
    found = best_subset(errors, count)
    by_hand = {s: error_by_hand(s, x, rows, experts, errors.weights) for s in itertools.combinations(range(E), count)}
    assert found.experts == min(by_hand, key=lambda s: by_hand[s])
    assert found.search == f"exhaustive, {math.comb(E, count)} subsets"
    assert found.error == pytest.approx(min(by_hand.values()) / float(errors.weights @ errors.target))


def test_keeping_every_expert_costs_nothing():
    found = best_subset(make_errors()[0], E)
    assert found.experts == tuple(range(E))
    assert found.error == pytest.approx(0, abs=1e-9)


def test_more_experts_never_cost_more():
    errors = make_errors(2)[0]
    found = [best_subset(errors, count).error for count in range(1, E + 1)]
    assert found == sorted(found, reverse=True)


def test_the_beam_says_so_and_comes_close_to_the_optimum():
    errors = make_errors(3, num_experts=12)[0]
    beam, optimum = best_subset(errors, 5, max_subsets=10), best_subset(errors, 5)
    assert beam.search.startswith(f"beam of {BEAM_WIDTH}")
    assert optimum.error * (1 - 1e-12) <= beam.error <= 1.1 * optimum.error


def test_the_beam_is_exact_where_one_expert_goes():
    errors = make_errors(4)[0]
    assert best_subset(errors, E - 1, max_subsets=1).experts == best_subset(errors, E - 1).experts


@pytest.mark.parametrize("max_subsets", [100, 1], ids=["exhaustive", "beam"])
def test_equal_subsets_go_to_the_lower_indices(max_subsets):
    errors = make_errors()[0]
    same = SubsetErrors(np.zeros((T, E)), np.ones((T, E)), np.ones((T, E)), np.ones(T), np.ones(T))
    assert best_subset(same, 2, max_subsets=max_subsets).experts == (0, 1)
    assert len(errors(np.array(list(itertools.combinations(range(E), 2))))) == 15


def test_the_layers_own_numbers_are_those_of_its_experts(switch, stats):
    tensors, layer = load_tensors(switch), stats.layers[LAYER]
    part = lambda e, name: tensors[f"{LAYER}.experts.expert_{e}.{name}.weight"]
    experts = [switch_expert(part(e, "wi"), part(e, "wo")) for e in range(6)]
    rows = tensors[f"{LAYER}.router.classifier.weight"]
    out = layer_outputs(layer, SoftmaxTop1(rows), lambda e: experts[e])
    sample = layer.tokens()
    y = torch.stack(
        [
            g * experts[e](x[None])[0]
            for x, e, g in zip(sample.inputs, sample.expert[:, 0], sample.gate[:, 0], strict=True)
        ]
    )
    for e, expert in enumerate(experts):
        f = expert(sample.inputs)
        torch.testing.assert_close(out.inner[:, e], (f * y).sum(1).double(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out.mean[e], f.double().mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out.square[:, e], f.square().sum(1).double(), rtol=1e-4, atol=1e-5)
        for other in range(6):
            cosine = torch.nn.functional.cosine_similarity(f, experts[other](sample.inputs), dim=1).mean()
            assert float(out.token_cosine[e, other]) == pytest.approx(float(cosine), abs=1e-5)
    torch.testing.assert_close(out.target, y.square().sum(1).double(), rtol=1e-4, atol=1e-6)
