"""`msmoe profile`"""

from pathlib import Path

import click

from msmoe.cli.console import console, print_json, progress, usage_table
from msmoe.cli.options import (
    DATA_FORMATS,
    PROFILE_OPTIONS,
    add_options,
    checkpoint_argument,
    force_option,
    json_option,
    seed_option,
)
from msmoe.places import STATISTICS, check_place


@click.command("profile")
@checkpoint_argument
@click.option("--data", required=True, multiple=True, help=f"Calibration data (repeatable): {DATA_FORMATS}.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Statistics directory to write.")
@add_options(PROFILE_OPTIONS)
@seed_option
@force_option
@json_option
def command(checkpoint: Path, data: tuple[str, ...], out: Path, force: bool, as_json: bool, **options) -> None:
    """Record how often the router activates each expert on calibration data, and all that planning needs.

    \b
    A record of DATA is of one of these kinds; --columns says where other names are used:
      {"source": "...", "target": "..."}     text to text
      {"text": "..."}                        span corruption; what plain text holds
      {"input_ids": [...], "labels": [...]}  tokenised already, with attention_mask if padded
      {"messages": [{"role": ..., "content": ...}, ...]}  what led to the assistant's last
                                             turn, and that turn
    A blank record is skipped and counted. Plain text with blank lines has a record per
    paragraph, any other a record per line. With "domain": "..." in the records, or
    several files, usage is also counted per domain; a record without one goes by the
    name of its file.
    Example: msmoe profile switch-base-8 --data calibration.jsonl --out stats
    """
    from msmoe.calibration.profile import profile

    check_place(out, STATISTICS, force=force, inputs=[checkpoint, *data])
    with progress("profiling") as update:
        stats = profile(checkpoint, data, progress=update, **options)
    stats.save(out, force=force)
    warn_unused(stats)
    if as_json:
        print_json(stats.describe())
    else:
        console().print(usage_table(stats))


def warn_unused(stats) -> None:
    """Say which layers saw no token: their groups fall back to the plain mean."""
    for name, layer in stats.layers.items():
        if layer.num_tokens == 0:
            click.echo(
                f"msmoe: warning: {name} saw no token; its experts will be averaged with equal weights", err=True
            )
