"""`msmoe compare`"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from msmoe.cli.console import console, print_json, progress, table
from msmoe.cli.options import (
    AT_LEAST_ONE,
    DATA_FORMATS,
    checkpoint_argument,
    columns_option,
    device_option,
    dtype_option,
    force_option,
    json_option,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

COST_TITLE = "Cost; in brackets: times that of the full model, measured in the same process in turns"
GAP = 2  # blanks between columns


@click.command("compare")
@checkpoint_argument
@click.option("--data", required=True, help=f"Calibration data: {DATA_FORMATS.replace('- for standard input; ', '')}.")
@click.option("--tasks", required=True, multiple=True, help="Task file, or a folder of them (repeatable).")
@click.option(
    "--methods",
    default="all",
    show_default=True,
    help="Comma-separated rows of `msmoe methods`, or all. A method may carry options of `msmoe plan`: "
    "reap:others=nearest. The full model and one expert per layer are always there.",
)
@click.option(
    "--experts",
    default="8,4,2",
    show_default=True,
    help="Sizes: experts kept per layer by m-smoe, or shares of them such as 25%. What it "
    "stores is the budget in bytes of every method.",
)
@click.option(
    "--recover-steps",
    default="0",
    show_default=True,
    help="Lengths of the recovery after compression, the same for every method; 0 is none. E.g. 0,500.",
)
@click.option("--recover-data", help="What recovery trains on; default: the calibration data.")
@click.option("--seeds", type=AT_LEAST_ONE, default=3, show_default=True, help="Seeds 0, 1, ... of everything random.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for everything.")
@click.option("--resume", is_flag=True, help="Go on in an existing folder: only what is new is done.")
@click.option(
    "--processes", type=AT_LEAST_ONE, default=1, show_default=True, help="Cells measured at once; they share the cores."
)
@click.option("--samples", type=AT_LEAST_ONE, default=256, show_default=True, help="Calibration records per seed.")
@click.option(
    "--token-sample", type=AT_LEAST_ONE, default=4096, show_default=True, help="Tokens kept per layer; see profile."
)
@click.option("--max-examples", type=AT_LEAST_ONE, help="Use a seeded choice of this many examples per task.")
@click.option("--metric", help="exact_match (default where a task has labels) or loss.")
@click.option(
    "--keep-layer", "keep_layers", multiple=True, metavar="NAME", help="Leave this layer as it is; see `msmoe plan`."
)
@click.option(
    "--export",
    help="Decoders: native (default), their own class, with as many experts in every layer; or exact. Methods that "
    "native cannot hold are exact within the same bytes.",
)
@click.option("--cost/--no-cost", default=True, help="Also measure FLOPs, speed and memory. On by default.")
@click.option("--learning-rate", type=float, default=3e-4, show_default=True, help="Of the recovery.")
@click.option("--batch-size", type=AT_LEAST_ONE, default=16, show_default=True, help="Of the recovery.")
@click.option("--kd-weight", type=float, default=0.2, show_default=True, help="Distillation in the recovery's loss.")
@click.option("--hidden-weight", type=float, default=0.0, show_default=True, help="Hidden states in that loss.")
@columns_option
@device_option
@dtype_option
@force_option
@json_option
def command(
    checkpoint: Path, data: str, tasks: tuple[str, ...], methods: str, experts: str, recover_steps: str,
    recover_data: str | None, seeds: int, out: Path, resume: bool, processes: int, samples: int, token_sample: int,
    max_examples: int | None, metric: str | None, keep_layers: tuple[str, ...], export: str | None, cost: bool,
    force: bool, as_json: bool, columns: dict[str, str] | None, device: str, dtype: str, **recovery,
) -> None:  # fmt: skip
    """Compare methods at the same stored bytes on the same calibration data and tasks, in one table.

    \b
    Example: msmoe compare switch-base-8 --data calibration.jsonl --tasks tasks --methods m-smoe,reap --out cmp
    DIR gets results.json, and made from it alone: comparison.md, .csv, .tex and figures (PNG, SVG).
    An interrupted run goes on with --resume; --resume with more methods, sizes or seeds does what is new.
    """
    from msmoe.analysis.compare import write_all
    from msmoe.comparison.run import compare
    from msmoe.comparison.settings import REFERENCES
    from msmoe.planning.methods import METHODS

    every = [name for name in METHODS if name not in REFERENCES]
    sizes = split(experts, number_or_share, "--experts")
    names = [n for given in split(methods, str, "--methods") for n in (every if given == "all" else [given])]
    options = {"metric": metric} if metric else {}
    with kept_cells_named(out), progress("comparing") as update:
        results = compare(
            checkpoint, out, data=data, tasks=tasks, methods=names, experts=sizes,
            recover_steps=tuple(split(recover_steps, int, "--recover-steps")), recover_data=recover_data,
            seeds=tuple(range(seeds)), processes=processes, samples=samples, token_sample=token_sample,
            max_examples=max_examples, explicit_metric=metric is not None, keep_layers=keep_layers or None, cost=cost,
            resume=resume, force=force, recovery=recovery, columns=columns, device=device, dtype=dtype,
            export=export, progress=update, tell=lambda text: click.echo(f"msmoe: {text}", err=True), **options,
        )  # fmt: skip
    written = write_all(results, out, force=True)
    if as_json:
        print_json(results)
        return
    print_results(results)
    console().print(f"wrote {out / 'results.json'}, {', '.join(str(file.relative_to(out)) for file in written)}")


@contextlib.contextmanager
def kept_cells_named(out: Path) -> Iterator[None]:
    """After an interrupt, say how to go on."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        count = len(list((out / "cells").glob("*.json")))
        interrupt.add_note(f"{count} cells are kept in {out}: --resume goes on from there")
        raise


def number_or_share(text: str) -> float | str:
    """The number in a text; a percentage stays as it is."""
    return text if text.endswith("%") else float(text)


def split(text: str, kind: Callable[[str], Any], option: str) -> list:
    """The values of a comma-separated option.

    Raises:
        UserError: for a value of another kind.
    """
    from msmoe.errors import UserError

    try:
        return [kind(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UserError(f"{option} must be comma-separated numbers, got {text!r}") from None


def print_results(results: dict) -> None:
    """One table per size, the costs, and what to be careful about."""
    from rich.text import Text

    from msmoe.comparison.scoring import summarise
    from msmoe.comparison.summary import LABELS

    summary, out = summarise(results), console()
    columns = summary.columns()
    for size in summary.sizes:
        rows = []
        for row in size.rows:
            cells = [row.cell(column) for column in columns]
            rows.append([*map(Text, row.labels), *[Text(c.text, style="bold" if c.is_best else "") for c in cells]])
        print_wide(out, size.title, [*LABELS, *[column.heading for column in columns]], rows)
    if results["cost"]:
        print_wide(out, COST_TITLE, *cost_rows(results["cost"]))
    for line in (*summary.legend, *(f"warning: {text}" for text in summary.warnings)):
        out.print(line, markup=False)


def print_wide(out: "Console", title: str, headings: list[str], rows: list[list["Text"]]) -> None:
    """A table; where it is wider than the console, as several below one another, each with the first column."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    for part, chosen in enumerate(fitting(widths, out.width)):
        grid = table(*[headings[i] for i in chosen], title=title if part == 0 else f"{title}, continued")
        for row in rows:
            grid.add_row(*[row[i] for i in chosen])
        out.print(grid)
        out.print()


def fitting(widths: list[int], room: int) -> list[list[int]]:
    """Columns of each table: the first one, and as many of the others as fit beside it, at least one."""
    first, tables, used = widths[0], [[0]], widths[0]
    for i, width in enumerate(widths[1:], start=1):
        if used + GAP + width > room and len(tables[-1]) > 1:
            tables.append([0])
            used = first
        tables[-1].append(i)
        used += GAP + width
    return tables


def cost_rows(costs: dict) -> tuple[list[str], list[list["Text"]]]:
    """Headings and rows of the cost table: every measure, and in brackets what it is times the full model's."""
    from rich.text import Text

    from msmoe.analysis.cost_tables import MEASURES, value

    rows = []
    for name, entry in costs.items():
        pairs = [(value(entry, keys), value(entry["full"], keys), factor) for _, keys, factor in MEASURES]
        cells = [f"{own * factor:,.4g} ({own / full:.2f})" for own, full, factor in pairs]
        rows.append([Text(name), *map(Text, cells)])
    return ["method / experts", *[heading for heading, _, _ in MEASURES]], rows
