"""The learning rate of every step, which parameters move, and which of them decay."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import save_switch
from trials import QUIET

from msmoe.errors import UserError
from msmoe.families.loading import load
from msmoe.families.switch import SwitchFamily
from msmoe.recovery.options import RecoverOptions
from msmoe.recovery.student import adamw, schedule, trainable_parameters

SWITCH = SwitchFamily()
MARKS = {"experts": ".experts.", "router": ".router.", "all": ""}  # what the name of a parameter that moves holds
OPTIONS = RecoverOptions(steps=1, learning_rate=0.1, weight_decay=0.5)


def test_the_rate_rises_and_falls_by_hand():
    # 10 steps, warm-up int(.35 * 10) = 3: 1/4, 2/4, 3/4, then 7/7 down to 1/7
    expected = [1 / 4, 2 / 4, 3 / 4, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7]
    assert [schedule(step, 10, 0.35) for step in range(10)] == pytest.approx(expected)


def test_without_warm_up_the_first_step_has_the_whole_rate():
    assert [schedule(step, 4, 0.0) for step in range(4)] == [1, 0.75, 0.5, 0.25]


@given(st.integers(1, 500), st.floats(0, 0.999))
def test_every_step_has_a_rate_above_zero_and_one_step_the_whole(steps, warmup):
    rates = [schedule(step, steps, warmup) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    assert rates.count(1) == 1
    assert schedule(steps, steps, warmup) == 0


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    """A Switch checkpoint whose routers have biases."""
    return save_switch(tmp_path_factory.mktemp("biased") / "ckpt", router_bias=True, **QUIET)


CHECKPOINTS = ["teacher", "student", "factorised", "biased"]


@pytest.mark.parametrize("which", CHECKPOINTS)
@pytest.mark.parametrize("train", MARKS)
def test_the_chosen_part_is_trained_and_everything_else_frozen(which, train, request):
    model = load(request.getfixturevalue(which))
    chosen = trainable_parameters(model, SWITCH, train)
    expected = {name for name, _ in model.named_parameters() if MARKS[train] in name}
    assert expected
    assert set(chosen) == {name for name, p in model.named_parameters() if p.requires_grad} == expected


def test_all_of_a_dense_model_can_be_trained(dense):
    model = load(dense)
    assert set(trainable_parameters(model, None, "all")) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("train", ["experts", "router"])
def test_a_dense_model_has_neither_experts_nor_routers(train, dense):
    with pytest.raises(UserError, match=r"the student has no (experts|routers): use --train all"):
        trainable_parameters(load(dense), None, train)


@pytest.mark.parametrize("which", [*CHECKPOINTS, "dense"])
def test_every_parameter_is_optimised_exactly_once(which, request):
    parameters = trainable_parameters(load(request.getfixturevalue(which)), SWITCH, "all")
    optimised = [id(p) for group in adamw(parameters, OPTIONS).param_groups for p in group["params"]]
    assert sorted(optimised) == sorted(id(p) for p in parameters.values())


@pytest.mark.parametrize("which", [*CHECKPOINTS, "dense"])
def test_weights_decay_and_norms_and_biases_do_not(which, request):
    parameters = trainable_parameters(load(request.getfixturevalue(which)), SWITCH, "all")
    before = {name: p.detach().clone() for name, p in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    adamw(parameters, OPTIONS).step()
    for name, parameter in parameters.items():
        # without a gradient AdamW multiplies by 1 - rate * decay = 1 - 0.1 * 0.5
        factor = 1.0 if "layer_norm" in name or name.endswith(".bias") else 0.95
        torch.testing.assert_close(parameter.detach(), factor * before[name], rtol=1e-6, atol=0)


def test_a_choice_without_norms_has_one_group(student):
    groups = adamw(trainable_parameters(load(student), SWITCH, "experts"), OPTIONS).param_groups
    assert [group["weight_decay"] for group in groups] == [0.5]
