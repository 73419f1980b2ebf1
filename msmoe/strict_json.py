"""JSON files of users, read without surprises: what is wrong is named with its file and field.

The readers of a value take it and `where` it stands, e.g. `plan.json: seed`, and return it or raise `UserError`.
"""

import json
import math
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from msmoe.errors import UserError

MAX_BYTES = 256 * 2**20  # of a file
LFS_POINTER = "version https://git-lfs"
LFS_ADVICE = "it is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder"
LARGEST = 2**63 - 1
MAX_SHOWN = 60  # characters of a wrong value


def read_object(path: str | Path, kind: str = "a JSON file") -> dict[str, Any]:
    """The object of a JSON file.

    Args:
        kind: what the file should be, e.g. `a plan file`.

    Raises:
        UserError: if it cannot be read, is no object, names a field twice, or holds NaN or Infinity.
    """
    path = Path(path)
    content = parse(read_text(path, kind), f"{path} is not {kind}")
    if not isinstance(content, dict):
        raise UserError(f"{path} is not {kind}: it must hold a JSON object, got {shown(content)}")
    return content


def read_text(path: Path, kind: str, *, max_bytes: int = MAX_BYTES) -> str:
    """Text of a regular file of bounded size; a pipe or a device is never opened.

    Raises:
        UserError: if there is none, it is no regular file, too large, or not UTF-8.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path} is not {kind}: it is not a regular file")
        if status.st_size > max_bytes:
            raise UserError(f"{path} is not {kind}: it has {status.st_size:,} bytes")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not {kind}: it is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise UserError(f"{path} is not {kind}: {error.strerror or error}") from error


def parse(text: str, complaint: str, *, nan_is_null: bool = False) -> Any:
    """Parse JSON text strictly.

    Args:
        complaint: how the `UserError` for text that is no JSON begins, e.g. `plan.json is not a plan file`.
        nan_is_null: read `NaN` and infinities, which earlier versions wrote where nothing was measured, as null.
    """
    constant = (lambda _: None) if nan_is_null else _refuse_constant
    if text.startswith(LFS_POINTER):
        raise UserError(f"{complaint}: {LFS_ADVICE}")
    try:
        return json.loads(text, object_pairs_hook=distinct, parse_constant=constant)
    except UserError as error:
        raise UserError(f"{complaint}: {error}") from None
    except RecursionError:
        raise UserError(f"{complaint}: its JSON is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{complaint}: it is not readable JSON ({error})") from error


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; `UserError` if it names a field twice. For `object_pairs_hook`."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise UserError(f"it names {shown(twice)} twice in one object")
    return content


def _refuse_constant(name: str) -> float:
    raise UserError(f"it holds {name}, which is not a number of JSON")


def without_nan(value: Any) -> Any:
    """The same content with null in the place of every number that JSON does not have."""
    if isinstance(value, dict):
        return {name: without_nan(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def shown(value: object) -> str:
    """A wrong value as it may stand in a line."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def field(content: dict, name: str, where: str) -> Any:
    """What an object holds under a name that it must have."""
    if name not in content:
        raise UserError(f"{where} lacks the field {name!r}")
    return content[name]


def whole(value: Any, where: str, *, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{where} must be a whole number of at least {least}, got {shown(value)}")
    if value > LARGEST:
        raise UserError(f"{where} must be a whole number of at most {LARGEST}, got {shown(value)}")
    return value


def finite(value: Any, where: str, *, least: float = -math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
        bound = "" if least == -math.inf else f" of at least {least:g}"
        raise UserError(f"{where} must be a number{bound}, got {shown(value)}")
    try:
        return float(value)
    except OverflowError:
        raise UserError(f"{where} is too large a number: {shown(value)}") from None


def text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where} must be a text, got {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} holds half a surrogate pair, which is no text: {shown(value)}") from None
    return value


def members(value: Any, where: str) -> dict[str, Any]:
    """The fields of an object."""
    if not isinstance(value, dict):
        raise UserError(f"{where} must be an object, got {shown(value)}")
    return value


def items(value: Any, where: str, read: Callable[..., Any], **bounds: float) -> list:
    """The entries of a list, each read by one of the functions here.

    Args:
        bounds: of every entry, as `read` takes them.
    """
    if not isinstance(value, list):
        raise UserError(f"{where} must be a list, got {shown(value)}")
    return [read(entry, f"{where}[{i}]", **bounds) for i, entry in enumerate(value)]
