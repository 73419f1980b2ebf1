"""Tables and figures of a comparison, from its results.json alone.

python -m msmoe.analysis.compare results.json --out DIR
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from msmoe.analysis.comparison_figures import FIGURES, write_figures
from msmoe.analysis.comparison_tables import comparison_csv, latex, latex_document, markdown
from msmoe.analysis.cost_tables import cost_csv, cost_markdown

from msmoe.comparison.reading import load_comparison
from msmoe.comparison.scoring import summarise
from msmoe.errors import UserError
from msmoe.files import write_into

TABLES = "comparison_tables"


def write_all(results: dict, out: Path, *, force: bool = False) -> list[Path]:
    """Write every table and figure of a comparison into a folder.

    `comparison.md` shows the tables and figures, `comparison.csv` and `comparison_cost.csv` have every number,
    `comparison_tables.tex` is to be read into a paper and `comparison.tex` compiles by itself; figures are PNG and SVG.

    Args:
        results: content of results.json.
        out: folder, made if it does not exist.
        force: replace files of an earlier report.

    Returns:
        The files, the report first. A figure without data is left out.

    Raises:
        UserError: if the results are no comparison, a file exists without `force`, or cannot be written.
    """
    out = Path(out)
    summary, costs = summarise(results), results.get("cost") or {}
    targets = [
        *[f"comparison.{ending}" for ending in ("md", "csv", "tex")],
        "comparison_cost.csv",
        f"{TABLES}.tex",
        *[f"{name}.{ending}" for name in FIGURES for ending in ("png", "svg")],
    ]
    with write_into(out, targets, force=force) as folder:
        figures = write_figures(summary, folder)
        shown = [path.name for path in figures if path.suffix == ".png"]
        texts = {
            "comparison.md": markdown(summary, figures=shown) + cost_markdown(costs),
            "comparison.csv": comparison_csv(summary),
            "comparison.tex": latex_document(TABLES),
            f"{TABLES}.tex": latex(summary),
            **({"comparison_cost.csv": cost_csv(costs)} if costs else {}),
        }
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    return [out / name for name in [*texts, *(figure.name for figure in figures)]]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results.json of `msmoe compare`")
    parser.add_argument("--out", type=Path, required=True, help="folder for tables and figures")
    parser.add_argument("--force", action="store_true", help="replace the files of an earlier report")
    chosen = parser.parse_args(arguments)
    try:
        written = write_all(load_comparison(chosen.results), chosen.out, force=chosen.force)
    except UserError as error:
        print(f"msmoe.analysis.compare: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for path in written:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
