"""`msmoe plan`"""

from pathlib import Path

import click

from msmoe.cli.console import console, progress, table
from msmoe.cli.options import (
    FACTOR_OPTIONS,
    PLAN_OPTIONS,
    add_options,
    checkpoint_argument,
    choices_of,
    force_option,
    json_option,
    seed_option,
)

WORDS = {
    "remove": "removed",
    "nearest": "their tokens go to the nearest kept one",
    "mean-output": "their mean output in their place",
}


@click.command("plan")
@checkpoint_argument
@click.option(
    "--stats", required=True, type=click.Path(path_type=Path), help="Statistics directory of `msmoe profile`."
)
@click.option("--method", default="m-smoe-refit", show_default=True, help="A row of `msmoe methods`.")
@click.option("--out", type=click.Path(path_type=Path), help="Plan file to write; not needed with --dry-run.")
@add_options(PLAN_OPTIONS)
@add_options(FACTOR_OPTIONS)
@click.option(
    "--export",
    help="Export that the plan is for; its size is predicted. Default: exact for Switch, native for decoders.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and its predicted size, write nothing.")
@seed_option
@force_option
@json_option
def command(
    checkpoint: Path, stats: Path, method: str, out: Path | None, export: str, dry_run: bool, seed: int, force: bool,
    as_json: bool, **options,
) -> None:  # fmt: skip
    """Decide which experts are kept and what becomes of the others. The plan is a small JSON file to read and edit.

    \b
    Example: msmoe plan switch-base-8 --stats stats --method m-smoe --experts 2 --out plan.json
    """
    from msmoe.errors import UserError
    from msmoe.places import FILE, check_place
    from msmoe.planning.planner import plan

    if out is None and not dry_run:
        raise UserError("give --out PLAN.json, or --dry-run to see the plan only")
    if out is not None and not dry_run:
        check_place(out, FILE, force=force, inputs=[checkpoint, stats])
    with progress("planning"):
        result = plan(checkpoint, stats, method=method, seed=seed, export=export, **choices_of(options))
    if out is not None and not dry_run:
        result.save(out)
    if as_json:
        click.echo(result.to_json(), nl=False)
    else:
        print_plan(result)


def print_plan(plan) -> None:
    """The groups of every layer, dominant expert first, and the predicted size."""
    out = console()
    others = plan.parameters.others
    what = "" if others == "merge" else f", experts not kept: {WORDS.get(others, others)}"
    rows = table("layer", "experts", "kept", title=f"Plan: {plan.method}{what}")
    rows.add_column("groups (dominant < members)", justify="left", overflow="fold")
    for name, layer in plan.layers.items():
        removed = f"  without {','.join(map(str, layer.removed))}" if layer.removed else ""
        groups = "  ".join(map(str, layer.groups)) + removed
        rows.add_row(name, str(layer.num_experts), str(len(layer.groups)), groups)
    out.print(rows)
    for name, note in plan.notes.items():
        out.print(f"{name}: {note}")
    for line in plan.remarks:
        out.print(line, highlight=False, markup=False)
