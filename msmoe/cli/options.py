"""Options that several subcommands share."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from msmoe.errors import UserError
from msmoe.planning.parameters import FACTOR_CHOICES, FIELDS, value_type
from msmoe.units import parse_bytes

AT_LEAST_ONE = click.IntRange(min=1)


def checkpoint_argument(function: Callable) -> Callable:
    """The argument `CKPT`, and `--revision` for one on the hub, which is fetched before any other progress bar runs."""

    @functools.wraps(function)
    def with_checkpoint(*, checkpoint: str, revision: str | None, **arguments: Any) -> Any:
        from msmoe.checkpoint.source import hub_id, local_folder

        name = f"{checkpoint}@{revision}" if revision else checkpoint
        if revision and hub_id(name) is None:
            raise UserError(f"--revision is of a repository on the hub, and {checkpoint} is none (OWNER/NAME)")
        if hub_id(name) and click.get_current_context().command.name != "inspect":
            local_folder(name)
        return function(checkpoint=name, **arguments)

    help_text = "Branch, tag or commit, where CKPT is the id OWNER/NAME of a repository on the hub."
    argument = click.argument("checkpoint", metavar="CKPT")
    return argument(click.option("--revision", help=help_text)(with_checkpoint))


force_option = click.option("--force", is_flag=True, help="Replace what exists under the output's name.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs instead of tables.")
seed_option = click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of every random choice."
)

DATA_FORMATS = (
    "JSON Lines, JSON, CSV, TSV, Parquet or plain text, perhaps .gz; - for standard input; or a datasets name or folder"
)


def parse_columns(ctx: click.Context, parameter: click.Parameter, text: str | None) -> dict[str, str] | None:
    """Field -> column of `source=question,target=answer`.

    Raises:
        UserError: if it looks otherwise, or names a field or a column twice.
    """
    if text is None:
        return None
    pairs = [part.split("=", 1) for part in text.split(",")]
    if any(len(pair) < 2 or not pair[0].strip() or not pair[1].strip() for pair in pairs):
        raise UserError(f"--columns must look like source=question,target=answer, got {text!r}")
    columns = {field.strip(): column.strip() for field, column in pairs}
    if len(columns) < len(pairs) or len(set(columns.values())) < len(pairs):
        raise UserError(f"--columns names a field or a column twice: {text!r}")
    return columns


columns_option = click.option(
    "--columns",
    metavar="FIELD=COLUMN,...",
    callback=parse_columns,
    help="Where the data hold a record's fields, e.g. source=question,target=answers.text.0.",
)
device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    help="Where the model runs: auto (CUDA if there is one), cpu, cuda:1.",
)
dtype_option = click.option(
    "--dtype",
    default="auto",
    show_default=True,
    help="In which precision the model runs: auto (float32), float32, bfloat16 or float16.",
)
PROFILE_OPTIONS = (
    click.option(
        "--samples",
        type=AT_LEAST_ONE,
        default=256,
        show_default=True,
        help="Calibration records used; a seeded choice.",
    ),
    click.option("--batch-size", type=AT_LEAST_ONE, default=16, show_default=True, help="Records per forward pass."),
    click.option(
        "--token-sample",
        type=AT_LEAST_ONE,
        default=4096,
        show_default=True,
        help="Tokens kept per layer, for everything that depends on expert outputs (refit, output similarity).",
    ),
    click.option(
        "--gradients", is_flag=True, help="Also record what the gradient similarities need (a backward pass)."
    ),
    click.option(
        "--fisher",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="Records for which the gradients are recorded that method fisher needs (one more forward pass and a "
        "backward pass over these); `compress` takes 64 where its method needs them.",
    ),
    device_option,
    dtype_option,
    columns_option,
    click.option(
        "--max-source-length", type=click.IntRange(min=2), default=512, show_default=True, help="Longer inputs are cut."
    ),
    click.option(
        "--max-target-length", type=AT_LEAST_ONE, default=128, show_default=True, help="Longer targets are cut."
    ),
)
NO_REFIT = "msmoe.no_refit"


def chosen_refit(context: click.Context, _: click.Parameter, value: str | None) -> str | None:
    """The value of `--refit`, or of `--no-refit`, which was read before it."""
    if context.meta[NO_REFIT] and value is not None:
        raise UserError(f"--no-refit contradicts --refit {value}: give one of them")
    return "none" if context.meta[NO_REFIT] else value


def parameter_option(name: str) -> Callable:
    """The option of a plan's parameter; None where it is not given."""
    flag, about = "--" + name.replace("_", "-"), FIELDS[name].metadata
    metavar, kind = about["metavar"] or None, value_type(name)
    if kind is tuple:
        return click.option(flag.removesuffix("s"), name, multiple=True, metavar=metavar, help=about["help"])
    if kind is bool:
        return click.option(f"{flag}/--no-{flag.removeprefix('--')}", default=None, help=about["help"])
    if name == "refit":
        special = {"is_flag": False, "flag_value": "independent", "callback": chosen_refit}
        return click.option(flag, help=about["help"], **special)
    return click.option(flag, type=str if metavar else kind, metavar=metavar, help=about["help"])


PLAN_OPTIONS = (
    *(parameter_option(name) for name in FIELDS if name not in FACTOR_CHOICES),
    click.option(
        "--no-refit",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=lambda context, _, given: context.meta.update({NO_REFIT: given}),
        help="The same as --refit none: output matrices as merged or kept.",
    ),
    click.option(
        "--round-to",
        type=int,
        default=1,
        help="Keep a multiple of so many experts in each layer, rounded up: 2, 4 or 8 devices can share multiples of 8 "
        "equally.",
    ),
)
FACTOR_OPTIONS = tuple(parameter_option(name) for name in FACTOR_CHOICES)
APPLY_OPTIONS = (
    click.option(
        "--export",
        help="Default: exact for Switch, native for decoders. "
        "exact: any number of experts per layer, routing as the plan says; native: stock class, needs --budget "
        "uniform --keep-layer none; its routers have fewer rows and other gate values, for which a refit is "
        "solved: what they cost is measured and printed, and where tokens have several experts, merging them in it is "
        "an approximation; dense: a plain T5 from --experts 1 --keep-layer none.",
    ),
    click.option(
        "--router",
        default="fit",
        show_default=True,
        help="Router rows of a native export: fit (on the token sample), dominant or mean.",
    ),
    click.option("--max-shard-size", default="5GB", show_default=True, help="Largest weight file."),
    force_option,
    click.option("--resume", is_flag=True, help="Finish what a killed run left."),
)


def add_options(options: tuple[Callable, ...]) -> Callable:
    """Decorator that adds several options, in their order."""

    def decorate(function: Callable) -> Callable:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def choices_of(arguments: dict) -> dict:
    """The plan options among a command's arguments, ready for `msmoe.plan`."""
    chosen = {name: arguments[name] for name in (*FIELDS, "round_to")}
    return chosen | {"keep_layers": list(arguments["keep_layers"]) or None}


def check_output(path: Path, *, force: bool) -> None:
    """Raise `UserError`, before any work, for an output that exists or has no place to be written."""
    if path.exists() and not force:
        raise UserError(f"{path} exists; use --force to replace it")
    ancestor = next(p for p in path.absolute().parents if p.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
        raise UserError(f"cannot write {path}: {ancestor} is not a folder that can be written to")


def parse_size(text: str) -> int:
    """Bytes of a largest weight file: `5GB`, `200MB`, `1000`."""
    return parse_bytes(text, "--max-shard-size")
