"""`msmoe report`"""

import json
import os
import webbrowser
from pathlib import Path

import click

from msmoe.cli.console import console, print_json, progress
from msmoe.cli.options import force_option, json_option
from msmoe.errors import UserError
from msmoe.places import FILE, check_apart, check_place


@click.command("report")
@click.argument("artefacts", metavar="ARTEFACT...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="HTML file to write: one page that needs nothing else.")
@click.option(
    "--figures", type=click.Path(path_type=Path), help="Folder for every figure as PNG and SVG, every table as CSV."
)
@click.option("--terminal", is_flag=True, help="Print the essentials as text.")
@click.option(
    "--thorough",
    is_flag=True,
    help="Forecast every layer at every size and measure all there is, however long it takes; without it, a few "
    "seconds' worth.",
)
@click.option("--open", "opens", is_flag=True, help="Open the page in the browser.")
@force_option
@json_option
def command(
    artefacts: tuple[Path, ...], out: Path | None, figures: Path | None, terminal: bool, thorough: bool, opens: bool,
    force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Show what statistics, plans, checkpoints and results say: a page to read, figures for a paper.

    \b
    ARTEFACT is any of these, alone or together, of one model; what is missing is said in the report:
      statistics    expert usage by layer, expert and domain
      plan.json     who merges into whom
      checkpoint    original: sizes, similarities and how far it can be compressed (with statistics);
                    compressed: what it cost
      results       of `msmoe compare` and `msmoe evaluate`
    Example: msmoe report switch-base-8 stats plan.json switch-small --out report.html
    """
    from msmoe.analysis.report import report
    from msmoe.analysis.report.terminal import to_text

    if not (out or figures or terminal or as_json):
        raise UserError("nowhere to report to: give --out FILE, --figures DIR, --terminal or --json")
    if opens and out is None:
        raise UserError("--open needs --out FILE")
    check_page(out, artefacts, force=force)
    for artefact in artefacts if figures is not None else ():
        check_apart(figures, artefact)
    with progress("reading") as update:
        made = report(*artefacts, thorough=thorough, tell=update)
    if as_json:
        print_json({name: json.loads(str(frame.to_json(orient="records"))) for name, frame in made.tables.items()})
    if figures is not None:
        with progress("drawing") as update:
            written = made.save_figures(figures, force=force, tell=update)
        click.echo(f"wrote {len(written)} files into {figures}", err=as_json)
    if out is not None:
        made.save(out, force=force)
        click.echo(f"wrote {out}", err=as_json)
    if terminal:
        console().print(to_text(made))
    if opens and out is not None:
        webbrowser.open(out.resolve().as_uri())


def check_page(out: Path | None, artefacts: tuple[Path, ...], *, force: bool) -> None:
    """Refuse a page in the place of a folder, of what it is made from, or of a file without --force."""
    if out is None:
        return
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: give the name of a file, such as {out / 'report.html'}")
    if os.path.realpath(out) in map(os.path.realpath, artefacts):  # a link to itself has no other resolution
        raise UserError(f"--out {out} is one of the artefacts: give another name")
    check_place(out, FILE, force=force, inputs=artefacts)
