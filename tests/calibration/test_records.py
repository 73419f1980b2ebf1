"""Calibration records: what is read, what is refused, and span corruption."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from msmoe.calibration.batches import record_key
from msmoe.calibration.records import DataError, TokenRecord, choose_records, digest_records, read_records
from msmoe.calibration.spans import corrupt_spans, random_partition
from msmoe.calibration.tokenization import tokenize

SENTINELS = list(range(1000, 1100))


@pytest.fixture(scope="module")
def tokenizer():
    words = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{i}>" for i in range(5)), *(f"w{i}" for i in range(50))]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=[f"<extra_id_{i}>" for i in range(5)],
    )  # fmt: skip


def restore(record: TokenRecord, eos: int) -> list[int]:
    """Put the spans of the target back in place of their sentinels."""
    spans: dict[int, list[int]] = {}
    for token in record.labels[:-1]:
        if token in SENTINELS:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    return [t for token in record.input_ids[:-1] for t in spans.get(token, [token])]


@given(st.lists(st.integers(2, 900), min_size=2, max_size=300), st.integers(0, 99))
def test_the_targets_of_span_corruption_fill_the_gaps_of_its_input(token_ids, seed):
    record = corrupt_spans(token_ids, sentinel_ids=SENTINELS, eos_id=1, rng=np.random.default_rng(seed))
    assert restore(record, 1) == token_ids
    assert record.input_ids[-1] == record.labels[-1] == 1


def test_span_corruption_masks_fifteen_percent_in_spans_of_three():
    record = corrupt_spans(list(range(2, 202)), sentinel_ids=SENTINELS, eos_id=1, rng=np.random.default_rng(0))
    num_spans = sum(t in SENTINELS for t in record.labels)
    assert num_spans == 10  # 0.15 * 200 = 30 tokens in spans of 3
    assert len(record.labels) == 30 + 10 + 1  # masked tokens, sentinels, end of sequence


def test_span_corruption_refuses_a_single_token():
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        corrupt_spans([5], sentinel_ids=SENTINELS, eos_id=1, rng=np.random.default_rng(0))


@given(st.integers(1, 40), st.data())
def test_a_random_partition_has_positive_parts_of_the_right_sum(total, draw):
    num_parts = draw.draw(st.integers(1, total))
    parts = random_partition(total, num_parts, np.random.default_rng(0))
    assert len(parts) == num_parts
    assert sum(parts) == total
    assert min(parts) >= 1


def test_text_records_are_corrupted_by_their_own_text_and_the_seed(tokenizer):
    texts = [{"text": " ".join(f"w{(i * k) % 50}" for i in range(200))} for k in (3, 7)]
    forward, backward = tokenize(texts, tokenizer, seed=4), tokenize(texts[::-1], tokenizer, seed=4)
    assert forward == backward[::-1]
    assert forward != tokenize(texts, tokenizer, seed=5)


def test_source_and_target_are_tokenised_and_truncated(tokenizer):
    [record] = tokenize(
        [{"source": "w0 w1 w2", "target": "w3 w4"}], tokenizer, max_source_length=2, max_target_length=1
    )
    assert record == TokenRecord([8, 9], [11])  # w0 is the 9th word of the vocabulary


def test_text_needs_sentinel_tokens():
    core = Tokenizer(WordLevel({"<unk>": 0, "w": 1}, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    plain = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    with pytest.raises(DataError, match="record 1: span corruption needs a tokenizer with <extra_id_0>"):
        tokenize([{"text": "w w w"}], plain)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{oops", "line 2: not JSON"),
        ("[1, 2]", "line 2: expected an object"),
        ('{"question": "x"}', "line 2: expected .*source, target.* got {question}"),
        ('{"text": 5}', "line 2: text must be a string"),
        ('{"source": "a", "target": 5}', "line 2: target must be a string, got int"),
        ('{"input_ids": [1.5], "labels": [1]}', "line 2: input_ids must be a list of integers"),
        ('{"input_ids": [1], "labels": [true]}', "line 2: labels must be a list of integers"),
        ('{"input_ids": "12", "labels": [1]}', "line 2: input_ids must be a list of integers"),
    ],
)
def test_a_malformed_line_is_named(line, complaint, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=complaint):
        read_records(tmp_path / "d.jsonl")


def test_blank_lines_are_skipped_and_still_counted(tmp_path):
    (tmp_path / "d.jsonl").write_text('\n{"text": "fine"}\n\nbad\n')
    with pytest.raises(DataError, match="line 4: not JSON"):
        read_records(tmp_path / "d.jsonl")


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_newlines_end_a_line(separator, tmp_path):
    record = {"text": f"before{separator}after"}
    text = json.dumps(record, ensure_ascii=False) if separator > "\x1f" else json.dumps(record)
    (tmp_path / "d.jsonl").write_text(text + "\n", encoding="utf-8")
    assert read_records(tmp_path / "d.jsonl") == [record]


@pytest.mark.parametrize(("content", "complaint"), [("", "holds no records"), ("\n \n", "holds no records")])
def test_an_empty_file_is_refused(content, complaint, tmp_path):
    (tmp_path / "d.jsonl").write_text(content)
    with pytest.raises(DataError, match=complaint):
        read_records(tmp_path / "d.jsonl")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*gone.jsonl: No such file"):
        read_records(tmp_path / "gone.jsonl")


def test_bytes_that_are_not_utf8_are_refused(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(DataError, match="not UTF-8"):
        read_records(tmp_path / "d.jsonl")


@pytest.mark.parametrize(
    ("record", "missing"),
    [
        ({"input_ids": [0, 0], "labels": [5]}, "input"),
        ({"input_ids": [], "labels": [5]}, "input"),
        ({"input_ids": [5], "labels": [-100, -100]}, "target"),
        ({"input_ids": [5], "labels": []}, "target"),
    ],
)
def test_a_record_of_padding_alone_is_refused(record, missing):
    with pytest.raises(DataError, match=f"record 1 is all padding: no {missing} token left"):
        tokenize([record], None)


@pytest.mark.parametrize(
    ("record", "token"),
    [
        ({"input_ids": [5, 64], "labels": [5]}, "64"),
        ({"input_ids": [5], "labels": [5, 700]}, "700"),
        ({"input_ids": [-1, 5], "labels": [5]}, "-1"),
        ({"input_ids": [5, -100, 6], "labels": [5]}, "-100"),
    ],
)
def test_a_token_outside_the_vocabulary_is_named(record, token):
    good = {"input_ids": [1], "labels": [63]}
    with pytest.raises(DataError, match=f"record 2: token id {token} is outside the vocabulary of 64"):
        tokenize([good, record], None, vocab_size=64)


def test_trailing_padding_of_tokenised_records_is_removed():
    [record] = tokenize([{"input_ids": [5, 0, 6, 0, 0], "labels": [7, -100, 8, -100]}], None)
    assert record == TokenRecord([5, 0, 6], [7, -100, 8])


def test_tokenised_records_are_truncated():
    [record] = tokenize([{"input_ids": [5] * 9, "labels": [6] * 9}], None, max_source_length=4, max_target_length=2)
    assert record == TokenRecord([5] * 4, [6] * 2)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 5))
def test_chosen_records_are_distinct_and_in_file_order(total, count, seed):
    chosen = choose_records([{"text": str(i)} for i in range(total)], count, seed=seed)
    places = [int(r["text"]) for r in chosen]
    assert places == sorted(set(places))
    assert len(places) == min(total, count)


def test_the_digest_ignores_formatting_and_sees_content(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"source": "x", "target": "y"}\n')
    (tmp_path / "b.jsonl").write_text('\n{"target":"y","source":"x"}')
    a, b = (digest_records(read_records(tmp_path / name)) for name in ("a.jsonl", "b.jsonl"))
    assert a == b
    assert a != digest_records([{"source": "x", "target": "z"}])


def test_the_key_of_a_record_tells_apart_where_the_input_ends():
    assert record_key(TokenRecord([1, 2], [3])) != record_key(TokenRecord([1], [2, 3]))
