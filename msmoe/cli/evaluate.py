"""`msmoe evaluate`"""

from pathlib import Path

import click

from msmoe.cli.console import console, print_json, progress, table
from msmoe.cli.options import (
    AT_LEAST_ONE,
    DATA_FORMATS,
    checkpoint_argument,
    columns_option,
    device_option,
    dtype_option,
    force_option,
    json_option,
    seed_option,
)
from msmoe.units import human_bytes


@click.command("evaluate")
@checkpoint_argument
@click.option(
    "--data", "tasks", required=True, multiple=True, help=f"Task (repeatable): {DATA_FORMATS}. A folder is its files."
)
@click.option(
    "--metrics",
    help="Comma-separated: exact_match, accuracy, macro_f1, loss, perplexity, kl, accuracy_norm. Default: all the data "
    "allow, perplexity for decoder-only models; of those given, a task gets the ones it allows.",
)
@click.option(
    "--reference", metavar="CKPT", help="Checkpoint that kl compares with, such as the original; both are in memory."
)
@click.option("--out", type=click.Path(path_type=Path), help="results.json to write.")
@click.option("--batch-size", type=AT_LEAST_ONE, default=64, show_default=True, help="Examples per forward pass.")
@click.option("--samples", type=AT_LEAST_ONE, help="Use a seeded choice of this many examples per task.")
@click.option("--max-source-length", type=click.IntRange(min=2), help="Cut longer sources; default: nothing is cut.")
@click.option(
    "--max-target-length", type=AT_LEAST_ONE, help="Cut longer targets for the loss; answers are compared uncut."
)
@columns_option
@device_option
@dtype_option
@seed_option
@force_option
@json_option
def command(
    checkpoint: Path, tasks: tuple[str, ...], metrics: str | None, out: Path | None, force: bool, as_json: bool,
    device: str, dtype: str, columns: dict[str, str] | None, reference: str | None, **options,
) -> None:  # fmt: skip
    """Measure a checkpoint on tasks, with 95 % bootstrap intervals. Reads originals and all exports.

    \b
    exact_match    what `generate` writes equals the target; an answer that is no label is wrong
    accuracy       the label, or the choice, of highest likelihood is the right one
    macro_f1       of the generated answers, averaged over labels
    loss           cross-entropy per target token, in nats
    perplexity     its exponential
    kl             KL(reference || model) per target token, in nats
    accuracy_norm  as accuracy of choices, by likelihood per token
    Answers are greedy, whatever the checkpoint's own settings; the results say which were used.
    Example: msmoe evaluate switch-small --data tasks/sentiment.jsonl --out results.json
    """
    from msmoe.calibration.records import read_records
    from msmoe.device import choose_device, choose_dtype, memory_explained
    from msmoe.evaluation.results import save_results
    from msmoe.evaluation.run import ADVICE, evaluate, name_of
    from msmoe.families.loading import load
    from msmoe.places import FILE, check_place

    files = expand(tasks)
    if out is not None:
        check_place(out, FILE, force=force, inputs=[checkpoint, *files])
    wanted = metrics.split(",") if metrics else None
    if wanted is not None:
        check_names(wanted, has_reference=reference is not None)
    place, precision = choose_device(device), choose_dtype(dtype)
    model, other, results = None, None, []
    for file in files:
        with progress(name_of(file)) as update, memory_explained(ADVICE):
            model = load(checkpoint, dtype=precision).to(place) if model is None else model
            if reference is not None and other is None:
                other = load(reference, dtype=precision).to(place)
            records = read_records(file, columns=columns)
            chosen = wanted and applicable(wanted, records, has_reference=other is not None)
            results.append(
                evaluate(
                    model, records, metrics=chosen, reference=other, task=name_of(file), progress=update, **options
                )
            )
    if out is not None:
        save_results(results, out, force=force)
    if as_json:
        print_json([result.describe() for result in results])
        return
    names = list(dict.fromkeys(name for result in results for name in result.metrics))
    rows = table("task", "examples", "majority", *names, "seconds")
    for r in results:
        rows.add_row(
            r.task,
            f"{next(iter(r.metrics.values())).num_examples:,}",
            "-" if r.majority_share is None else f"{r.majority_share:.3f}",
            *[str(r.metrics.get(name, "-")).replace("[", r"\[") for name in names],
            f"{r.seconds:.1f}",
        )
    console().print(rows)
    first = results[0]
    console().print(
        f"{first.num_parameters:,} parameters, {human_bytes(first.num_bytes or 0)}, "
        f"{first.flops_per_token / 1e6:.1f} MFLOP per token, peak memory {human_bytes(results[-1].peak_memory)}"
    )


def check_names(names: list[str], *, has_reference: bool) -> None:
    """Refuse an unknown metric, or one that lacks its reference, before any model is loaded."""
    from msmoe.errors import UserError
    from msmoe.evaluation.run import METRICS

    for name in names:
        if name not in METRICS:
            raise UserError(f"unknown metric {name!r}; choose from {', '.join(METRICS)}")
    if "kl" in names and not has_reference:
        raise UserError("kl compares with another model: give it by --reference")


def applicable(names: list[str], records: list, *, has_reference: bool) -> list[str]:
    """The metrics that a task's records allow; all of them, to be refused by name, if they allow none."""
    from msmoe.evaluation.run import allowed_metrics

    allowed = allowed_metrics(records, has_reference=has_reference)
    return [name for name in names if name in allowed] or names


def expand(tasks: tuple[str, ...]) -> list[str]:
    """Task files; a folder stands for its data files, one that `datasets` saved for itself."""
    from msmoe.calibration.datasets import task_files_in

    return [str(file) for task in tasks for file in task_files_in(task)]
