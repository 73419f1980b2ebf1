"""Records -> token ids: what is padding, where a sequence is cut, and span corruption, the same for every reader.

Padding is what the record's mask says. Without a mask it is the pad token at either end, and in labels -100 as well;
where the pad token is also the end of sequence, the first of those at the end is the end of the sequence.
"""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from msmoe.calibration.chat import conversation, render
from msmoe.calibration.files import DataError
from msmoe.calibration.records import MASKS, DataWarning, kind_of
from msmoe.calibration.spans import IGNORE, TokenRecord, corrupt_spans, sentinel_ids
from msmoe.calibration.tokenizer import SpecialTokens, load_tokenizer, special_tokens, tokenizer_errors
from msmoe.checkpoint import Checkpoint
from msmoe.errors import warn


class TokenRecords(list[TokenRecord]):
    """Token records, and what became of the records on the way.

    Attributes:
        kept: position, among the records, of each token record; the others were blank.
        num_cut: `{"sources": ..., "targets": ...}`, records that were longer than allowed.
        longest_target: tokens of the longest target before any cut.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[int] = []
        self.num_cut = {"sources": 0, "targets": 0}
        self.longest_target = 0


def tokenize(
    records: Sequence[dict],
    tokenizer: Any,
    *,
    pad_id: int = 0,
    eos_id: int | None = None,
    vocab_size: int | None = None,
    max_source_length: int | None = 512,
    max_target_length: int | None = 128,
    seed: int = 0,
) -> TokenRecords:
    """Turn records into token ids; `text` records are span-corrupted, each by its own text and the seed.

    A record with nothing but padding on one side, or a text too short to be corrupted, is left out. What is longer than
    allowed is cut at the end, and keeps its end of sequence.

    Args:
        records: checked records.
        tokenizer: a transformers tokenizer; may be None if every record is tokenised already.
        pad_id: of the model; padding of tokenised records is removed.
        eos_id: of the model; by default the tokenizer's.
        vocab_size: if given, all tokens must stay below it.
        max_source_length, max_target_length: most tokens; None cuts nothing.

    Raises:
        DataError: if no record has a token left, an id or a length is out of range, or the tokenizer is missing.

    Warns:
        DataWarning: for records left out, and for records cut.
    """
    for name, length in (("max_source_length", max_source_length), ("max_target_length", max_target_length)):
        if length is not None and length < 1:
            raise DataError(f"{name} must be at least 1, got {length}")
    own_eos = getattr(tokenizer, "eos_token_id", None)
    ends, eos_id = (own_eos, eos_id), own_eos if eos_id is None else eos_id
    reader = Reader(tokenizer, pad_id, eos_id, max_source_length, seed)
    result, reasons = TokenRecords(), ["there are none"]
    for i, record in enumerate(records):
        place = getattr(record, "place", f"record {i + 1}")
        read = reader.read(record, place)
        inputs, labels = read.input_ids, read.labels
        if not inputs or all(label == IGNORE for label in labels):
            reasons.append(f"{place} is all padding: no {'target' if inputs else 'input'} token left")
            continue
        check_range(inputs, labels, vocab_size, place, from_text=kind_of(record) != "tokens")
        result.longest_target = max(result.longest_target, len(labels))
        cut = TokenRecord(cut_end(inputs, max_source_length, ends), cut_end(labels, max_target_length, ends))
        if all(label == IGNORE for label in cut.labels):
            reasons.append(f"{place} is all padding: no target token left in the first {max_target_length}")
            continue
        result.num_cut["sources"] += reader.was_cut or len(cut.input_ids) < len(inputs)
        result.num_cut["targets"] += len(cut.labels) < len(labels)
        result.append(cut)
        result.kept.append(i)
    if not result:
        raise DataError(f"no record can be used: {reasons[:2][-1]}")
    warn_about(result, len(records), max_source_length, max_target_length)
    return result


def warn_about(result: TokenRecords, total: int, max_source: int | None, max_target: int | None) -> None:
    if left_out := total - len(result):
        warn(f"{left_out} of {total} records are blank, padding or too short: skipped", DataWarning)
    for side, limit in (("sources", max_source), ("targets", max_target)):
        if count := result.num_cut[side]:
            flag = f"--max-{side.removesuffix('s')}-length"
            warn(f"{count} of {total} {side} were cut to {limit} tokens ({flag})", DataWarning)


class Reader:
    """Reads the tokens of single records, uncut but for the input of span corruption.

    Attributes:
        was_cut: whether the last text was cut before it was corrupted.
    """

    def __init__(self, tokenizer: Any, pad_id: int, eos_id: int | None, max_source_length: int | None, seed: int):
        self.tokenizer, self.pad_id, self.eos_id, self.seed = tokenizer, pad_id, eos_id, seed
        self.max_source_length = max_source_length
        self.was_cut = False
        self._sentinels: list[int] | None = None

    def read(self, record: dict, place: str) -> TokenRecord:
        self.was_cut = False
        kind = kind_of(record)
        if kind == "tokens":
            inputs, labels = (record[f] for f in ("input_ids", "labels"))
            masks = [record.get(MASKS[f]) for f in ("input_ids", "labels")]
            return TokenRecord(
                without_padding(inputs, masks[0], pad_id=self.pad_id, eos_id=self.eos_id),
                without_padding(labels, masks[1], pad_id=self.pad_id, eos_id=self.eos_id, ignored=(IGNORE,)),
            )
        if self.tokenizer is None:
            raise DataError(f"{place} is text and the checkpoint has no tokenizer: use input_ids and labels")
        if kind == "text":
            return self._corrupted(record["text"], place)
        return TokenRecord(*(encode(self.tokenizer, text, place) for text in texts_of(record, self.tokenizer)))

    def _corrupted(self, text: str, place: str) -> TokenRecord:
        """A text with masked spans; nothing of one with fewer than two tokens."""
        ids = encode(self.tokenizer, text, place, special=False)
        if len(ids) < 2:
            return TokenRecord([], [])
        if self._sentinels is None:
            self._sentinels = sentinel_ids(self.tokenizer)
        eos_id = getattr(self.tokenizer, "eos_token_id", None)
        if eos_id is None and self._sentinels:
            raise DataError(f"{place}: span corruption needs a tokenizer with an end-of-sequence token")
        if self.max_source_length is not None:
            self.was_cut = len(ids) > self.max_source_length - 1
            ids = ids[: self.max_source_length - 1]
        digest = sha256(text.encode()).digest()
        rng = np.random.default_rng([self.seed, int.from_bytes(digest[:8], "little")])
        try:
            return corrupt_spans(ids, sentinel_ids=self._sentinels, eos_id=eos_id, rng=rng)
        except ValueError as error:
            raise DataError(f"{place}: {error}") from error


def texts_of(record: dict, tokenizer: Any) -> tuple[str, str]:
    """Source and target of a record of the kind `pair` or `chat`, as the tokenizer reads them."""
    if kind_of(record) == "pair":
        return record["source"], record["target"]
    before, answer = conversation(record["messages"])
    return render(before, tokenizer, getattr(record, "place", "a record")), answer


def encode(tokenizer: Any, text: str, place: str, *, special: bool = True) -> list[int]:
    """Token ids of a text, uncut.

    Raises:
        UserError: if the tokenizer cannot read it.
    """
    with tokenizer_errors(f"{place}: the tokenizer cannot read the text"):
        return tokenizer(text, add_special_tokens=special, verbose=False).input_ids


def without_padding(
    ids: list[int], mask: list[int] | None, *, pad_id: int, eos_id: int | None, ignored: tuple[int, ...] = ()
) -> list[int]:
    """The ids between the padding at either end; see the head of this file.

    Args:
        mask: 1 for what counts, without a 0 between two of them; None to go by the ids.
        ignored: ids that are padding in any case.
    """
    start, end, padding = 0, len(ids), (*ignored, pad_id)
    if mask is not None:
        padding = ignored
        start, end = (mask.index(1), len(mask) - mask[::-1].index(1)) if 1 in mask else (0, 0)
    while end > start and ids[end - 1] in padding:
        end -= 1
    while start < end and ids[start] in padding:
        start += 1
    if mask is None and pad_id == eos_id and start < end < len(ids) and ids[end] == pad_id:
        end += 1
    return ids[start:end]


def cut_end(ids: list[int], length: int | None, ends: tuple[int | None, ...]) -> list[int]:
    """At most `length` ids; an end of sequence, one of `ends`, stays the last."""
    if length is None or len(ids) <= length:
        return ids
    return [*ids[: length - 1], ids[-1]] if ids[-1] in ends else ids[:length]


def check_range(
    inputs: Sequence[int], labels: Sequence[int], vocab_size: int | None, place: str, *, from_text: bool
) -> None:
    """Raise `DataError` for a token that the model has no embedding for."""
    ids = (*inputs, *(label for label in labels if label != IGNORE))
    wrong = next((t for t in ids if not 0 <= t < (vocab_size or 2**31)), None)
    if wrong is not None:
        hint = "; the tokenizer is not this model's" if from_text else ""
        raise DataError(f"{place}: token id {wrong} is outside the vocabulary of {vocab_size}{hint}")


def tokenize_for(
    checkpoint: Checkpoint, records: Sequence[dict], *, seed: int, max_source_length: int | None,
    max_target_length: int | None,
) -> TokenRecords:  # fmt: skip
    """Tokenise records as a checkpoint reads them.

    Raises:
        UserError: for a record, a tokenizer or a configuration that cannot be used.
    """
    special = special_tokens_of(checkpoint)
    return tokenize(
        records, load_tokenizer(checkpoint.path), pad_id=special.pad_id, eos_id=special.eos_id,
        vocab_size=special.vocab_size, max_source_length=max_source_length, max_target_length=max_target_length,
        seed=seed,
    )  # fmt: skip


def special_tokens_of(checkpoint: Checkpoint) -> SpecialTokens:
    """The special tokens of a checkpoint's configuration, checked."""
    return special_tokens(checkpoint.config, Path(checkpoint.path) / "config.json")
