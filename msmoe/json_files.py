"""Read JSON files of other people: bounded, strict, and every fault of the file in one line."""

import json
import stat
from pathlib import Path
from typing import Any, NoReturn

from msmoe.errors import UserError

MAX_BYTES = 256 * 2**20


def read_json(path: str | Path, *, what: str = "JSON", max_bytes: int = MAX_BYTES) -> Any:
    """Parse a JSON file.

    `NaN` and `Infinity`, which are no JSON, and keys that an object names twice are refused.

    Args:
        what: what the file should be, for the message.

    Raises:
        FileNotFoundError: if there is none.
        UserError: if it cannot be read or parsed; the message names the file.
    """
    path = Path(path)
    return parse_json(read_text(path, what=what, max_bytes=max_bytes), place=str(path), what=what)


def read_object(path: str | Path, *, what: str = "JSON") -> dict:
    """`read_json` of a file that must hold an object."""
    content = read_json(path, what=what)
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, it holds {type(content).__name__}")
    return content


def read_text(path: Path, *, what: str, max_bytes: int = MAX_BYTES) -> str:
    """Text of a regular file of bounded size; a pipe or a device is never opened.

    Raises:
        FileNotFoundError: if there is none.
        UserError: if it is no regular file, too large, or not UTF-8.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path} is not a regular file, but should be {what}")
        if status.st_size > max_bytes:
            raise UserError(f"{path} has {status.st_size:,} bytes, too many for {what}")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not readable {what}: not UTF-8 text at byte {error.start}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def parse_json(text: str, *, place: str, what: str = "JSON") -> Any:
    """Parse JSON text strictly; `place` names it in the `UserError` that faults of it become."""
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise UserError(f"{place} is not readable {what}: nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{place} is not readable {what}: {error}") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"the key {twice!r} stands twice")
    return content
