"""Records -> token ids of an encoder-decoder model: what is padding, and span corruption.

Padding is what the record's mask says. Without a mask it is the pad token at either end, and in labels -100 as well;
where the pad token is also the end of sequence, the first of those at the end is the end of the sequence.
"""

from hashlib import sha256
from typing import Any

import numpy as np

from msmoe.calibration.chat import conversation, render
from msmoe.calibration.files import DataError
from msmoe.calibration.records import MASKS, kind_of
from msmoe.calibration.spans import IGNORE, TokenRecord, corrupt_spans, sentinel_ids
from msmoe.calibration.tokenizer import encode


class Seq2SeqReader:
    """Reads the tokens of single records, uncut but for the input of span corruption.

    Attributes:
        was_cut: whether the last text was cut before it was corrupted.
    """

    def __init__(
        self, tokenizer: Any, *, pad_id: int, eos_id: int | None, max_source: int | None, max_target: int | None,
        seed: int,
    ):  # fmt: skip
        own = getattr(tokenizer, "eos_token_id", None)
        self.tokenizer, self.pad_id, self.seed = tokenizer, pad_id, seed
        self.ends, self.eos_id = (own, eos_id), own if eos_id is None else eos_id
        self.max_source, self.max_target = max_source, max_target
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
        if kind == "ids":
            raise DataError(f"{place} has no labels, which an encoder-decoder model needs beside input_ids")
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
        if self.max_source is not None:
            self.was_cut = len(ids) > self.max_source - 1
            ids = ids[: self.max_source - 1]
        digest = sha256(text.encode()).digest()
        rng = np.random.default_rng([self.seed, int.from_bytes(digest[:8], "little")])
        try:
            return corrupt_spans(ids, sentinel_ids=self._sentinels, eos_id=eos_id, rng=rng)
        except ValueError as error:
            raise DataError(f"{place}: {error}") from error

    def cut(self, read: TokenRecord, kind: str | None) -> tuple[TokenRecord, tuple[bool, bool]]:
        """The record just read, both sides cut at the end, and whether the source and the target were."""
        kept = TokenRecord(
            cut_end(read.input_ids, self.max_source, self.ends), cut_end(read.labels, self.max_target, self.ends)
        )
        was_cut = self.was_cut or len(kept.input_ids) < len(read.input_ids)
        return kept, (was_cut, len(kept.labels) < len(read.labels))

    def target_length(self, read: TokenRecord) -> int:
        return len(read.labels)


def texts_of(record: dict, tokenizer: Any) -> tuple[str, str]:
    """Source and target of a record of the kind `pair`, `chat` or `choices`, as the tokenizer reads them."""
    if kind_of(record) == "pair":
        return record["source"], record["target"]
    if kind_of(record) == "choices":
        return record["source"], record["choices"][record["answer"]]
    before, answer = conversation(record["messages"])
    return render(before, tokenizer, getattr(record, "place", "a record")), answer


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
