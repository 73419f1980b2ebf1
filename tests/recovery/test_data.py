"""Training and validation records, and the batches of every step."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import random_records, write_records

from msmoe.calibration.records import TokenRecord
from msmoe.checkpoint import Checkpoint
from msmoe.errors import UserError
from msmoe.recovery.data import BatchOrder, load_split, num_targets
from msmoe.recovery.options import RecoverOptions


def key(record) -> tuple:
    inputs, labels = (record["input_ids"], record["labels"]) if isinstance(record, dict) else vars(record).values()
    return tuple(inputs), tuple(labels)


@pytest.fixture
def split(teacher, tmp_path):
    """Split records; gives the keys of both sides, in their order."""

    def run(records, *, validation=None, **options) -> tuple[list, list]:
        data = write_records(tmp_path / "train.jsonl", records)
        held_out = None if validation is None else write_records(tmp_path / "validation.jsonl", validation)
        sides = load_split(Checkpoint(teacher), data, held_out, RecoverOptions(steps=1, **options))
        return tuple([key(r) for r in side] for side in sides)

    return run


RECORDS = random_records(400, seed=8)


def test_every_record_is_on_exactly_one_side(split):
    train, held_out = split(RECORDS, validation_share=0.25)
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(map(key, RECORDS))


def test_validation_takes_about_its_share(split):
    # 400 draws with probability 1/4: 100 on average, standard deviation sqrt(400 * 3/16) = 8.7
    _, held_out = split(RECORDS, validation_share=0.25)
    assert 70 < len(held_out) < 130


def test_the_split_does_not_depend_on_the_order_in_the_file(split):
    shuffled = random.Random(1).sample(RECORDS, len(RECORDS))
    assert set(split(shuffled)[1]) == set(split(RECORDS)[1])


def test_a_record_stays_on_its_side_when_others_are_added(split):
    few, many = split(RECORDS[:200])[1], split(RECORDS)[1]
    assert set(few) == set(many) & {key(r) for r in RECORDS[:200]}


def test_another_seed_gives_another_split(split):
    first, second, again = (set(split(RECORDS, seed=seed)[1]) for seed in (0, 1, 0))
    assert first == again
    assert first != second


def test_equal_records_stand_on_the_same_side(split):
    train, held_out = split(RECORDS[:40] * 3 + RECORDS[40:80], validation_share=0.3)
    assert not set(train) & set(held_out)
    assert len(held_out) > len(set(held_out))  # some of the repeated ones are held out, all three times
    assert all(held_out.count(k) == 3 for k in set(held_out) & set(map(key, RECORDS[:40])))


def test_the_smallest_share_still_holds_out_one_record(split):
    train, held_out = split(RECORDS[:10], validation_share=1e-9)
    assert (len(train), len(held_out)) == (9, 1)


def test_a_single_record_cannot_be_split(split):
    with pytest.raises(UserError, match=r"train\.jsonl leaves no record to train on beside 3 for validation"):
        split(RECORDS[:1] * 3)


def test_records_of_the_validation_file_are_removed_from_training(split):
    train, held_out = split(RECORDS[:20], validation=RECORDS[15:30])
    assert sorted(train) == sorted(map(key, RECORDS[:15]))
    assert sorted(held_out) == sorted(map(key, RECORDS[15:30]))


def test_a_record_padded_in_one_file_is_the_record_of_the_other(split):
    padded = [{"input_ids": r["input_ids"] + [0, 0], "labels": r["labels"] + [-100]} for r in RECORDS[15:20]]
    train, _ = split(RECORDS[:20], validation=padded)
    assert sorted(train) == sorted(map(key, RECORDS[:15]))


def test_a_validation_file_that_holds_all_of_the_data_leaves_nothing_to_train_on(split):
    with pytest.raises(UserError, match=r"train\.jsonl leaves no record to train on beside 20 for validation"):
        split(RECORDS[:20], validation=RECORDS[:20])


def test_number_of_targets_ignores_padding_wherever_it_stands():
    records = [TokenRecord([5], [4, -100, 6, 0]), TokenRecord([5, 6], [7, -100]), TokenRecord([5], [-100, 8])]
    assert num_targets(records) == 3 + 1 + 1


def token_records(count: int, seed: int = 0) -> list[TokenRecord]:
    return [TokenRecord(r["input_ids"], r["labels"]) for r in random_records(count, seed=seed, longest=40)]


def epoch_of(order: BatchOrder, epoch: int) -> list[list[int]]:
    first = epoch * order.steps_per_epoch
    return [order.batch(step) for step in range(first, first + order.steps_per_epoch)]


@given(st.integers(1, 90), st.integers(1, 9), st.integers(0, 10**6), st.integers(0, 3))
def test_every_epoch_sees_each_record_exactly_once(count, size, seed, epoch):
    batches = epoch_of(BatchOrder(token_records(count), size, seed=seed), epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(count))
    assert all(1 <= len(batch) <= size for batch in batches)


def test_the_order_follows_from_the_seed():
    records = token_records(60)
    first, again, other = (epoch_of(BatchOrder(records, 8, seed=seed), 0) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_every_epoch_has_an_order_of_its_own():
    order = BatchOrder(token_records(60), 8, seed=0)
    assert epoch_of(order, 0) != epoch_of(order, 1)


def test_a_step_has_the_same_batch_whatever_was_asked_before():
    records = token_records(60)
    order, fresh = BatchOrder(records, 8, seed=0), BatchOrder(records, 8, seed=0)
    walked = [order.batch(step) for step in range(25)]
    assert fresh.batch(19) == walked[19]
    assert [fresh.batch(step) for step in (3, 24, 11)] == [walked[step] for step in (3, 24, 11)]


def test_batches_hold_records_of_similar_length():
    records = token_records(400)
    lengths = np.array([len(r.input_ids) + len(r.labels) for r in records])
    padding = lambda batches: sum(max(lengths[b]) * len(b) - sum(lengths[b]) for b in batches)
    shuffled = np.random.default_rng(0).permutation(400).reshape(-1, 8)
    assert padding(epoch_of(BatchOrder(records, 8, seed=0), 0)) < padding(shuffled) / 4
