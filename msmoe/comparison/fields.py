"""JSON of somebody's file, read field by field: each value is checked, and a wrong one is named by its place."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from msmoe import strict_json
from msmoe.errors import UserError

MAX_SHOWN = 40  # characters of a value in an error


def load_json(path: Path) -> object:
    """The content of a JSON file.

    Raises:
        UserError: if it cannot be read, or is no JSON.
    """
    try:
        return json.loads(strict_json.read_text(path, "a file of results or a plan"))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {error}") from error


@dataclass(frozen=True)
class Field:
    """A value and its place in the file, such as `cells[3].seed`; empty for the whole."""

    value: object
    place: str = ""

    def fail(self, allowed: str) -> UserError:
        """The error that names the place, the value and what is allowed."""
        shown = repr(self.value)
        shown = shown if len(shown) <= MAX_SHOWN else f"{shown[: MAX_SHOWN - 1]}…"
        return UserError(f"{self.place or 'the content'} must be {allowed}, got {shown}")

    def items(self) -> list[tuple[str, "Field"]]:
        """Names and fields of an object."""
        if not isinstance(self.value, dict):
            raise self.fail("an object")
        return [(name, Field(value, f"{self.place}.{name}".lstrip("."))) for name, value in self.value.items()]

    def __getitem__(self, name: str) -> "Field":
        found = dict(self.items())
        if name not in found:
            where = f" in {self.place}" if self.place else ""
            raise UserError(f"a field '{name}' is missing{where}")
        return found[name]

    def get(self, name: str) -> "Field | None":
        """The field of an object; None where it is missing or null."""
        found = dict(self.items()).get(name)
        return None if found is None or found.value is None else found

    def elements(self) -> list["Field"]:
        if not isinstance(self.value, list):
            raise self.fail("a list")
        return [Field(value, f"{self.place}[{i}]") for i, value in enumerate(self.value)]

    def text(self) -> str:
        if not isinstance(self.value, str):
            raise self.fail("a text")
        return self.value

    def one_of(self, allowed: Iterable[str]) -> str:
        names = tuple(allowed)
        if self.value not in names:
            raise self.fail(f"one of {', '.join(names)}")
        return self.text()

    def integer(self, *, least: int = 0) -> int:
        if not isinstance(self.value, int) or isinstance(self.value, bool) or not least <= self.value < 2**63:
            raise self.fail(f"a whole number, at least {least}")
        return self.value

    def number(self, *, least: float = -math.inf, above: float = -math.inf, most: float = math.inf) -> float:
        """A finite number from `least` to `most`, more than `above`."""
        is_number = isinstance(self.value, int | float) and not isinstance(self.value, bool)
        if not is_number or not abs(self.value) <= 1e300 or not max(least, above) <= self.value <= most:
            raise self.fail(range_text(least, above, most))
        if self.value == above:
            raise self.fail(range_text(least, above, most))
        return float(self.value)


def range_text(least: float, above: float, most: float) -> str:
    """What numbers are allowed, in words."""
    parts = [f"at least {least:g}"] if math.isfinite(least) else []
    parts += [f"more than {above:g}"] if math.isfinite(above) else []
    parts += [f"at most {most:g}"] if math.isfinite(most) else []
    return ", ".join(["a finite number", *parts])
