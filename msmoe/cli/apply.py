"""`msmoe apply`"""

from pathlib import Path

import click

from msmoe.cli.console import console, print_json, progress, table
from msmoe.cli.factorize import rank_table
from msmoe.cli.options import APPLY_OPTIONS, add_options, checkpoint_argument, json_option, parse_size
from msmoe.cli.push import push_option
from msmoe.units import human_bytes

ERROR_MEANING = (
    "error: relative output error, squared, of the refitted groups on held-out tokens, each weighed by the calibration "
    "tokens that it stands for; 100 % is as far off as no output"
)
ROUTING_MEANING = (
    "as exported: the same error of the whole layer under the routers of the native export, those that a refit is "
    "solved for, with the weights as written: they have seen the held-out tokens"
)


@click.command("apply")
@checkpoint_argument
@click.option("--plan", "plan_file", required=True, type=click.Path(path_type=Path), help="Plan file of `msmoe plan`.")
@click.option(
    "--stats", type=click.Path(path_type=Path), help="Statistics; needed by plans with refit and by --router fit."
)
@click.option("--data", help="Calibration data; needed by plans with sequential refit.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Checkpoint folder to write.")
@add_options(APPLY_OPTIONS)
@push_option
@json_option
def command(
    checkpoint: Path, plan_file: Path, stats: Path | None, data: str | None, out: Path, export: str, router: str,
    max_shard_size: str, force: bool, resume: bool, as_json: bool,
) -> None:  # fmt: skip
    """Carry out a plan: write the compressed checkpoint, a few experts in memory at a time.

    \b
    Example: msmoe apply switch-base-8 --plan plan.json --stats stats --out switch-small
    """
    from msmoe.compression.apply import apply

    with progress("merging") as update:
        report = apply(
            checkpoint, plan_file, out, stats=stats, data=data, export=export, router=router, force=force,
            resume=resume, max_shard_bytes=parse_size(max_shard_size), progress=update,
        )  # fmt: skip
    print_report(report, as_json=as_json)


def print_report(report, *, as_json: bool) -> None:
    """Per layer: groups merged, neurons moved, relative output error before and after refit, drop rates, router fit.

    Args:
        report: `msmoe.ApplyReport`.
    """
    if as_json:
        print_json(
            {
                "out": str(report.out),
                "num_parameters": report.num_parameters,
                "bytes": report.num_bytes,
                "groups": report.groups,
                "drop_rates": report.drop_rates,
                "dropped": report.dropped,
                "factors": report.factors and report.factors.matrices,
                "routing_costs": {n: {"planned": a, "exported": b} for n, (a, b) in report.routing_costs.items()},
                "routers": {
                    n: {"agreement": r.agreement, "gate_error": r.gate_error} for n, r in report.routers.items()
                },
            }
        )
        return
    from msmoe.compression.layer_errors import refit_errors

    out, costs = console(), report.routing_costs
    dropped_now = "dropped as planned" if costs else "dropped now"  # a reduced router may drop others
    rows = table(
        "layer", "merged groups", "neurons moved", "error before refit", "after refit", "dropped", dropped_now,
        "router agrees", *(["as exported"] if costs else []),
    )  # fmt: skip
    errors = refit_errors(report.groups)
    for name in dict.fromkeys([g["layer"] for g in report.groups] + list(report.routers)):
        groups = [g for g in report.groups if g["layer"] == name]
        moved = [match["share_moved"] for g in groups for match in g.get("alignment", {}).values()]
        drop = report.drop_rates.get(name)
        router = report.routers.get(name)
        rows.add_row(
            name,
            str(len(groups)),
            f"{sum(moved) / len(moved):.0%}" if moved else "-",
            *([f"{error:.1%}" for error in errors[name]] if name in errors else ["-", "-"]),
            f"{drop[0]:.2%}" if drop else "-",
            f"{drop[1]:.2%}" if drop else "-",
            f"{router.agreement:.1%}" if router else "-",
            *([f"{costs[name][1]:.1%}" if name in costs else "-"] if costs else []),
        )
    out.print(rows)
    if errors:
        out.print(ERROR_MEANING)
    if costs:
        out.print(ROUTING_MEANING)
    if report.factors:
        out.print(rank_table(report.factors.matrices))
    for reason, count in report.dropped.items():
        out.print(f"left out {count} tensors: {reason}")
    size = f"{report.num_bytes:,} bytes ({human_bytes(report.num_bytes)})"
    out.print(f"wrote {report.out}: {report.num_parameters:,} parameters, {size}")
