"""`msmoe compress`"""

from pathlib import Path

import click

from msmoe.cli.apply import print_report
from msmoe.cli.console import console, progress, usage_table
from msmoe.cli.options import (
    APPLY_OPTIONS,
    DATA_FORMATS,
    FACTOR_OPTIONS,
    PLAN_OPTIONS,
    PROFILE_OPTIONS,
    add_options,
    checkpoint_argument,
    choices_of,
    json_option,
    parse_size,
    seed_option,
)
from msmoe.cli.plan import print_plan
from msmoe.cli.profile import warn_unused
from msmoe.cli.push import push_option
from msmoe.places import CHECKPOINT, check_place

FISHER_RECORDS = 64  # for methods that need them, unless --fisher says otherwise


@click.command("compress")
@checkpoint_argument
@click.option("--data", required=True, help=f"Calibration data: {DATA_FORMATS}.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Checkpoint folder to write.")
@click.option("--method", default="m-smoe-refit", show_default=True, help="A row of `msmoe methods`.")
@add_options(PLAN_OPTIONS)
@add_options(FACTOR_OPTIONS)
@add_options(PROFILE_OPTIONS)
@add_options(APPLY_OPTIONS)
@click.option("--dry-run", is_flag=True, help="Profile, print the plan and its predicted size, write nothing.")
@seed_option
@push_option
@json_option
def command(
    checkpoint: Path, data: str, out: Path, method: str, samples: int, batch_size: int, token_sample: int,
    gradients: bool, fisher: int, device: str, dtype: str, columns: dict[str, str] | None, max_source_length: int,
    max_target_length: int, export: str, router: str, max_shard_size: str, force: bool, resume: bool, dry_run: bool,
    seed: int, as_json: bool, **options,
) -> None:  # fmt: skip
    """Profile, plan and apply in one go. The plan stays in the output as plan.json.

    \b
    Example: msmoe compress switch-base-8 --data calibration.jsonl --experts 2 --out switch-small
    """
    from msmoe.calibration.profile import profile
    from msmoe.checkpoint import Checkpoint
    from msmoe.compression.apply import apply
    from msmoe.families import family_of
    from msmoe.planning.methods import resolve
    from msmoe.planning.planner import check_request, plan

    if not dry_run:
        check_place(out, CHECKPOINT, force=force, inputs=[checkpoint, data])
    shard_bytes = parse_size(max_shard_size)
    source = Checkpoint(checkpoint)
    choices = choices_of(options)
    check_request(family_of(source), source, method=method, export=export, router=router, **choices)
    sizes = ("keep_layers", "experts", "target_size", "round_to")  # what a method reads does not depend on these
    needed = resolve(method, {name: value for name, value in choices.items() if name not in sizes}).needs
    with progress("profiling") as update:
        stats = profile(
            checkpoint, data, samples=samples, batch_size=batch_size, token_sample=token_sample, seed=seed,
            gradients=gradients or "weight gradients" in needed, device=device, dtype=dtype, columns=columns,
            fisher=fisher or (FISHER_RECORDS if "output gradients" in needed else 0),
            max_source_length=max_source_length, max_target_length=max_target_length, progress=update,
        )  # fmt: skip
    warn_unused(stats)
    result = plan(checkpoint, stats, method=method, seed=seed, export=export, **choices)
    if not as_json:
        console().print(usage_table(stats))
        click.echo()
        print_plan(result)
        click.echo()
    if dry_run:
        if as_json:
            click.echo(result.to_json(), nl=False)
        return
    with progress("merging") as update:
        report = apply(
            checkpoint, result, out, stats=stats, data=data, export=export, router=router, force=force, resume=resume,
            max_shard_bytes=shard_bytes, progress=update,
        )  # fmt: skip
    print_report(report, as_json=as_json)
