"""Data files -> rows: JSON Lines, JSON, CSV, TSV, Parquet and plain text, gzipped or not; standard input."""

import csv
import gzip
import io
import json
import os
import stat
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from msmoe.errors import UserError

STANDARD_INPUT = "-"
MAX_LINE = 2**26  # bytes of one line or CSV field
BLOCK = 2**20
MAX_STREAM = 2**31  # bytes of data whose size no file bounds: standard input, what a .gz unpacks to, one JSON value
FORMATS = {
    ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".txt": "text", ".text": "text",
}  # fmt: skip
LINES = (".jsonl", ".ndjson")  # JSON that is never read as a whole unless it is a list
GZIP_MAGIC, PARQUET_MAGIC = b"\x1f\x8b", b"PAR1"
KINDS_OF_FILE = (
    (stat.S_ISFIFO, "a pipe"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"), (stat.S_ISSOCK, "a socket"),
)  # fmt: skip

Row = tuple[str, Any]  # (place for messages, what stands there)
Fits = Callable[[Sequence[str]], bool]  # whether names of columns make a record


class DataError(UserError):
    """Calibration or task data that cannot be used; the message names the file and the line."""


def stem_of(path: str | Path) -> str:
    """Name of a data file without folder and suffixes: `news` for `a/news.jsonl.gz`."""
    path = Path(path)
    return Path(path.stem).stem if path.suffix == ".gz" else path.stem


def suffix_of(path: str | Path) -> str:
    """Suffix that tells the format, in lower case and without `.gz`."""
    path = Path(path)
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def is_data_file(path: str | Path) -> bool:
    """Whether the name of a file says that it holds data."""
    return suffix_of(path) in FORMATS


def files_in(folder: Path) -> list[Path]:
    """The data files that stand directly in a folder, by name; none in one of statistics or of a checkpoint."""
    if any(folder.glob("*.safetensors")):
        return []
    return sorted(p for p in folder.iterdir() if is_data_file(p) and not p.name.startswith("."))


def status_of(path: Path) -> os.stat_result | None:
    """The file's status; None if there is none.

    Raises:
        DataError: if the system refuses to look.
    """
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {str(path)!r}: {getattr(error, 'strerror', None) or error}") from error


def read_file(path: Path, fits: Fits) -> Iterator[Row]:
    """Rows of a file, or of standard input for `-`.

    The format follows from the suffix; without a known one, from the content: gzip and Parquet by their first bytes,
    JSON by its bracket, CSV and TSV by a first line with the names of a record's columns, else plain text. A plain text
    with blank lines between its texts holds a record per paragraph, any other a record per line.

    Args:
        fits: says whether names of columns make a record.

    Raises:
        DataError: if it cannot be read or is damaged; the message names the line.
    """
    name = "standard input" if str(path) == STANDARD_INPUT else str(path)
    try:
        with open_file(path) as stream:
            yield from read_stream(stream, name, suffix_of(path), fits)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{name} is not whole gzip data: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read {name}: {error.strerror or error}") from error


def open_file(path: Path) -> BinaryIO:
    """The bytes of a regular file or of standard input."""
    if str(path) == STANDARD_INPUT:
        return io.BytesIO(standard_input(sys.stdin))
    status = os.stat(path)
    for is_kind, kind in KINDS_OF_FILE:
        if is_kind(status.st_mode):
            raise DataError(f"{path} is {kind}, not a regular file: pipe the data into --data - instead")
    return path.open("rb")


@lru_cache(maxsize=1)
def standard_input(stream: TextIO) -> bytes:
    """All of standard input, kept: several steps of one command read the data.

    Raises:
        DataError: if it holds more than 2 GiB.
    """
    if stream is None or stream.isatty():
        raise DataError("--data - reads standard input, and nothing is piped into it")
    return read_all(stream.buffer, "standard input")


def read_all(stream: BinaryIO, name: str) -> bytes:
    content = bytearray()
    while block := stream.read(BLOCK):  # a read of the whole bound would ask for as much memory at once
        content += block
        if len(content) > MAX_STREAM:
            raise DataError(f"{name} holds more than {MAX_STREAM // 2**30} GiB: choose a part of it")
    return bytes(content)


def read_stream(stream: BinaryIO, name: str, suffix: str, fits: Fits) -> Iterator[Row]:
    start = stream.read(4096)
    stream.seek(0)
    limit = None
    if start.startswith(GZIP_MAGIC):
        stream, limit = gzip.GzipFile(fileobj=stream), MAX_STREAM  # type: ignore[assignment]
        start = stream.read(4096)
        stream.seek(0)
    kind = format_of(start, suffix, fits)
    if kind == "parquet":
        yield from parquet_rows(stream if limit is None else io.BytesIO(read_all(stream, name)), name)
    elif kind == "json" and (suffix not in LINES or first_character(start) == "["):
        yield from json_rows(read_all(stream, name), name, fits)
    else:
        lines = lines_of(stream, name, limit=limit)
        if kind == "csv":
            yield from csv_rows(lines, name, delimiter_of(start, suffix, fits))
        else:
            yield from json_lines(lines, name) if kind == "json" else text_rows(lines, name)


def format_of(start: bytes, suffix: str, fits: Fits) -> str:
    """Which of the `FORMATS` data that begin like this have."""
    if start.startswith(PARQUET_MAGIC):
        return "parquet"
    known = FORMATS.get(suffix)
    if known in ("json", "csv", "parquet"):
        return known
    first = first_character(start)
    if first == "[" or (first == "{" and '"' in text_of(start)):
        return "json"
    return "csv" if known is None and delimiter_of(start, "", fits) else "text"


def text_of(start: bytes) -> str:
    return start.decode("utf-8-sig", errors="replace")


def first_character(start: bytes) -> str:
    return text_of(start).lstrip()[:1]


def delimiter_of(start: bytes, suffix: str, fits: Fits) -> str:
    """The character between columns: the one that makes the first line name those of a record.

    Without such a one: the suffix's own, "" for an unknown suffix.
    """
    line = text_of(start).partition("\n")[0].rstrip("\r")
    own = {".csv": ",", ".tsv": "\t"}.get(suffix, "")
    for delimiter in (own, ",", "\t", ";") if own else (",", "\t", ";"):
        try:
            names = next(csv.reader([line], delimiter=delimiter, strict=True), [])
        except csv.Error:
            continue
        if fits(names):
            return delimiter
    return own


def lines_of(stream: BinaryIO, name: str, *, limit: int | None) -> Iterator[tuple[int, str]]:
    """Number and text of every line, without its end; only newlines end one, strings may hold U+2028.

    Args:
        limit: most bytes in all.

    Raises:
        DataError: for a line without an end in sight, more than `limit` bytes, or bytes that are no UTF-8.
    """
    total = 0
    for number in count(1):
        line = stream.readline(MAX_LINE + 1)
        total += len(line)
        if not line:
            return
        if len(line) > MAX_LINE:
            raise DataError(f"{name}, line {number} is longer than {MAX_LINE // 2**20} MiB: is this a data file?")
        if limit is not None and total > limit:
            raise DataError(f"{name} holds more than {limit // 2**30} GiB: choose a part of it")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{name}, line {number} is not UTF-8 text: {error.reason} at byte {error.start}") from error
        yield number, text.removesuffix("\n").removesuffix("\r")


def parse_json(text: str | bytes, place: str) -> Any:
    """Raises: `DataError` if it is no JSON."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise DataError(f"{place}: not JSON that can be read (nested too deeply)") from error
    except ValueError as error:
        raise DataError(f"{place}: not JSON ({error})") from error


def json_lines(lines: Iterator[tuple[int, str]], name: str) -> Iterator[Row]:
    for number, line in lines:
        if line.strip():
            place = f"{name}, line {number}"
            yield place, parse_json(line, place)


def json_rows(content: bytes, name: str, fits: Fits) -> Iterator[Row]:
    """Rows of one JSON value: a list, a record, or an object that holds one list of objects; else of JSON Lines."""
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        first = content.split(b"\n", 1)[0].strip()
        if isinstance(error, json.JSONDecodeError) and not error.msg.startswith("Extra data") and first in b"[{":
            raise DataError(f"{name}: not JSON ({error})") from error
        yield from json_lines(lines_of(io.BytesIO(content), name, limit=None), name)
        return
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list) and v and all(isinstance(row, dict) for row in v)]
        value = lists[0] if len(lists) == 1 and not fits(list(value)) else [value]
    if not isinstance(value, list):
        raise DataError(f"{name}: expected a list of records, got {type(value).__name__}")
    for i, row in enumerate(value, 1):
        yield f"{name}, record {i}", row


def csv_rows(lines: Iterator[tuple[int, str]], name: str, delimiter: str) -> Iterator[Row]:
    """Rows of CSV or TSV with a header; a cell is text, or a list in JSON where its field is one."""
    number = 0

    def texts() -> Iterator[str]:
        nonlocal number
        for i, line in lines:
            number = i
            yield line + "\n"

    limit = csv.field_size_limit(MAX_LINE)
    try:
        reader = csv.reader(texts(), delimiter=delimiter or ",", strict=True)
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise DataError(f"{name}, line 1 names a column twice: {', '.join(header)}")
        for cells in reader:
            place = f"{name}, line {number}"
            if not cells:
                continue
            if len(cells) != len(header):
                raise DataError(f"{place} has {len(cells)} fields, the first line names {len(header)}")
            yield place, dict(zip(header, map(Cell, cells), strict=True))
    except csv.Error as error:
        raise DataError(f"{name}, line {number} is not CSV: {error}") from error
    finally:
        csv.field_size_limit(limit)


class Cell(str):
    """The text of a cell, which may stand for a list where the field is one."""

    def value(self) -> Any:
        """What the cell holds in JSON, or the text."""
        try:
            return json.loads(self)
        except (ValueError, RecursionError):
            return str(self)


def text_rows(lines: Iterator[tuple[int, str]], name: str) -> Iterator[Row]:
    """A record per paragraph where blank lines stand between texts, else a record per line."""
    paragraphs: list[list[tuple[int, str]]] = [[]]
    for number, line in lines:
        if line.strip():
            paragraphs[-1].append((number, line))
        elif paragraphs[-1]:
            paragraphs.append([])
    paragraphs = [p for p in paragraphs if p]
    if len(paragraphs) == 1:
        paragraphs = [[line] for line in paragraphs[0]]
    for paragraph in paragraphs:
        yield f"{name}, line {paragraph[0][0]}", {"text": "\n".join(line for _, line in paragraph)}


def parquet_rows(stream: BinaryIO, name: str) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError(f"{name} is Parquet, which needs `pip install pyarrow`") from None
    try:
        number = 0
        for batch in ParquetFile(stream).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{name}, row {number}", row
    except pyarrow.ArrowException as error:
        raise DataError(f"{name} is not whole Parquet: {error}") from error
