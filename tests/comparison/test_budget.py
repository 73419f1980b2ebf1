"""Every method within one budget of stored bytes."""

import pytest
from tiny import LAYERS, size_of

from msmoe.comparison.budget import budget_bytes, experts_within, largest_within
from msmoe.compression.apply import apply
from msmoe.errors import UserError
from msmoe.planning.methods import METHODS
from msmoe.planning.planner import Planner

NUM_LAYERS = len(LAYERS) - 1  # the first is kept


@pytest.fixture(scope="module")
def planner(switch, full_stats):
    return Planner(switch, full_stats)


@pytest.mark.parametrize("method", [m for m in METHODS if not METHODS[m].fixed])
@pytest.mark.parametrize("experts", [4, 2])
def test_a_method_stores_as_much_as_the_budget_holds(method, experts, planner, switch, full_stats, tmp_path):
    budget = budget_bytes(planner, experts, keep_layers=None)
    kept = experts_within(planner, method, budget, keep_layers=None, size=experts)
    apply(switch, planner.plan(method, experts=kept), tmp_path / "out", stats=full_stats)
    assert size_of(tmp_path / "out") <= budget
    if kept < 6:  # one expert more would exceed it
        assert planner.predicted_bytes(method, experts=kept + 1 / NUM_LAYERS) > budget


def test_a_method_that_stores_more_for_each_expert_keeps_fewer(planner):
    budget = budget_bytes(planner, 3, keep_layers=None)
    kept = lambda method: experts_within(planner, method, budget, keep_layers=None, size=3)
    assert kept("m-smoe") == 3
    assert kept("mone") == 3 - 1 / NUM_LAYERS  # mean outputs take the place of one expert


def test_a_method_that_stores_less_for_each_expert_keeps_more(planner):
    budget = budget_bytes(planner, 3, keep_layers=None)
    assert experts_within(planner, "mc-smoe", budget, keep_layers=None, size=3, rank=2, keep_rows=0.0) > 3


def test_references_have_their_own_number(planner):
    assert experts_within(planner, "full", 0, keep_layers=None, size=3) is None


def test_a_size_out_of_reach_is_refused_with_the_sizes_that_are_not(planner):
    budget = budget_bytes(planner, 1, keep_layers=None)
    with pytest.raises(UserError, match=r"mone cannot reach the size of 1 per layer.*Ask for --experts 2 to 6"):
        experts_within(planner, "mone", budget, keep_layers=None, size=1)


@pytest.mark.parametrize(("budget", "expected"), [(30, 3), (39, 3), (40, 4), (1000, 7), (10, 1)])
def test_the_largest_within_is_found_by_halving(budget, expected):
    assert largest_within(lambda total: 10 * total, range(1, 8), budget) == expected


@pytest.mark.parametrize("method", METHODS)
def test_the_size_from_counts_alone_is_that_of_the_plan(method, planner):
    asked = {} if METHODS[method].fixed else {"experts": 2.5}
    assert planner.predicted_bytes(method, **asked) == planner.plan(method, **asked).predicted["bytes"]
