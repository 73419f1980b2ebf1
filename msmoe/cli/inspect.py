"""`msmoe inspect`"""

from pathlib import Path

import click

from msmoe.cli.console import console, print_json, progress, table
from msmoe.cli.factorize import rank_table
from msmoe.cli.options import checkpoint_argument, json_option
from msmoe.units import human_bytes


@click.command("inspect")
@checkpoint_argument
@click.option(
    "--ranks", is_flag=True, help="Also stable rank, energy and errors of every expert matrix; reads the weights."
)
@click.option("--rank", type=int, help="Rank whose energy and errors --ranks shows; default 32, or as stored.")
@click.option("--stats", type=click.Path(path_type=Path), help="Statistics: --ranks then shows output errors.")
@click.option("--original", type=click.Path(path_type=Path), help="Checkpoint before merging, for its stable ranks.")
@json_option
def command(
    checkpoint: Path, ranks: bool, rank: int | None, stats: Path | None, original: Path | None, as_json: bool
) -> None:
    """Show architecture, MoE layers, experts, parameters and bytes. Reads headers only, but for --ranks.

    \b
    Example: msmoe inspect switch-base-8
    """
    from msmoe.errors import UserError
    from msmoe.families.inspection import inspect

    if not ranks and (rank is not None or stats or original):
        raise UserError("--rank, --stats and --original have no effect without --ranks")
    summary = inspect(checkpoint)
    matrices = None
    if ranks:
        from msmoe.compression.factorize import measure_ranks

        with progress("measuring ranks") as update:
            matrices = measure_ranks(checkpoint, stats=stats, rank=rank, original=original, progress=update)
    if as_json:
        print_json(summary.to_dict() | ({"ranks": matrices} if matrices else {}))
        return
    out = console()
    capacity = "" if summary.expert_capacity is None else f", expert capacity {summary.expert_capacity}"
    out.print(
        f"{summary.path}: {summary.model_type}, {summary.num_parameters:,} parameters, "
        f"{human_bytes(summary.num_bytes)} ({', '.join(summary.dtypes)}){capacity}\n"
    )
    parts = table("part", "parameters", "bytes", "share")
    for name, (count, size) in summary.parts.items():
        parts.add_row(name, f"{count:,}", human_bytes(size), f"{size / summary.num_bytes:.1%}")
    out.print(parts)
    layers = table("MoE layer", "experts", "stored", "d_model", "d_ff", "parameters", "bytes")
    for layer in summary.layers:
        layers.add_row(
            layer.name, str(layer.num_experts), str(layer.num_stored), str(layer.d_model), str(layer.d_ff),
            f"{layer.num_parameters:,}", human_bytes(layer.num_bytes),
        )  # fmt: skip
    out.print()
    out.print(layers)
    if matrices:
        out.print()
        out.print(rank_table(matrices))
