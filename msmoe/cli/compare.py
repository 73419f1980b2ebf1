"""`msmoe compare`"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import click

from msmoe.cli.console import console, print_json, progress, table
from msmoe.cli.options import AT_LEAST_ONE, checkpoint_argument, force_option, json_option
from msmoe.units import human_bytes

RECOVERY_NAMES = ("learning_rate", "batch_size", "kd_weight", "hidden_weight")


@click.command("compare")
@checkpoint_argument
@click.option("--data", required=True, help="Calibration data: a JSON Lines file, or a datasets name.")
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
    help="Sizes: experts kept per layer by m-smoe. What it stores is the budget in bytes of every method.",
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
@click.option("--cost/--no-cost", default=True, help="Also measure FLOPs, speed and memory. On by default.")
@click.option("--learning-rate", type=float, default=3e-4, show_default=True, help="Of the recovery.")
@click.option("--batch-size", type=AT_LEAST_ONE, default=16, show_default=True, help="Of the recovery.")
@click.option("--kd-weight", type=float, default=0.2, show_default=True, help="Distillation in the recovery's loss.")
@click.option("--hidden-weight", type=float, default=0.0, show_default=True, help="Hidden states in that loss.")
@force_option
@json_option
def command(
    checkpoint: Path, data: str, tasks: tuple[str, ...], methods: str, experts: str, recover_steps: str,
    recover_data: str | None, seeds: int, out: Path, resume: bool, processes: int, samples: int, token_sample: int,
    max_examples: int | None, metric: str | None, keep_layers: tuple[str, ...], cost: bool, force: bool, as_json: bool,
    **recovery,
) -> None:  # fmt: skip
    """Compare methods at the same stored bytes on the same calibration data and tasks, in one table.

    \b
    Example: msmoe compare switch-base-8 --data calibration.jsonl --tasks tasks --methods m-smoe,reap --out cmp
    DIR gets results.json, and made from it alone: comparison.md, .csv, .tex and figures (PNG, SVG).
    An interrupted run goes on with --resume; --resume with more methods, sizes or seeds does what is new.
    """
    from msmoe.analysis.compare import write_all
    from msmoe.compare.run import compare
    from msmoe.compare.settings import REFERENCES
    from msmoe.methods import METHODS

    every = [name for name in METHODS if name not in REFERENCES]
    names = [n for given in split(methods, str, "--methods") for n in (every if given == "all" else [given])]
    options = {"metric": metric} if metric else {}
    with kept_cells_named(out), progress("comparing") as update:
        results = compare(
            checkpoint, out, data=data, tasks=tasks, methods=names, experts=split(experts, float, "--experts"),
            recover_steps=tuple(split(recover_steps, int, "--recover-steps")), recover_data=recover_data,
            seeds=tuple(range(seeds)), processes=processes, samples=samples, token_sample=token_sample,
            max_examples=max_examples, explicit_metric=metric is not None, keep_layers=keep_layers or None, cost=cost,
            resume=resume, force=force, recovery=recovery, progress=update,
            tell=lambda text: click.echo(f"msmoe: {text}", err=True), **options,
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
    except KeyboardInterrupt:
        count = len(list((out / "cells").glob("*.json")))
        click.echo(f"msmoe: {count} cells are kept in {out}: --resume goes on from there", err=True)
        raise


def split(text: str, kind: type, option: str) -> list:
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

    from msmoe.compare.scoring import summarise
    from msmoe.compare.summary import LABELS

    summary, out = summarise(results), console()
    for size in summary.sizes:
        columns = summary.columns()
        rows = table(*LABELS, *[column.heading for column in columns], title=size.title)
        for row in size.rows:
            cells = [row.cell(column) for column in columns]
            rows.add_row(*map(Text, row.labels), *[Text(c.text, style="bold" if c.is_best else "") for c in cells])
        out.print(rows)
        out.print()
    if results["cost"]:
        out.print(cost_table(results["cost"]))
        out.print()
    for line in (*summary.legend, *(f"warning: {text}" for text in summary.warnings)):
        out.print(line, markup=False)


def cost_table(costs: dict) -> "object":
    """FLOPs, throughput, latency and memory, each beside the full model that took turns with it."""
    rows = table(
        "method / experts", "MFLOP/token", "x full", "prefill tokens/s", "x full", "p50 ms", "p95 ms", "x full",
        "generated tokens/s", "x full", "p50 ms", "p95 ms", "x full", "peak memory", "x full", title="Cost",
    )  # fmt: skip
    for name, own in costs.items():
        full, cells = own["full"], [f"{own['flops_per_token'] / 1e6:.2f}", ratio(own, own["full"], "flops_per_token")]
        for stage in ("prefill", "generation"):
            mine, theirs = own[stage], full[stage]
            cells += [
                f"{mine['tokens_per_second']:,.0f}", ratio(mine, theirs, "tokens_per_second"),
                f"{1e3 * mine['p50_seconds']:.1f}", f"{1e3 * mine['p95_seconds']:.1f}",
                ratio(mine, theirs, "p50_seconds"),
            ]  # fmt: skip
        cells += [human_bytes(own["peak_memory_bytes"]), ratio(own, full, "peak_memory_bytes")]
        rows.add_row(name, *cells)
    return rows


def ratio(own: dict, full: dict, key: str) -> str:
    return f"{own[key] / full[key]:.2f}"
