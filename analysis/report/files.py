"""Figures as PNG and SVG, tables as CSV."""

import json
from collections.abc import Callable
from pathlib import Path

from analysis.report.charts import to_spec
from analysis.report.document import Document
from analysis.report.page import encodable
from msmoe.checkpoint import write_whole
from msmoe.errors import UserError

SCALE = 2  # pixels of a PNG for one of the chart


def write_files(document: Document, out: Path, *, force: bool, tell: Callable[[int, int, str], None]) -> list[Path]:
    """Write every figure and table into a folder.

    Raises:
        UserError: if a file exists without `force`, or cannot be written.
    """
    import vl_convert

    figures, tables = document.figures(), document.tables()
    names = [f"{figure.name}.{ending}" for figure in figures for ending in ("png", "svg")]
    names += [f"{table.name}.csv" for table in tables]
    existing = [name for name in names if (out / name).exists()]
    if existing and not force:
        raise UserError(f"{out / existing[0]} exists; use --force to replace it")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for done, figure in enumerate(figures):
            tell(done, len(figures), figure.name)
            spec = encodable(json.dumps(to_spec(figure.still or figure.chart, title=figure.title), ensure_ascii=False))
            (out / f"{figure.name}.png").write_bytes(vl_convert.vegalite_to_png(spec, scale=SCALE))
            write_whole(out / f"{figure.name}.svg", vl_convert.vegalite_to_svg(spec))
        for table in tables:
            write_whole(out / f"{table.name}.csv", encodable(table.frame.to_csv(index=False, lineterminator="\n")))
    except OSError as error:
        raise UserError(f"cannot write into {out}: {error.strerror}") from error
    tell(len(figures), len(figures), "")
    return [out / name for name in names]
