"""What a report is made of, before it is drawn: sections of figures, tables, facts and notes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import altair as alt
import pandas as pd

from msmoe.units import human_bytes

ERROR = "relative output error: squared, token-weighted, on held-out tokens"
ERROR_MEANING = (
    "Relative output error: squared change of a layer's gate-weighted output over its square, summed over held-out "
    "tokens that the original model shows the layer, each as often as the calibration tokens it stands for. 0 % is "
    "unchanged, 100 % as far off as no output at all; more than 100 % is possible, where an expert answers with "
    "something else rather than with less."
)
Format = Literal["text", "integer", "share", "number", "bytes"]


@dataclass(frozen=True)
class Figure:
    """A chart.

    Attributes:
        name: of its files, letters, digits and hyphens; unique in the report.
        reading: one sentence: what is plotted, in which unit, what to look for.
        chart: the interactive one; a width of `container` fills the page.
        still: what is drawn into PNG and SVG files where the interactive one shows a part at a time; default: `chart`
            with its controls as they are at first.
    """

    name: str
    title: str
    reading: str
    chart: alt.TopLevelMixin
    still: alt.TopLevelMixin | None = None


@dataclass(frozen=True)
class Column:
    """A column of a table: the field of the frame, its heading, how its values read, and what they are.

    Attributes:
        by: field of the number that a text shows, such as one with its interval: sorting compares it.
        strong: field that says which values are emphasised.
    """

    field: str
    heading: str
    format: Format = "text"
    help: str = ""
    by: str = ""
    strong: str = ""

    @property
    def is_text(self) -> bool:
        return self.format == "text" and not self.by

    def show(self, value: Any) -> str:
        """The value as text; a missing one is a dash."""
        if value is None or value is pd.NA or (isinstance(value, float) and value != value):
            return "-"
        if self.format == "integer":
            return f"{int(value):,}"
        if self.format == "share":
            return f"{value:.1%}"
        if self.format == "number":
            return f"{value:.4g}"
        return human_bytes(value) if self.format == "bytes" else str(value)


@dataclass(frozen=True)
class Table:
    """A table that sorts and filters; all of `frame`, also fields that are not shown, is in its CSV file.

    Attributes:
        name: of its file, as a figure's.
        is_essential: also shown where there is only text.
    """

    name: str
    title: str
    reading: str
    frame: pd.DataFrame
    columns: tuple[Column, ...]
    is_essential: bool = False


@dataclass(frozen=True)
class Fact:
    """A number that stands for itself."""

    label: str
    value: str
    hint: str = ""


@dataclass(frozen=True)
class Facts:
    """Numbers side by side."""

    facts: tuple[Fact, ...]


@dataclass(frozen=True)
class Note:
    """A sentence, for example on what is missing and how to get it; `items` are a list below it."""

    text: str
    items: tuple[str, ...] = ()


Block = Figure | Table | Facts | Note


@dataclass(frozen=True)
class Section:
    """A chapter.

    Attributes:
        key: anchor in the page.
        lead: its finding in a sentence or two, with the numbers.
    """

    key: str
    title: str
    lead: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Document:
    """A whole report."""

    title: str
    subtitle: str
    sections: tuple[Section, ...]

    def figures(self) -> list[Figure]:
        return [block for section in self.sections for block in section.blocks if isinstance(block, Figure)]

    def tables(self) -> list[Table]:
        return [block for section in self.sections for block in section.blocks if isinstance(block, Table)]


def printable(text: str) -> str:
    """Text without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def shorten(text: str, length: int = 40) -> str:
    """Printable text of at most `length` characters, cut in the middle."""
    text = printable(text)
    half = (length - 1) // 2
    return text if len(text) <= length else f"{text[: length - 1 - half]}…{text[-half:]}"


def distinct(labels: Sequence[str], length: int = 40) -> list[str]:
    """Printable labels of at most `length` characters, numbered from the second on where some would be the same."""
    found: dict[str, None] = {}
    for label in labels:
        short, number = shorten(label, length), 2
        while short in found:
            short, number = f"{shorten(label, length - 6)} ({number})", number + 1
        found[short] = None
    return list(found)
