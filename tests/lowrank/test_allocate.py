"""Budgets against brute force over every combination of options."""

from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msmoe.lowrank.allocate import Option, allocate, curve, lower_hull
from msmoe.lowrank.decompose import decompose
from msmoe.lowrank.factors import truncate
from msmoe.lowrank.shapes import FactorShape, largest_rank


def options(*pairs: tuple[int, float]) -> list[Option]:
    return [Option(None, num_bytes, error) for num_bytes, error in pairs]


def size_of(chosen: list[Option]) -> int:
    return sum(option.num_bytes for option in chosen)


def error_of(chosen: list[Option]) -> float:
    return sum(option.error for option in chosen)


def best_by_brute_force(curves: list[list[Option]], budget: int) -> float:
    return min(error_of(chosen) for chosen in product(*curves) if size_of(chosen) <= budget)


def budgets_of_prices(curves: list[list[Option]]) -> list[int]:
    """The budgets that some price of a byte spends in full: there the best allocation is known to be exact."""
    slopes = {
        (a.error - b.error) / (b.num_bytes - a.num_bytes)
        for one in curves
        for a, b in product(one, one)
        if b.num_bytes > a.num_bytes and a.error > b.error
    }
    prices = sorted(slopes)
    between = [(a + b) / 2 for a, b in pairwise(prices)] + [0.0, *(p * 1.5 for p in prices[-1:])]
    cheapest = lambda one, price: min(one, key=lambda o: (o.error + price * o.num_bytes, o.num_bytes))
    return sorted({sum(cheapest(one, price).num_bytes for one in curves) for price in between})


CURVE = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 60)), min_size=1, max_size=6).map(lambda p: options(*p))
CURVES = st.lists(CURVE, min_size=1, max_size=4)


@settings(max_examples=100)
@given(CURVES)
def test_at_every_corner_of_the_hulls_the_allocation_is_the_best_there_is(curves):
    for budget in budgets_of_prices(curves):
        assert error_of(allocate(curves, budget)) == best_by_brute_force(curves, budget)


@settings(max_examples=100)
@given(CURVES, st.integers(0, 100))
def test_the_budget_is_kept_and_used_at_least_as_well_as_the_corner_below_it(curves, extra):
    smallest = sum(min(o.num_bytes for o in one) for one in curves)
    chosen = allocate(curves, smallest + extra)
    corners = [budget for budget in budgets_of_prices(curves) if budget <= smallest + extra]
    assert size_of(chosen) <= smallest + extra
    assert error_of(chosen) <= best_by_brute_force(curves, max(corners, default=smallest))
    assert all(option in one for option, one in zip(chosen, curves, strict=True))


@settings(max_examples=100)
@given(CURVES, st.integers(0, 100))
def test_no_single_exchange_within_the_budget_is_left_undone(curves, extra):
    budget = sum(min(o.num_bytes for o in one) for one in curves) + extra
    chosen = allocate(curves, budget)
    for i, one in enumerate(curves):
        for option in one:
            exchanged = [*chosen[:i], option, *chosen[i + 1 :]]
            assert size_of(exchanged) > budget or error_of(exchanged) >= error_of(chosen)


def test_the_steepest_steps_are_bought_first():
    # first curve: 10 bytes for 50 of error, then 10 for 10; second curve: 10 bytes for 30
    curves = [options((0, 60), (10, 10), (20, 0)), options((0, 30), (10, 0))]
    assert [o.num_bytes for o in allocate(curves, 10)] == [10, 0]
    assert [o.num_bytes for o in allocate(curves, 20)] == [10, 10]
    assert [o.num_bytes for o in allocate(curves, 30)] == [20, 10]


def test_what_is_left_is_spent_off_the_hull():
    # the hull goes from 0 to 100 bytes at a stretch; 90 bytes buy a point above it
    assert allocate([options((0, 500), (90, 100), (100, 0))], 95) == options((90, 100))


def test_a_dominated_option_is_never_chosen():
    curves = [options((5, 20), (10, 40), (12, 19), (15, 20))]
    assert {allocate(curves, budget)[0].num_bytes for budget in range(5, 20)} == {5, 12}


@given(CURVES, st.integers(1, 30))
def test_a_budget_below_the_smallest_allocation_is_refused_with_its_size(curves, missing):
    smallest = sum(min(o.num_bytes for o in one) for one in curves)
    with pytest.raises(ValueError, match=f"takes {smallest} bytes, the budget is {smallest - missing}"):
        allocate(curves, smallest - missing)


@settings(max_examples=100)
@given(CURVE)
def test_the_hull_is_convex_and_lies_below_every_option(one):
    hull = lower_hull(one)
    slopes = [(b.error - a.error) / (b.num_bytes - a.num_bytes) for a, b in pairwise(hull)]
    assert all(slope < 0 for slope in slopes)
    assert all(a < b for a, b in pairwise(slopes))
    assert hull[0].num_bytes == min(o.num_bytes for o in one)
    assert hull[-1].error == min(o.error for o in one)
    for option in one:
        for a, b, slope in zip(hull, hull[1:], slopes, strict=False):
            if a.num_bytes <= option.num_bytes <= b.num_bytes:
                assert option.error >= a.error + slope * (option.num_bytes - a.num_bytes) - 1e-9


def test_the_hull_of_an_example_drawn_on_paper():
    # (4, 6) lies above the line from (0, 10) to (6, 2), (8, 2) costs more for nothing
    assert lower_hull(options((8, 2), (0, 10), (10, 0), (4, 6), (6, 2))) == options((0, 10), (6, 2), (10, 0))


@pytest.fixture
def stack():
    """Two matrices (12, 8) and tokens that one of them saw."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 12, 8, generator=generator)
    return weights, [torch.randn(30, 8, generator=generator), torch.zeros(0, 8)]


def test_the_errors_of_a_curve_are_those_of_the_truncated_matrices(stack):
    weights, tokens = stack
    decomposition = decompose(weights, tokens, ridge=1e-9)
    found = curve(decomposition, 8, itemsize=4, max_rank=largest_rank(12, 8, 4))
    assert len(found) > 10
    for shape, _, error in found[1:]:
        left = weights - truncate(weights, decomposition, shape).dense()
        expected = float((tokens[0] @ left[0].T).square().sum() + left[1].square().sum())  # the second saw nothing
        assert error == pytest.approx(expected, rel=1e-3)


def test_the_bytes_of_a_curve_are_those_of_all_experts(stack):
    weights, _ = stack
    dense, *found = curve(decompose(weights), 8, itemsize=2, max_rank=3)
    assert dense == Option(None, 2 * 12 * 8 * 2, 0.0)
    for (rank, num_rows), num_bytes, _ in found:
        assert num_bytes == 2 * (2 * (rank * 20 + num_rows * 8) + 4 * num_rows)
        assert num_bytes < dense.num_bytes


def test_a_curve_offers_every_small_rank_and_rank_one_without_rows(stack):
    weights, _ = stack
    found = curve(decompose(weights), 8, itemsize=4, max_rank=4)
    assert {option.shape.rank for option in found[1:]} == {1, 2, 3, 4}
    assert FactorShape(1, 0) in {option.shape for option in found}


def test_a_matrix_too_small_for_factors_has_one_option():
    assert curve(decompose(torch.ones(3, 1, 6)), 6, itemsize=4, max_rank=0) == [Option(None, 3 * 6 * 4, 0.0)]
