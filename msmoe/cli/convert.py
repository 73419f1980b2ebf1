"""`msmoe convert`"""

from pathlib import Path

import click

from msmoe.cli.console import console, print_json, progress
from msmoe.cli.options import checkpoint_argument, force_option, json_option, parse_size
from msmoe.cli.push import push_option
from msmoe.units import human_bytes


@click.command("convert")
@checkpoint_argument
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Checkpoint folder to write.")
@click.option("--max-shard-size", default="5GB", show_default=True, help="Largest weight file.")
@force_option
@click.option("--resume", is_flag=True, help="Finish what a killed run left.")
@push_option
@json_option
def command(checkpoint: str, out: Path, max_shard_size: str, force: bool, resume: bool, as_json: bool) -> None:
    """Write a checkpoint as safetensors: the same tensors, from pickled weights or from shards of another size.

    \b
    Every command reads pytorch_model.bin too, by torch's restricted unpickler; safetensors are
    read faster, and no program can hide in them.
    Example: msmoe convert google/switch-base-8 --out switch-base-8
    """
    from msmoe.formats.convert import convert

    with progress("converting") as update:
        report = convert(
            checkpoint, out, force=force, resume=resume, max_shard_bytes=parse_size(max_shard_size), progress=update
        )
    if as_json:
        print_json({name: str(v) if isinstance(v, Path) else v for name, v in vars(report).items()})
        return
    size = f"{report.num_bytes:,} bytes ({human_bytes(report.num_bytes)})"
    console().print(f"wrote {report.out}: {report.num_parameters:,} parameters, {size}")
