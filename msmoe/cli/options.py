"""Options that several subcommands share."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from msmoe.errors import UserError
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
PLAN_OPTIONS = (
    click.option(
        "--experts", metavar="N|SHARE", help="Experts kept per layer, on average: 4, or 25% of them; default 8."
    ),
    click.option(
        "--target-size",
        metavar="SIZE|SHARE",
        help="In place of --experts: bytes of all weights written, such as 500MB, or 50% of the input's. Keeps the "
        "most experts that fit; methods that factorise get the largest rank that fits.",
    ),
    click.option(
        "--round-to",
        type=int,
        default=1,
        help="Keep a multiple of so many experts in each layer, rounded up: 2, 4 or 8 devices can share multiples of 8 "
        "equally.",
    ),
    click.option(
        "--budget",
        help="adaptive: layers whose usage is spread keep more (default); uniform: the same in every layer, which "
        "--export native needs.",
    ),
    click.option(
        "--keep-layer",
        "keep_layers",
        multiple=True,
        metavar="NAME",
        help="Leave this layer as it is (repeatable). Default: the first MoE layer of an encoder, no layer of a "
        "decoder; 'none' keeps none.",
    ),
    click.option("--saliency", help="What makes an expert worth keeping, default usage; see `msmoe methods`."),
    click.option(
        "--others",
        help="What becomes of the experts not kept: merge them (default of merging methods); remove them, the router "
        "choosing among the kept ones (default of pruning methods); send their tokens to the nearest kept expert, at "
        "the original gate value; or put their mean-output in their place.",
    ),
    click.option(
        "--selection",
        help="How pruning chooses: top scores, the subset that reproduces the layer best, or progressive, in steps.",
    ),
    click.option("--similarity", help="What makes experts similar, default router-logits; see `msmoe methods`."),
    click.option("--metric", help="cosine (default), distance or euclidean."),
    click.option("--grouping", help="dominant (default), centroids-first, hierarchical, kmeans, spectral or random."),
    click.option("--group-capacity", type=int, help="Most members of a group, its dominant expert included."),
    click.option(
        "--weighting", help="Weights of a group's members: usage, uniform or saliency; default: the method's."
    ),
    click.option(
        "--rule",
        help="What a group becomes: average (default), fisher, zipit, repair, least-squares or union-svd.",
    ),
    click.option("--align", help="How neurons are matched before merging: weight (default), activation, ream or none."),
    click.option(
        "--align-to",
        help="dominant: each group to its dominant expert (default); first: every expert to expert 0, as published; "
        "mean: each member to the mean of the others, until none moves.",
    ),
    click.option("--canonical/--no-canonical", default=None, help="Scale ReLU neurons to equal norms before matching."),
    click.option(
        "--refit",
        help="none, independent, or sequential (layer by layer on the inputs that compressed layers give; needs the "
        "data at apply); default: the method's.",
    ),
    click.option(
        "--routing",
        help="original: all router rows and a map (default); dominant: the rows of the dominant experts only.",
    ),
)
FACTOR_OPTIONS = (
    click.option("--rank", type=int, help="Rank of every factorised matrix; default 32."),
    click.option(
        "--keep-rows", type=float, help="Share of the output rows whose remainder is stored exactly; default 0.10."
    ),
    click.option("--energy", type=float, help="In place of --rank: share of the singular-value energy to hold."),
    click.option(
        "--target-bytes",
        type=int,
        help="In place of --rank: bytes of all weights of the output, spent on ranks and rows where they lower the "
        "output error most.",
    ),
    click.option("--target-ratio", type=float, help="The same, as a share of the bytes of the input checkpoint."),
    click.option(
        "--svd",
        help="activation: weigh errors by what the experts saw (default with statistics); plain: as published.",
    ),
    click.option(
        "--row-score", help="Rows kept: by output error (activation, default) or by size of the remainder (magnitude)."
    ),
)
APPLY_OPTIONS = (
    click.option(
        "--export",
        help="Default: exact for Switch, native for decoders. "
        "exact: any number of experts per layer, routing as the plan says; native: stock class, needs --budget "
        "uniform --keep-layer none; its routers have fewer rows and other gate values than a refit was solved for: "
        "what that costs is measured and printed; dense: a plain T5 from --experts 1 --keep-layer none.",
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


FACTOR_NAMES = ("rank", "keep_rows", "energy", "target_bytes", "target_ratio", "svd", "row_score")


def choices_of(arguments: dict) -> dict:
    """The plan options among a command's arguments, ready for `msmoe.plan`."""
    names = (
        "experts", "target_size", "round_to", "budget", "saliency", "others", "selection", "similarity", "metric",
        "grouping", "group_capacity", "weighting", "rule", "align", "align_to", "canonical", "refit", "routing",
        *FACTOR_NAMES,
    )  # fmt: skip
    return {name: arguments[name] for name in names} | {"keep_layers": list(arguments["keep_layers"]) or None}


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
