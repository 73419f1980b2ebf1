"""Calibration and task data: JSON Lines records -> token ids."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from msmoe.errors import UserError

RECORD_SHAPES = ({"source", "target"}, {"text"}, {"input_ids", "labels"})
NOISE_DENSITY = 0.15
MEAN_SPAN_LENGTH = 3.0
MAX_DOMAINS = 256
OTHER = "other"  # domain of the records without one, where others have one

Data = str | Path | Sequence[str | Path]  # one file or data set, or several


class DataError(UserError):
    """Calibration or task data that cannot be used; the message names the file and the line."""


class Record(dict):
    """One record as read, and where it stands; `domain` is set by `read_calibration`, "" for none."""

    place: str
    domain: str = ""


@dataclass(frozen=True)
class TokenRecord:
    """One record as token ids, both sequences unpadded."""

    input_ids: list[int]
    labels: list[int]


def corrupt_spans(
    token_ids: Sequence[int], *, sentinel_ids: Sequence[int], eos_id: int, rng: np.random.Generator
) -> TokenRecord:
    """Mask random spans and ask for them back: the span corruption of T5 (arXiv 1910.10683, section 3.1.4).

    15 % of the tokens are masked, in spans of 3 on average; span i is replaced by sentinel i in the input, and
    the target is each sentinel followed by the tokens it hides.

    Args:
        token_ids: at least two tokens, without end-of-sequence token.
        sentinel_ids: ids of `<extra_id_0>`, `<extra_id_1>`, ...; bounds the number of spans.
        eos_id: appended to both sequences.
        rng: source of the span lengths and positions.

    Raises:
        ValueError: if there are fewer than two tokens or no sentinel.
    """
    num_tokens = len(token_ids)
    if num_tokens < 2:
        raise ValueError(f"span corruption needs at least 2 tokens, got {num_tokens}")
    if not sentinel_ids:
        raise ValueError("span corruption needs a tokenizer with <extra_id_0>, <extra_id_1>, ... tokens")
    num_noise = min(max(round(num_tokens * NOISE_DENSITY), 1), num_tokens - 1)
    num_spans = min(max(round(num_noise / MEAN_SPAN_LENGTH), 1), num_tokens - num_noise, len(sentinel_ids))
    noise_lengths = random_partition(num_noise, num_spans, rng)
    kept_lengths = random_partition(num_tokens - num_noise, num_spans, rng)

    inputs: list[int] = []
    targets: list[int] = []
    position = 0
    for sentinel, kept, noise in zip(sentinel_ids, kept_lengths, noise_lengths, strict=False):
        inputs += [*token_ids[position : position + kept], sentinel]
        position += kept
        targets += [sentinel, *token_ids[position : position + noise]]
        position += noise
    return TokenRecord([*inputs, eos_id], [*targets, eos_id])


def random_partition(total: int, num_parts: int, rng: np.random.Generator) -> list[int]:
    """Split `total` into `num_parts` positive integers, every such split equally likely."""
    cuts = np.sort(rng.choice(total - 1, size=num_parts - 1, replace=False) + 1)
    return np.diff(np.concatenate([[0], cuts, [total]])).tolist()


def sentinel_ids(tokenizer) -> list[int]:
    """Ids of `<extra_id_0>`, `<extra_id_1>`, ... in this order; empty if the tokenizer has none."""
    ids = []
    while (token_id := tokenizer.convert_tokens_to_ids(f"<extra_id_{len(ids)}>")) not in (None, tokenizer.unk_token_id):
        ids.append(token_id)
    return ids


def read_records(path: str | Path) -> list[Record]:
    """Read JSON Lines records, each `{"source", "target"}`, `{"text"}` or `{"input_ids", "labels"}`.

    A string that names no file is taken as a `datasets` data set, `NAME` or `NAME:SPLIT`, with the same columns.

    Raises:
        DataError: if the file is missing or empty, or a line is no such record; the message names the line.
    """
    path = Path(path)
    if not path.exists() and path.suffix not in (".jsonl", ".json", ".txt"):
        return read_dataset(str(path))
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: strings may hold U+2028
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    records = [parse_record(line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not records:
        raise DataError(f"{path} holds no records")
    return records


def read_calibration(data: Data) -> list[Record]:
    """Read the records of one or several files, in the order given, and name the domain of each.

    A record's domain is its `domain` field. Without one, or with an empty one, it is the stem of its file if several
    files are given (`a/train`, `b/train` where two of them have the same stem). What is left has no domain if no record
    has one, and is of the domain `other` otherwise.

    Raises:
        DataError: if a file cannot be used, a domain is no string, or there are more than 256 of them.
    """
    paths = data_paths(data)
    records = []
    for path, name in zip(paths, file_domains(paths), strict=True):
        for record in read_records(path):
            domain = record.get("domain")
            domain = "" if domain is None else domain
            if not isinstance(domain, str):
                raise DataError(f"{record.place}: domain must be a string, got {type(domain).__name__}")
            record.domain = domain or name
            records.append(record)
    if any(record.domain for record in records):
        for record in records:
            record.domain = record.domain or OTHER
    num_domains = len({record.domain for record in records})
    if num_domains > MAX_DOMAINS:
        raise DataError(
            f"{join_paths(paths)}: {num_domains} different domains, at most {MAX_DOMAINS} are allowed; was something "
            "else, such as a URL, taken for a domain?"
        )
    return records


def data_paths(data: Data) -> list[str | Path]:
    """The files of a data argument, in the order given.

    Raises:
        DataError: if there is none.
    """
    paths = [data] if isinstance(data, str | Path) else list(data)
    if not paths:
        raise DataError("no calibration data: expected at least one file or data set")
    return paths


def join_paths(paths: Sequence[str | Path]) -> str:
    return " + ".join(map(str, paths))


def file_domains(paths: Sequence[str | Path]) -> list[str]:
    """What records without a domain of their own go by: "" if there is one file only."""
    if len(paths) == 1:
        return [""]
    stems = [Path(path).stem for path in paths]
    if len(set(stems)) == len({str(path) for path in paths}):
        return stems
    return [str(path).removesuffix(Path(path).suffix) for path in paths]


def read_dataset(name: str) -> list[Record]:
    """Records of a `datasets` data set, `NAME` or `NAME:SPLIT` (default split `train`)."""
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise DataError(f"no file {name}, and data set names need `pip install datasets`") from None
    repository, _, split = name.partition(":")
    try:
        rows = load_dataset(repository, split=split or "train")
    except Exception as error:  # the library raises many kinds; each means that there is no such data here
        raise DataError(f"{name} is neither a file nor a data set that can be loaded: {error}") from error
    return [check_record(dict(row), f"{name}, row {i}") for i, row in enumerate(rows)]


def parse_record(line: str, place: str) -> Record:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place}: not JSON ({error})") from error
    return check_record(record, place)


def check_record(record: object, place: str) -> Record:
    """Return the record if it has one of the three shapes.

    Raises:
        DataError: naming the place and what is wrong.
    """
    shapes = " or ".join("{" + ", ".join(sorted(shape)) + "}" for shape in RECORD_SHAPES)
    if not isinstance(record, dict):
        raise DataError(f"{place}: expected an object with {shapes}")
    shape = next((shape for shape in RECORD_SHAPES if shape <= record.keys()), None)
    if shape is None:
        raise DataError(f"{place}: expected {shapes}, got {{{', '.join(map(str, record))}}}")
    for key in shape:
        value = record[key]
        if key in ("input_ids", "labels"):
            if not isinstance(value, list) or not all(type(i) is int for i in value):
                raise DataError(f"{place}: {key} must be a list of integers")
        elif not isinstance(value, str):
            raise DataError(f"{place}: {key} must be a string")
    checked = Record(record)
    checked.place = place
    return checked


def tokenize(
    records: Sequence[dict],
    tokenizer,
    *,
    pad_id: int = 0,
    vocab_size: int | None = None,
    max_source_length: int = 512,
    max_target_length: int = 128,
    seed: int = 0,
) -> list[TokenRecord]:
    """Turn records into token ids; `text` records are span-corrupted, each by its own text and the seed.

    Args:
        records: checked records.
        tokenizer: a transformers tokenizer; may be None if every record is tokenised already.
        pad_id: trailing padding of tokenised records is removed.
        vocab_size: if given, tokenised records must stay below it.

    Raises:
        DataError: if a record has no token left, an id is out of range, or the tokenizer is missing.
    """
    tokenized = []
    sentinels = sentinel_ids(tokenizer) if any("text" in r for r in records) and tokenizer else []
    for i, record in enumerate(records, 1):
        place = getattr(record, "place", f"record {i}")
        if "input_ids" in record:
            inputs = strip_trailing(record["input_ids"], pad_id)
            labels = strip_trailing(record["labels"], -100)
            ids = (*inputs, *(label for label in labels if label != -100))
            out_of_range = next((t for t in ids if not 0 <= t < (vocab_size or 2**31)), None)
            if out_of_range is not None:
                raise DataError(f"{place}: token id {out_of_range} is outside the vocabulary of {vocab_size}")
        elif tokenizer is None:
            raise DataError(f"{place} is text and the checkpoint has no tokenizer: use input_ids and labels")
        elif "source" in record:
            inputs = tokenizer(record["source"], truncation=True, max_length=max_source_length).input_ids
            labels = tokenizer(record["target"], truncation=True, max_length=max_target_length).input_ids
        else:
            ids = tokenizer(record["text"], add_special_tokens=False).input_ids[: max_source_length - 1]
            digest = sha256(record["text"].encode()).digest()
            rng = np.random.default_rng([seed, int.from_bytes(digest[:8], "little")])
            try:
                inputs, labels = vars(
                    corrupt_spans(ids, sentinel_ids=sentinels, eos_id=tokenizer.eos_token_id, rng=rng)
                ).values()
            except ValueError as error:
                raise DataError(f"{place}: {error}") from error
        inputs, labels = inputs[:max_source_length], labels[:max_target_length]
        if not inputs or all(label == -100 for label in labels):
            raise DataError(f"{place} is all padding: no {'input' if not inputs else 'target'} token left")
        tokenized.append(TokenRecord(list(inputs), list(labels)))
    return tokenized


def strip_trailing(ids: list[int], value: int) -> list[int]:
    end = len(ids)
    while end and ids[end - 1] == value:
        end -= 1
    return ids[:end]


def choose_records(records: list[Record], count: int, *, seed: int) -> list[Record]:
    """At most `count` records, a seeded choice without replacement, in file order."""
    if len(records) <= count:
        return records
    chosen = np.random.default_rng(seed).choice(len(records), size=count, replace=False)
    return [records[i] for i in np.sort(chosen)]


def digest_records(records: Iterable[dict]) -> str:
    """SHA-256 over the records, whatever their formatting in the file."""
    digest = sha256()
    for record in records:
        content = json.dumps(record, sort_keys=True, ensure_ascii=False)
        digest.update(content.encode(errors="surrogatepass") + b"\n")  # JSON may hold half a surrogate pair
    return digest.hexdigest()
