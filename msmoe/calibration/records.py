"""Calibration and task data: rows of files, data sets or memory -> checked records."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from msmoe.calibration.chat import check_messages, conversation
from msmoe.calibration.datasets import named_rows, read_folder
from msmoe.calibration.files import (
    FORMATS,
    STANDARD_INPUT,
    Cell,
    DataError,
    Row,
    is_data_file,
    read_file,
    status_of,
    stem_of,
)
from msmoe.calibration.spans import TokenRecord
from msmoe.errors import MsmoeWarning, warn

KINDS = {
    "tokens": ("input_ids", "labels"),
    "pair": ("source", "target"),
    "text": ("text",),
    "chat": ("messages",),
    "choices": ("source", "choices", "answer"),
    "ids": ("input_ids",),
}  # what a record is: the first kind whose fields it has
MASKS = {"input_ids": "attention_mask", "labels": "decoder_attention_mask"}
FIELDS = (*dict.fromkeys(field for fields in KINDS.values() for field in fields), *MASKS.values(), "domain")
IDENTIFIERS = ("id", "_id", "idx", "index", "guid", "uid")  # of no use here, and no surprise either
MAX_DOMAINS = 256
OTHER = "other"  # domain of the records without one, where others have one
IN_MEMORY = "records in memory"

Columns = Mapping[str, str]  # field of a record -> the column that holds it
Source = str | Path | Iterable[Mapping[str, Any] | str]  # a file or data set, or records
Data = Source | Sequence[str | Path]  # or several files or data sets


class DataWarning(MsmoeWarning):
    """Something about the data that changes what is measured and does not stop it."""


class Record(dict):
    """One record as read, and where it stands; `domain` is set by `read_calibration`, "" for none."""

    place: str
    kind: str
    domain: str = ""


class Records(list[Record]):
    """Records as read, without the blank ones: `num_skipped` of them; `source` names where they are from."""

    num_skipped: int = 0
    source: str = IN_MEMORY


def kind_of(record: Mapping[str, Any]) -> str | None:
    """Which of the `KINDS` a record is; a field that is null is not there, but ids with null for labels are no kind."""
    kind = next((kind for kind, fields in KINDS.items() if all(record.get(f) is not None for f in fields)), None)
    return None if kind == "ids" and "labels" in record else kind


def read_records(data: Source, *, columns: Columns | None = None) -> Records:
    """Read the records of one file, data set or sequence; blank ones are skipped and counted.

    A record is `{"source", "target"}`, `{"text"}`, `{"messages"}`, `{"source", "choices", "answer"}` with the position
    of the right choice, from 0, or `{"input_ids", "labels"}` (with `attention_mask` and `decoder_attention_mask` where
    there is padding); decoder-only models also read `{"input_ids"}`. Blank is one whose text, or whose target, is null,
    empty or white space.

    Args:
        data: a file (see `read_file`), `-` for standard input, a folder or the name of a data set, perhaps with
            `:SPLIT`; or the records themselves, a string among them being a text.
        columns: field -> name of the column that holds it, where that is not the field's own.

    Raises:
        DataError: if the data are missing or empty, or one is no such record; the message names the line.

    Warns:
        DataWarning: for blank records, and for fields that are not used.
    """
    columns = dict(columns or {})
    check_columns(columns)
    name = str(data) if isinstance(data, str | Path) else IN_MEMORY
    records, unused = Records(), dict[str, None]()
    records.source = name
    for place, row in rows_of(data, columns):
        record = check_record(renamed(row, columns, place), place)
        if record is None:
            records.num_skipped += 1
        else:
            records.append(record)
            unused |= dict.fromkeys(unused_fields(record))
    if not records:
        blank = f": all {records.num_skipped} are blank" if records.num_skipped else ""
        raise DataError(f"{name} holds no records{blank}")
    if records.num_skipped:
        total = len(records) + records.num_skipped
        warn(f"{name}: {records.num_skipped} of {total} records are blank: skipped", DataWarning)
    if unused:
        warn(f"{name}: fields that are not used: {', '.join(sorted(unused))}", DataWarning)
    return records


def rows_of(data: Source, columns: Columns) -> Iterator[Row]:
    if isinstance(data, Mapping) or not isinstance(data, Iterable | Path):
        raise DataError(f"data must be a file, a data set or a list of records, got {type(data).__name__}")
    if not isinstance(data, str | Path):
        for i, row in enumerate(data, 1):
            yield f"record {i}", {"text": row} if isinstance(row, str) else row
        return
    fits = lambda names: kind_of({field: "" for field in FIELDS if columns.get(field, field) in names}) is not None
    path = Path(data)
    folder, _, split = str(data).rpartition(":")
    status = status_of(path)
    if path.is_dir():
        yield from read_folder(path, "", fits)
    elif status is not None or str(data) == STANDARD_INPUT or path.suffix == ".gz" or path.suffix.lower() in FORMATS:
        yield from read_file(path, fits)
    elif folder and status_of(Path(folder)) is not None and Path(folder).is_dir():
        yield from read_folder(Path(folder), split, fits)
    else:
        yield from named_rows(str(data))


def check_columns(columns: Columns) -> None:
    """Raise `DataError` for a field that no record has."""
    for field in columns:
        if field not in FIELDS:
            raise DataError(f"--columns: {field!r} is no field of a record; choose from {', '.join(FIELDS)}")


def renamed(row: Any, columns: Columns, place: str) -> Any:
    """The row with the fields that `columns` names, in place of their columns.

    A column may lie within another: `translation.en`, `answers.text.0`.

    Raises:
        DataError: for a column that the row does not have.
    """
    if not columns or not isinstance(row, Mapping):
        return row
    found = {field: value_at(row, column, place) for field, column in columns.items()}
    moved = {column if column in row else column.split(".")[0] for column in columns.values()}
    return {key: value for key, value in row.items() if key not in moved} | found


def value_at(row: Mapping[str, Any], column: str, place: str) -> Any:
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        value = value.value() if isinstance(value, Cell) else value
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal():
            value = value[int(part)] if int(part) < len(value) else None
        else:
            raise DataError(f"{place}: no column {column!r}; there are {', '.join(map(str, row)) or 'none'}")
    return value


def check_record(record: Any, place: str) -> Record | None:
    """Return the record if it is of one of the `KINDS`, None if it is blank.

    Raises:
        DataError: naming the place and what is wrong.
    """
    shapes = " or ".join("{" + ", ".join(sorted(fields)) + "}" for fields in KINDS.values())
    if record is None:
        return None
    if not isinstance(record, Mapping):
        raise DataError(f"{place}: expected an object with {shapes}")
    checked, kind = Record(record), kind_of(record)
    if kind is None:
        if all(map(is_blank, record.values())) or any(record.keys() >= set(fields) for fields in KINDS.values()):
            return None  # nothing in it, or a field of its kind is null
        raise DataError(
            f"{place}: expected {shapes}, got {{{', '.join(map(str, record))}}}; --columns says which columns hold them"
        )
    checked.place, checked.kind = place, kind
    for field in KINDS[kind]:
        CHECKS.get(field, check_text)(checked, field)
    return None if is_blank_record(checked) else checked


def check_ids(record: Record, field: str) -> None:
    """Make a field of token ids, and its mask, lists of integers of the same length."""
    for name in (field, MASKS[field]):
        value = record.get(name)
        value = value.value() if isinstance(value, Cell) else value
        value = value.tolist() if hasattr(value, "tolist") else value  # type: ignore[union-attr]
        if name == MASKS[field]:
            if value is None:
                continue
            if isinstance(value, list):
                value = [int(i) if type(i) is bool else i for i in value]
        if not isinstance(value, list) or not all(type(i) is int for i in value):
            raise DataError(f"{record.place}: {name} must be a list of integers")
        record[name] = value
    mask = record.get(MASKS[field])
    if mask is None:
        return
    if len(mask) != len(record[field]) or set(mask) - {0, 1}:
        raise DataError(
            f"{record.place}: {MASKS[field]} must hold a 0 or 1 for each of the {len(record[field])} {field}"
        )
    if 1 in mask and 0 in mask[mask.index(1) : len(mask) - mask[::-1].index(1)]:
        raise DataError(f"{record.place}: {MASKS[field]} hides tokens between others: leave them out of {field}")


def check_text(record: Record, field: str) -> None:
    value = record[field]
    if not isinstance(value, str):
        raise DataError(f"{record.place}: {field} must be a string, got {type(value).__name__}")
    check_characters(value, f"{record.place}: {field}")
    record[field] = str(value)


def check_chat(record: Record, field: str) -> None:
    value = record[field]
    record[field] = check_messages(value.value() if isinstance(value, Cell) else value, record.place)
    for message in record[field]:
        check_characters(message["content"], f"{record.place}: {field}")


def check_choices(record: Record, field: str) -> None:
    """Make the choices a list of at least two texts."""
    value = record[field]
    value = value.value() if isinstance(value, Cell) else value
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(text, str) for text in value):
        raise DataError(f"{record.place}: {field} must be a list of at least two strings")
    for text in value:
        check_characters(text, f"{record.place}: {field}")
        if is_blank(text):
            raise DataError(f"{record.place}: {field} must not be blank, got {text!r}")
    record[field] = value


def check_answer(record: Record, field: str) -> None:
    """Make the answer the position of one of the choices."""
    value = record[field]
    value = value.value() if isinstance(value, Cell) else value
    last = len(record["choices"]) - 1
    if type(value) is not int or not 0 <= value <= last:
        raise DataError(f"{record.place}: {field} must be the position of a choice, from 0 to {last}, got {value!r}")
    record[field] = value


def check_characters(text: str, place: str) -> None:
    """Raise `DataError` for half a surrogate pair, which JSON may hold and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place} holds half a surrogate pair, \\u{ord(text[error.start]):x}, which is no text"
        ) from error


CHECKS = {
    "input_ids": check_ids, "labels": check_ids, "messages": check_chat, "choices": check_choices,
    "answer": check_answer,
}  # what a field is checked by, where it is not a text  # fmt: skip


def is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip()) or value == []


def is_blank_record(record: Record) -> bool:
    if record.kind == "chat":
        before, answer = conversation(record["messages"])
        return is_blank(answer) or all(is_blank(m["content"]) for m in before)
    if record.kind in ("tokens", "ids"):
        masks = [record.get(mask) for mask in MASKS.values()]
        return any(is_blank(record[f]) for f in KINDS[record.kind]) or any(m is not None and 1 not in m for m in masks)
    return any(is_blank(record[field]) for field in KINDS[record.kind])


def unused_fields(record: Record) -> set[str]:
    """Fields that nothing reads; identifiers are nothing to speak of."""
    masks = [MASKS[field] for field in KINDS[record.kind] if field in MASKS]
    given = {str(name) for name, value in record.items() if value is not None}
    return given - {*KINDS[record.kind], *masks, "domain", *IDENTIFIERS}


def read_calibration(data: Data, *, columns: Columns | None = None) -> Records:
    """Read the records of one or several sources, in the order given, and name the domain of each.

    A record's domain is its `domain` field. Without one, or with an empty one, it is the stem of its file if several
    files are given (`a/train`, `b/train` where two of them have the same stem). What is left has no domain if no record
    has one, and is of the domain `other` otherwise.

    Raises:
        DataError: if a file cannot be used, a domain is no string, or there are more than 256 of them.
    """
    sources = data_sources(data)
    records = Records()
    records.source = join_sources(sources)
    for source, name in zip(sources, file_domains(sources), strict=True):
        part = read_records(source, columns=columns)
        records.num_skipped += part.num_skipped
        for record in part:
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
            f"{records.source}: {num_domains} different domains, at most {MAX_DOMAINS} are allowed; was "
            "something else, such as a URL, taken for a domain?"
        )
    return records


def data_sources(data: Data) -> list[Source]:
    """The sources of a data argument, in the order given.

    Of a list of strings, each is a file or a data set if all can be: no white space, a file that exists, or the suffix
    of data. Otherwise each is a text.

    Raises:
        DataError: if there is none.
    """
    if isinstance(data, str | Path | Mapping) or not isinstance(data, Iterable):
        return [data]  # type: ignore[list-item]
    items = list(data)
    if not items:
        raise DataError("no calibration data: expected at least one file, data set or record")
    if all(isinstance(item, str | Path) for item in items) and all(map(may_be_source, items)):
        return items
    if any(isinstance(item, Path) for item in items):
        raise DataError("data must be files or records, got both in one list")
    return [items]


def may_be_source(item: str | Path) -> bool:
    if isinstance(item, Path) or is_data_file(item):
        return True
    return len(item.split()) == 1 or (len(item) < 1024 and "\n" not in item and status_of(Path(item)) is not None)


def join_sources(sources: Sequence[Source]) -> str:
    """How messages and statistics name the sources."""
    return " + ".join(str(s) if isinstance(s, str | Path) else IN_MEMORY for s in sources)


def file_domains(sources: Sequence[Source]) -> list[str]:
    """What records without a domain of their own go by: "" if there is one source only."""
    if len(sources) == 1:
        return [""]
    paths = [Path(str(source)) for source in sources]
    stems = [stem_of(path) for path in paths]
    if len(set(stems)) == len(set(paths)):
        return stems
    return [str(path.with_name(stem_of(path))) for path in paths]


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
        content = json.dumps(record, sort_keys=True, ensure_ascii=False, default=str)
        digest.update(content.encode(errors="surrogatepass") + b"\n")  # JSON may hold half a surrogate pair
    return digest.hexdigest()


__all__ = [
    "Columns", "Data", "DataError", "DataWarning", "Record", "Records", "Source", "TokenRecord", "choose_records",
    "digest_records", "kind_of", "read_calibration", "read_records",
]  # fmt: skip
