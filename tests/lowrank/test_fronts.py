"""Factorising experts of every form as the pair of their joined input matrices and their output."""

import pytest
import torch
from gated import FORMS, near, random_expert, random_inputs

from msmoe.lowrank.factors import Factors
from msmoe.lowrank.layer import ExpertTokens, Seen, decompose_experts, factorize_experts, look, output_sensitivity
from msmoe.lowrank.options import FactorOptions
from msmoe.lowrank.shapes import FactorShape

F, D = 12, 7
FORM = pytest.mark.parametrize("form", FORMS)
NAMES = {"front": torch.float32, "output": torch.float32}


def problem(form: str) -> tuple[list, list[Seen]]:
    experts = [near(random_expert(form), seed, 0.5) for seed in range(3)]
    generator = torch.Generator().manual_seed(1)
    tokens = [
        ExpertTokens(random_inputs(80, seed=i), torch.rand(80, generator=generator), torch.ones(80).double(),
                     torch.arange(80) % 2 == 0)
        for i in range(3)
    ]  # fmt: skip
    return experts, look(experts, tokens)


def factorized(form: str, rank: int, **options):
    experts, seen = problem(form)
    parts = dict(zip(NAMES, decompose_experts(experts, seen, svd="activation"), strict=True))
    shapes = {name: FactorShape(min(rank, *parts[name].left.shape[1:]), 0) for name in NAMES}
    settings = FactorOptions(rank=rank, **options).resolve(has_stats=True)
    return experts, seen, factorize_experts(experts, seen, parts, shapes, settings, NAMES)


@FORM
def test_full_rank_is_the_expert_itself_its_biases_untouched(form):
    experts, seen, done = factorized(form, D, refit=False)
    for expert, (tokens, _), (stored, after, _) in zip(experts, seen, done, strict=True):
        assert all(isinstance(part, Factors) for part in stored.values())
        torch.testing.assert_close(after(tokens.inputs), expert(tokens.inputs), rtol=1e-3, atol=1e-3)
        for role, weight in expert.weights.items():
            if weight.ndim == 1:
                assert torch.equal(after.weights[role], weight)


@FORM
def test_more_rank_and_a_refit_leave_less_error(form):
    def error(rank: int, **options) -> float:
        experts, seen, done = factorized(form, rank, **options)
        return sum(
            float((after(t.inputs) - e(t.inputs)).square().sum())
            for e, (t, _), (_, after, _) in zip(experts, seen, done, strict=True)
        )

    errors = [error(rank, refit=False) for rank in (1, 3, 5)]
    assert errors == sorted(errors, reverse=True)
    assert error(3, refit=True) <= errors[1]


@FORM
def test_the_sensitivity_is_how_far_an_error_of_a_pre_activation_moves_the_output(form):
    expert, x = random_expert(form, dtype=torch.float64), random_inputs(60, dtype=torch.float64)
    scale = torch.rand(60, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = output_sensitivity(expert, x, scale)
    z, step, expected = expert.pre_activations(x), 1e-6, []
    for i in range(len(z)):
        for neuron in range(F):
            moved = [t.clone() for t in z]
            moved[i][:, neuron] += step
            change = expert.activation.function(*moved) - expert.activation.function(*z)
            difference = change @ expert.output.T / step * scale
            expected.append((difference.square().sum() / scale.square().sum()).sqrt())
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-3, atol=1e-3)
