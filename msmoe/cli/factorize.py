"""`msmoe factorize`"""

from pathlib import Path

import click

from msmoe.cli.console import console, print_json, progress, table
from msmoe.cli.options import (
    FACTOR_OPTIONS,
    add_options,
    checkpoint_argument,
    force_option,
    json_option,
    parse_size,
)
from msmoe.cli.push import push_option
from msmoe.units import human_bytes


@click.command("factorize")
@checkpoint_argument
@click.option(
    "--stats",
    type=click.Path(path_type=Path),
    help="Statistics of the checkpoint, or of the original that it was compressed from; needed by budgets.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Checkpoint folder to write.")
@add_options(FACTOR_OPTIONS)
@click.option(
    "--refit/--no-refit",
    default=None,
    help="Solve wo again for the hidden activations of the truncated wi; default with statistics.",
)
@click.option(
    "--keep-layer",
    "keep_layers",
    multiple=True,
    metavar="NAME",
    help="Leave this layer as it is (repeatable). Default: the first MoE layer of the encoder; 'none' keeps none.",
)
@click.option(
    "--export",
    default="exact",
    show_default=True,
    help="exact: store the factors; native: multiply them out into a stock checkpoint of the same size.",
)
@click.option(
    "--original",
    type=click.Path(path_type=Path),
    help="Checkpoint before merging: the report then has its stable ranks as well.",
)
@click.option("--max-shard-size", default="5GB", show_default=True, help="Largest weight file.")
@force_option
@click.option("--resume", is_flag=True, help="Finish what a killed run left.")
@push_option
@json_option
def command(
    checkpoint: Path, stats: Path | None, out: Path, refit: bool | None, keep_layers: tuple[str, ...], export: str,
    original: Path | None, max_shard_size: str, force: bool, resume: bool, as_json: bool, **options,
) -> None:  # fmt: skip
    """Store each expert matrix as low rank plus a few rows, W = U V + S: smaller on disk and in memory.

    \b
    A matrix whose factors would be larger stays dense. `msmoe recover` trains the result.
    Example: msmoe factorize switch-small --stats stats --rank 32 --keep-rows 0.10 --out switch-tiny
    """
    from msmoe.compression.factorize import factorize
    from msmoe.planning.parameters import FACTOR_CHOICES

    given = {name: options[name] for name in FACTOR_CHOICES if options[name] is not None}
    with progress("factorising") as update:
        report = factorize(
            checkpoint, out, stats=stats, refit=refit, keep_layers=list(keep_layers) or None, export=export,
            original=original, force=force, resume=resume, max_shard_bytes=parse_size(max_shard_size),
            progress=update, **given,
        )  # fmt: skip
    print_factors(report, as_json=as_json)


def print_factors(report, *, as_json: bool) -> None:
    """Per layer and matrix: shape, bytes beside dense, energy held, errors.

    Args:
        report: `msmoe.FactorizeReport`.
    """
    if as_json:
        print_json(
            {
                "out": str(report.out),
                "num_parameters": report.num_parameters,
                "bytes": report.num_bytes,
                "shapes": {n: {m: list(shape) for m, shape in layer.items()} for n, layer in report.shapes.items()},
                "dense": [list(pair) for pair in report.dense],
                "predicted_error": report.predicted_error,
                "matrices": report.matrices,
            }
        )
        return
    out = console()
    out.print(rank_table(report.matrices))
    for layer, matrix in report.dense:
        reason = "its factors would be larger" if report.predicted_error is None else "the budget buys most that way"
        out.print(f"{matrix} of {layer} stays dense: {reason}")
    size = f"{report.num_bytes:,} bytes ({human_bytes(report.num_bytes)})"
    out.print(f"wrote {report.out}: {report.num_parameters:,} parameters, {size}")


def rank_table(matrices: list[dict]):
    """One row per layer and matrix, experts averaged.

    Args:
        matrices: entries of `msmoe.lowrank.measures.MatrixReport`.
    """
    rows = table(
        "layer", "matrix", "experts", "rank", "rows", "break-even rank", "stable rank", "before merging", "energy",
        "weight error", "output error", title="Factors (errors relative: |W - W'| / |W|, and squared for outputs)",
    )  # fmt: skip
    for layer, matrix in dict.fromkeys((m["layer"], m["matrix"]) for m in matrices):
        mine = [m for m in matrices if (m["layer"], m["matrix"]) == (layer, matrix)]

        def mean(name: str, spec: str, mine=mine) -> str:
            values = [m[name] for m in mine if m.get(name) is not None]
            return format(sum(values) / len(values), spec) if values else "-"

        first = mine[0]
        rows.add_row(
            layer, matrix, str(len(mine)), "dense" if first["rank"] is None else str(first["rank"]),
            "-" if first["num_rows"] is None else str(first["num_rows"]), str(first["break_even_rank"]),
            mean("stable_rank", ".1f"),
            mean("stable_rank_before", ".1f"), mean("energy", ".3f"), mean("weight_error", ".3f"),
            mean("output_error", ".4f"),
        )  # fmt: skip
    return rows
