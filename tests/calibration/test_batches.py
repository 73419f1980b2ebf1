"""Batches of records of similar length."""

from msmoe.calibration.batches import batch_indices
from msmoe.calibration.spans import TokenRecord


def test_a_long_record_makes_its_batch_smaller_and_no_other():
    records = [TokenRecord([1] * n, [1]) for n in [3000, *[20] * 70]]
    batches = list(batch_indices(records, 64))
    assert [len(batch) for batch in batches] == [1, 64, 6]
    assert sorted(i for batch in batches for i in batch) == list(range(71))
