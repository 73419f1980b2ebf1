"""Records -> token ids, the same for every reader: checked, cut to the greatest lengths, and what became of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msmoe.calibration.causal import CausalReader
from msmoe.calibration.files import DataError
from msmoe.calibration.records import DataWarning, kind_of
from msmoe.calibration.seq2seq import Seq2SeqReader
from msmoe.calibration.spans import IGNORE, TokenRecord
from msmoe.calibration.tokenizer import SpecialTokens, load_tokenizer, special_tokens
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
    causal: bool = False,
) -> TokenRecords:
    """Turn records into token ids; `text` records are span-corrupted, each by its own text and the seed.

    A record with nothing but padding on one side, or a text too short to be corrupted, is left out. What is longer than
    allowed is cut at the end, and keeps its end of sequence.

    A decoder-only model is asked for every token of a text but the first, and for the answers of other records, which
    follow their prompts. A text is cut at the end, to `max_source_length`; a prompt at its start, to the same length,
    so that the answer and what stands next to it stay; the answer at its end, to `max_target_length`.

    Args:
        records: checked records.
        tokenizer: a transformers tokenizer; may be None if every record is tokenised already.
        pad_id: of the model; padding of tokenised records is removed.
        eos_id: of the model; by default the tokenizer's.
        vocab_size: if given, all tokens must stay below it.
        max_source_length, max_target_length: most tokens; None cuts nothing.
        causal: whether the model is decoder-only.

    Raises:
        DataError: if no record has a token left, an id or a length is out of range, the tokenizer is missing, or a
            record is not for this kind of model.

    Warns:
        DataWarning: for records left out, and for records cut.
    """
    for name, length in (("max_source_length", max_source_length), ("max_target_length", max_target_length)):
        if length is not None and length < 1:
            raise DataError(f"{name} must be at least 1, got {length}")
    limits = {"max_source": max_source_length, "max_target": max_target_length}
    reader = (
        CausalReader(tokenizer, pad_id=pad_id, eos_id=eos_id, **limits) if causal
        else Seq2SeqReader(tokenizer, pad_id=pad_id, eos_id=eos_id, **limits, seed=seed)
    )  # fmt: skip
    result, reasons = TokenRecords(), ["there are none"]
    for i, record in enumerate(records):
        place = getattr(record, "place", f"record {i + 1}")
        read = reader.read(record, place)
        if not read.input_ids or all(label == IGNORE for label in read.labels):
            reasons.append(f"{place} is all padding: no {'target' if read.input_ids else 'input'} token left")
            continue
        from_text = kind_of(record) not in ("tokens", "ids")
        check_range(read.input_ids, read.labels, vocab_size, place, from_text=from_text)
        result.longest_target = max(result.longest_target, reader.target_length(read))
        kept, cuts = reader.cut(read, kind_of(record))
        if all(label == IGNORE for label in kept.labels):
            reasons.append(f"{place} is all padding: no target token left in the first {max_target_length}")
            continue
        for side, was_cut in zip(result.num_cut, cuts, strict=True):
            result.num_cut[side] += was_cut
        result.append(kept)
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
        seed=seed, causal=special.is_causal,
    )  # fmt: skip


def special_tokens_of(checkpoint: Checkpoint) -> SpecialTokens:
    """The special tokens of a checkpoint's configuration, checked."""
    return special_tokens(checkpoint.config, Path(checkpoint.path) / "config.json")
