"""`msmoe inspect`"""

from pathlib import Path

import click

from msmoe.cli.console import console, human_bytes, print_json, table
from msmoe.cli.options import checkpoint_argument, json_option


@click.command("inspect")
@checkpoint_argument
@json_option
def command(checkpoint: Path, as_json: bool) -> None:
    """Show architecture, MoE layers, experts, parameters and bytes. Reads headers only.

    \b
    Example: msmoe inspect switch-base-8
    """
    from msmoe.inspect import inspect

    summary = inspect(checkpoint)
    if as_json:
        print_json(summary.to_dict())
        return
    out = console()
    out.print(
        f"{summary.path}: {summary.model_type}, {summary.num_parameters:,} parameters, "
        f"{human_bytes(summary.num_bytes)} ({', '.join(summary.dtypes)}), expert capacity {summary.expert_capacity}\n"
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
