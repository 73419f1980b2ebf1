"""A report as one HTML file that needs nothing else: charts, their data and the library that draws them are inside."""

import json
import math
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from msmoe.analysis.report.charts import to_spec
from msmoe.analysis.report.document import Column, Document, Table

ASSETS = Path(__file__).with_name("assets")
MAX_ROWS = 400  # of a table on the page
NO_BREAK = "\N{NO-BREAK SPACE}"
DIGITS = 5  # significant ones of numbers in charts


@dataclass(frozen=True)
class Cell:
    text: str
    value: str  # what sorting compares
    is_text: bool
    is_strong: bool
    is_score: bool  # a number with what belongs to it, which may stand on lines of their own


def to_html(document: Document) -> str:
    """The whole page."""
    import vl_convert

    specs, datasets = pack_charts(document)
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html.j2").render(
        document=document,
        css=(ASSETS / "page.css").read_text(encoding="utf-8"),
        js=(ASSETS / "page.js").read_text(encoding="utf-8"),
        vega=vl_convert.javascript_bundle(),
        specs=script_json(specs),
        datasets=script_json(datasets),
        kind_of=lambda block: type(block).__name__,
        rows_of=table_rows,
        words=words,
        version=version("msmoe"),
    )
    return encodable(page)


def encodable(text: str) -> str:
    """Text that can be written as UTF-8: names may hold half a surrogate pair."""
    return text.encode("utf-8", "replace").decode("utf-8")


def pack_charts(document: Document) -> tuple[dict[str, dict], dict[str, dict]]:
    """Specifications by figure, and the data of all of them, each once."""
    specs, datasets = {}, {}
    for figure in document.figures():
        spec = to_spec(figure.chart) | {"description": f"{figure.title}. {figure.reading}"}
        own: dict[str, list] = spec.pop("datasets", {})
        specs[figure.name] = spec | {"uses": list(own)}
        datasets |= {name: rows for name, rows in own.items() if name not in datasets}
    return specs, {name: pack(rows) for name, rows in datasets.items()}


def pack(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows as columns: numbers rounded, texts that repeat as codes into a list."""
    fields = dict.fromkeys(field for row in rows for field in row)
    columns = {}
    for field in fields:
        values = [rounded(row.get(field)) for row in rows]
        if all(isinstance(value, str) for value in values) and len(levels := dict.fromkeys(values)) < len(values) / 2:
            codes = {level: i for i, level in enumerate(levels)}
            columns[field] = {"levels": list(levels), "codes": [codes[value] for value in values]}
        else:
            columns[field] = {"values": values}
    return {"length": len(rows), "columns": columns}


def rounded(value: Any) -> Any:
    """A number with few digits; no number is null."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def script_json(content: object) -> str:
    """JSON that can stand inside a script element: no text in it ends the element or starts a comment."""
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return (
        text.replace("&", "\\u0026")
        .replace("<", "\\u003c")
        .replace(">", "\\u003e")
        .replace("\u2028", "\\u2028")
        .replace("\u2029", "\\u2029")
    )


def words(text: str) -> Markup:
    """Text with what stands between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def table_rows(table: Table) -> list[list[Cell]]:
    """Cells of the rows that stand on the page."""
    return [[cell(column, row) for column in table.columns] for row in table.frame.head(MAX_ROWS).to_dict("records")]


def cell(column: Column, row: dict) -> Cell:
    value = row[column.by or column.field]
    is_missing = value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))
    text, is_strong = column.show(row[column.field]), bool(column.strong) and bool(row[column.strong])
    text = text.replace(", ", f",{NO_BREAK}") if column.by else text
    return Cell(text, "" if is_missing else str(value), column.is_text, is_strong, bool(column.by))
