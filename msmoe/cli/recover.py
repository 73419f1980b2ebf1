"""`msmoe recover`"""

from pathlib import Path

import click

from msmoe.cli.console import console, print_json, progress
from msmoe.cli.options import (
    AT_LEAST_ONE,
    DATA_FORMATS,
    columns_option,
    device_option,
    dtype_option,
    force_option,
    json_option,
    seed_option,
)
from msmoe.cli.push import push_option
from msmoe.units import human_bytes


@click.command("recover")
@click.argument("student", metavar="STUDENT", type=click.Path(path_type=Path))
@click.option(
    "--teacher", required=True, help="Checkpoint to learn from, usually the original; 'none' for plain fine-tuning."
)
@click.option("--data", required=True, help=f"Training data with targets: {DATA_FORMATS}.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Checkpoint folder to write.")
@click.option("--steps", type=int, help="Optimiser steps.")
@click.option("--epochs", type=float, help="Passes over the training data; default 3 where --steps is not given.")
@click.option(
    "--train",
    default="experts",
    show_default=True,
    help="Weights that move: experts (router frozen, as published), router, or all.",
)
@click.option("--learning-rate", type=float, default=3e-4, show_default=True, help="Of AdamW, after the warm-up.")
@click.option("--batch-size", type=int, default=16, show_default=True, help="Records per forward pass and process.")
@click.option("--accumulate", type=int, default=1, show_default=True, help="Forward passes per step.")
@click.option("--kd-weight", type=float, default=0.2, show_default=True, help="Weight of the distillation loss.")
@click.option("--ce-weight", type=float, default=1.0, show_default=True, help="Weight of the cross-entropy.")
@click.option("--hidden-weight", type=float, default=0.0, show_default=True, help="Weight of the hidden-state loss.")
@click.option("--temperature", type=float, default=2.0, show_default=True, help="Of the distillation.")
@click.option("--warmup", type=float, default=0.1, show_default=True, help="Share of the steps with a rising rate.")
@click.option("--weight-decay", type=float, default=0.01, show_default=True, help="Norms and biases are not decayed.")
@click.option("--clip", type=float, default=1.0, show_default=True, help="Largest gradient norm.")
@click.option("--validation", help="Data that choose the best step; default: a share of --data, not trained on.")
@click.option("--validation-share", type=float, default=0.1, show_default=True, help="That share.")
@click.option("--evaluate-every", type=int, help="Steps between validations; default: a tenth of the run.")
@click.option("--save-every", type=int, help="Steps between states to resume from; default: at every validation.")
@click.option("--cache-teacher", is_flag=True, help="Ask the teacher once, keep its answers on disk, free its memory.")
@click.option("--rank", type=int, help="Factorise dense experts in memory first, every row kept; with --keep-rows.")
@click.option(
    "--keep-rows", type=float, help="Prune the kept rows of factorised experts to this share, gradually, as published."
)
@click.option("--row-score", default="sensitivity", show_default=True, help="sensitivity or magnitude.")
@click.option("--prune-warmup", type=float, default=0.04, show_default=True, help="Share of steps before pruning.")
@click.option("--prune-final", type=float, default=0.16, show_default=True, help="Share of steps after pruning.")
@click.option("--max-source-length", type=AT_LEAST_ONE, default=512, show_default=True, help="Longer inputs are cut.")
@click.option("--max-target-length", type=AT_LEAST_ONE, default=128, show_default=True, help="Longer targets are cut.")
@columns_option
@device_option
@dtype_option
@seed_option
@force_option
@click.option("--resume", is_flag=True, help="Go on with a killed run from its last state.")
@push_option
@json_option
def command(
    student: Path, teacher: str, data: str, out: Path, steps: int | None, epochs: float | None, validation: str | None,
    cache_teacher: bool, force: bool, resume: bool, as_json: bool, **options,
) -> None:  # fmt: skip
    """Train a compressed checkpoint to do what the original did: fine-tuning with distillation.

    \b
    Runs as it stands on one CPU or GPU; on several GPUs with `accelerate launch -m msmoe.cli recover ...`.
    The run's state, metrics.jsonl and TensorBoard events are in OUT.training.
    Example: msmoe recover switch-small --teacher switch-base-8 --data train.jsonl --steps 500 --out switch-recovered
    """
    from msmoe.recovery.run import recover

    if steps is None and epochs is None:
        epochs = 3
    with progress("recovering") as update:
        report = recover(
            student, out, data=data, teacher=None if teacher == "none" else teacher, validation=validation,
            cache_teacher=cache_teacher, force=force, resume=resume, steps=steps, epochs=epochs, progress=update,
            **options,
        )  # fmt: skip
    if not report.num_bytes:
        return  # another process of several wrote it
    if as_json:
        print_json({name: str(v) if isinstance(v, Path) else v for name, v in vars(report).items()})
        return
    echo = console().print
    echo(
        f"{report.steps} steps on {report.num_train:,} records; validation loss on {report.num_validation:,} others "
        f"{report.validation_before:.4f} -> {report.validation_after:.4f} at step {report.best_step}"
    )
    if report.best_step == 0:
        echo("no step was better than the student as it was: its weights were written unchanged")
    echo(f"wrote {report.out}: {report.num_parameters:,} parameters, {human_bytes(report.num_bytes)}; {report.log}")
