"""Experts of every form: what they compute, and the symmetries that leave it unchanged."""

import pytest
import torch
from gated import FORMS, assert_same_weights, random_expert, random_inputs, random_order

from msmoe.families import MoELayer
from msmoe.layer.expert import Expert

FORM = pytest.mark.parametrize("form", FORMS)


def test_a_hand_worked_gated_expert():
    gate, up = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    activation = FORMS["swiglu"][2]
    expert = Expert(
        {"gate": gate, "gate_bias": torch.tensor([1.0]), "up": up}, torch.tensor([[3.0]]), torch.ones(1), activation
    )
    # gate 1 - 1 + 1 = 1... at x = (-1, 5): gate = -1 + 1 = 0, silu(0) = 0; at (0, 5): silu(1) * 10 * 3 + 1
    found = expert(torch.tensor([[-1.0, 5.0], [0.0, 5.0]]))
    assert found[0].item() == 1.0
    assert found[1].item() == pytest.approx(30 * 0.7310586 + 1)


@FORM
def test_a_permutation_of_the_neurons_leaves_the_function_unchanged(form):
    expert, x = random_expert(form, dtype=torch.float64), random_inputs(dtype=torch.float64)
    torch.testing.assert_close(expert.permuted(random_order(1))(x), expert(x), rtol=1e-12, atol=1e-12)


@FORM
def test_the_front_is_split_into_the_matrices_that_it_was_joined_from(form):
    expert = random_expert(form)
    assert_same_weights(random_expert(form).with_front(expert.front), expert, rtol=0, atol=0)
    zeroed = expert.with_front(torch.zeros_like(expert.front))
    assert all((weight == 0).all() for weight in zeroed.matrices.values())
    assert torch.equal(zeroed.output, expert.output)


@FORM
def test_a_change_of_every_weight_keeps_form_and_biases(form):
    expert = random_expert(form)
    assert_same_weights(expert.map(lambda t: 2 * t).map(lambda t: t / 2), expert, rtol=0, atol=0)
    doubled = expert.like([2 * t for t in expert.tensors])
    assert_same_weights(doubled, expert.map(lambda t: t + t), rtol=0, atol=0)


@FORM
def test_slopes_are_those_of_finite_differences(form):
    expert, x = random_expert(form, dtype=torch.float64), random_inputs(40, dtype=torch.float64)
    z = expert.pre_activations(x)
    slopes = expert.activation.pull_back(z, torch.ones_like(z[0]))
    for i, slope in enumerate(slopes):
        up, down = ([t + (step if j == i else 0) for j, t in enumerate(z)] for step in (1e-6, -1e-6))
        difference = (expert.activation.function(*up) - expert.activation.function(*down)) / 2e-6
        torch.testing.assert_close(slope, difference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("roles", "names", "front"),
    [
        (("wi", "output"), ("wi", "wo"), (24, 16)),
        (("gate", "gate_bias", "up", "up_bias", "output", "output_bias"), ("gate_up_proj", "down_proj"), (48, 16)),
        (("up", "output"), ("up_proj", "down_proj"), (24, 16)),
    ],
)
def test_a_layer_names_and_measures_the_two_matrices_of_an_expert(roles, names, front):
    dtypes = {role: "F32" if role.startswith("output") else "BF16" for role in roles}
    layer = MoELayer("a", 4, 16, 24, dtypes, roles)
    assert tuple(layer.matrices) == names
    assert [layer.shape(name) for name in names] == [front, (16, 24)]
    assert [layer.itemsize(name) for name in names] == [2, 4]
