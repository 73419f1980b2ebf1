"""Figures as PNG and SVG, tables as CSV."""

import json
from collections.abc import Callable
from pathlib import Path

from msmoe.analysis.report.charts import to_spec
from msmoe.analysis.report.document import Document
from msmoe.analysis.report.page import encodable

from msmoe.files import write_into

SCALE = 2  # pixels of a PNG for one of the chart


def write_files(document: Document, out: Path, *, force: bool, tell: Callable[[int, int, str], None]) -> list[Path]:
    """Write every figure and table into a folder: all of them, or none if something stops it.

    Raises:
        UserError: if a file exists without `force`, or cannot be written.
    """
    names = [f"{figure.name}.{ending}" for figure in document.figures() for ending in ("png", "svg")]
    names += [f"{table.name}.csv" for table in document.tables()]
    with write_into(out, names, force=force) as folder:
        draw_files(document, folder, tell)
    return [out / name for name in names]


def draw_files(document: Document, out: Path, tell: Callable[[int, int, str], None]) -> None:
    """Draw into an empty folder."""
    import vl_convert

    figures = document.figures()
    for done, figure in enumerate(figures):
        tell(done, len(figures), figure.name)
        spec = encodable(json.dumps(to_spec(figure.still or figure.chart, title=figure.title), ensure_ascii=False))
        (out / f"{figure.name}.png").write_bytes(vl_convert.vegalite_to_png(spec, scale=SCALE))
        (out / f"{figure.name}.svg").write_text(vl_convert.vegalite_to_svg(spec), encoding="utf-8")
    for table in document.tables():
        text = encodable(table.frame.to_csv(index=False, lineterminator="\n"))
        (out / f"{table.name}.csv").write_text(text, encoding="utf-8")
    tell(len(figures), len(figures), "")
