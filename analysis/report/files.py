"""Figures as PNG and SVG, tables as CSV."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import altair as alt
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
    figures = document.figures()
    for done, figure in enumerate(figures):
        tell(done, len(figures), figure.name)
        draw_images(figure.still or figure.chart, out / figure.name, title=figure.title)
    for table in document.tables():
        text = encodable(table.frame.to_csv(index=False, lineterminator="\n"))
        (out / f"{table.name}.csv").write_text(text, encoding="utf-8")
    tell(len(figures), len(figures), "")


def draw_images(chart: alt.TopLevelMixin, out: Path, *, title: str, reading: str = "") -> list[Path]:
    """Draw a chart as PNG and as SVG, under a title on white.

    Args:
        out: the files without their endings.
        reading: what stands below the title; default: how the chart's controls are set.
    """
    import vl_convert

    spec = encodable(json.dumps(to_spec(chart, title=title, reading=reading), ensure_ascii=False))
    files = [out.parent / f"{out.name}.{ending}" for ending in ("png", "svg")]
    files[0].write_bytes(vl_convert.vegalite_to_png(spec, scale=SCALE))
    files[1].write_text(renumbered(vl_convert.vegalite_to_svg(spec)), encoding="utf-8")
    return files


def renumbered(svg: str) -> str:
    """The picture with its gradients counted from 0, not from the first that this process drew."""
    numbers = {name: f"gradient_{i}" for i, name in enumerate(dict.fromkeys(re.findall(r'id="(gradient_\d+)"', svg)))}
    return re.sub(r'(id="|url\(#)(gradient_\d+)', lambda found: found[1] + numbers[found[2]], svg)
