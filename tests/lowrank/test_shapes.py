"""Sizes of factors, counted by hand."""

from hypothesis import given
from hypothesis import strategies as st

from msmoe.lowrank.shapes import FactorShape, largest_rank


def test_the_published_shape_of_switch_base_is_counted_as_published():
    wi, wo = FactorShape(32, 307), FactorShape(32, 77)
    assert wi.num_values(3072, 768) == 122_880 + 235_776  # 32 (3072 + 768), 307 rows of 768
    assert wo.num_values(768, 3072) == 122_880 + 236_544  # 32 (768 + 3072), 77 rows of 3072


def test_bytes_hold_an_index_of_four_bytes_per_kept_row():
    assert FactorShape(2, 3).num_bytes(10, 5, 4) == 4 * (2 * 15 + 3 * 5) + 3 * 4
    assert FactorShape(2, 3).num_bytes(10, 5, 2) == 2 * (2 * 15 + 3 * 5) + 3 * 4
    assert FactorShape(1, 0).num_bytes(10, 5, 4) == 60


def test_factors_as_large_as_the_matrix_do_not_save():
    # 4 x 4: rank 2 takes 2 (4 + 4) = 16 values, as many as the matrix
    assert FactorShape(1, 1).saves(4, 4, 4)  # 12 values and an index against 16 values
    assert not FactorShape(2, 0).saves(4, 4, 4)
    assert not FactorShape(1, 2).saves(4, 4, 4)


def test_row_indices_can_tip_the_balance_in_half_precision():
    # 8 x 9, rank 1, six rows: 17 + 54 = 71 values against 72, but six indices of four bytes
    assert FactorShape(1, 6).num_values(8, 9) < 72
    assert not FactorShape(1, 6).saves(8, 9, 2)


@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from([2, 4]))
def test_the_largest_rank_saves_and_the_next_one_does_not(num_outputs, num_inputs, itemsize):
    saving = [r for r in range(1, 61) if r * (num_outputs + num_inputs) < num_outputs * num_inputs]
    assert largest_rank(num_outputs, num_inputs, itemsize) == max(saving, default=0)


def test_a_vector_is_never_factorised():
    assert largest_rank(1, 500, 4) == largest_rank(500, 1, 4) == 0
