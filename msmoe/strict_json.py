"""JSON files of users, read without surprises: what is wrong is named with its file and field.

The readers of a value take it and `where` it stands, e.g. `plan.json: seed`, and return it or raise `UserError`.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from msmoe.errors import UserError

MAX_SHOWN = 60  # characters of a wrong value


def read_object(path: Path, kind: str) -> dict[str, Any]:
    """The object of a JSON file.

    Args:
        kind: what the file should be, e.g. `a plan file`.

    Raises:
        UserError: if it cannot be read, is no object, names a field twice, or holds NaN or Infinity.
    """
    try:
        content = json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=_distinct, parse_constant=_refuse_constant
        )
    except OSError as error:
        raise UserError(f"{path} is not {kind}: {error.strerror or error}") from error
    except UserError as error:
        raise UserError(f"{path} is not {kind}: {error}") from None
    except ValueError as error:
        raise UserError(f"{path} is not {kind}: it is not readable JSON ({error})") from error
    except RecursionError:
        raise UserError(f"{path} is not {kind}: its JSON is nested too deeply") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not {kind}: it must hold a JSON object, got {shown(content)}")
    return content


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"it names {shown(twice)} twice in one object")
    return content


def _refuse_constant(name: str) -> float:
    raise UserError(f"it holds {name}, which is not a number of JSON")


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
