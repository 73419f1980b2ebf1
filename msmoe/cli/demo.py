"""`msmoe demo`"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from msmoe.cli.apply import print_report
from msmoe.cli.console import console, progress, table, usage_table
from msmoe.cli.factorize import print_factors
from msmoe.cli.options import check_output, force_option
from msmoe.cli.plan import print_plan
from msmoe.demo import DEMOS, Demo
from msmoe.units import human_bytes

NAMES = ["original", "merged", "MC-SMoE"]
LEGEND = (
    "original: the embedded checkpoint. merged: its experts merged, step 3. MC-SMoE: merged, factorised and recovered, "
    "steps 5 and 6. majority: share of the most frequent answer, which saying always the same would score. In "
    "brackets: 95 % interval over the examples. Loss: per token, lower is better; recovery trains on text, so that a "
    "loss on text may fall below the original's."
)
SHOWN = ("exact_match", "accuracy", "loss")  # the first of these that a task has
FISHER_RECORDS = 64
SOURCE_WIDTH = 60  # characters of a question
RECOVERY: dict[str, Any] = {"learning_rate": 5e-4, "hidden_weight": 3.0}


@click.command("demo")
@click.option(
    "--family",
    type=click.Choice(list(DEMOS)),
    default="switch",
    show_default=True,
    help="switch: a Switch Transformer, encoder-decoder, one expert per token; decoder: a Qwen3-MoE, two experts per "
    "token, whose experts hold facts.",
)
@click.option("--experts", type=float, help="Experts kept per layer, on average, of 16; default 4, of the decoder 12.")
@click.option("--method", help="A row of `msmoe methods`; default m-smoe-refit, of the decoder reap-refit.")
@click.option("--samples", type=click.IntRange(min=1), help="Use this many test examples per task instead of all.")
@click.option(
    "--recovery-steps", type=click.IntRange(min=1), default=150, show_default=True, help="Steps of the distillation."
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder for everything written; default: a new temporary one."
)
@force_option
def command(
    family: str, experts: float | None, method: str | None, samples: int | None, recovery_steps: int,
    out: Path | None, force: bool,
) -> None:  # fmt: skip
    """The whole story on an embedded checkpoint: profile, plan, apply, factorise, recover, evaluate, report.

    \b
    Example: msmoe demo --family decoder
    """
    from msmoe.calibration.profile import profile
    from msmoe.checkpoint import Checkpoint
    from msmoe.compression.apply import apply
    from msmoe.compression.factorize import factorize
    from msmoe.families import family_of
    from msmoe.planning.planner import check_request, plan
    from msmoe.recovery.run import recover
    from msmoe.reporting import report as make_report

    if out is not None:
        check_output(out, force=force)
    demo = DEMOS[family]
    experts, method = demo.experts if experts is None else experts, method or demo.method
    source, choices = Checkpoint(demo.checkpoint), {"method": method, "export": demo.export, "experts": experts}
    check_request(family_of(source), source, router="fit", keep_layers=None, **choices)
    folder = out or Path(tempfile.mkdtemp(prefix="msmoe-demo-"))
    folder.mkdir(parents=True, exist_ok=True)
    compressed = folder / "compressed"
    echo, started = console().print, time.perf_counter()

    echo(f"[bold]1. Profile[/bold] {demo.checkpoint.name} on {demo.calibration.name}")
    with progress("profiling") as update:
        stats = profile(
            demo.checkpoint, demo.calibration, samples=demo.samples, token_sample=16384,
            fisher=FISHER_RECORDS, progress=update,
        )  # fmt: skip
    stats.save(folder / "stats", force=True)
    echo(usage_table(stats))

    echo(f"\n[bold]2. Plan[/bold] {method}, {experts:g} of 16 experts per layer on average")
    result = plan(demo.checkpoint, stats, **choices)
    result.save(folder / "plan.json")
    print_plan(result)

    echo("\n[bold]3. Apply[/bold]")
    with progress("merging") as update:
        report = apply(
            demo.checkpoint, result, compressed, stats=stats, export=demo.export, force=True, progress=update
        )
    print_report(report, as_json=False)
    seconds = time.perf_counter() - started

    echo("\n[bold]4. Reload[/bold] in a fresh process with plain transformers")
    difference, reference = reload_elsewhere(demo, compressed, folder)
    echo(f"largest difference to {reference}: {difference:.1e} on logits")

    echo(f"\n[bold]5. Factorise[/bold] every expert, to {demo.expert_share:.0%} of the bytes of the merged ones")
    small = folder / "factorized"
    with progress("factorising") as update:
        factors = factorize(
            compressed, small, stats=stats, target_bytes=budget(demo, compressed), keep_layers=["none"], force=True,
            progress=update,
        )  # fmt: skip
    print_factors(factors, as_json=False)

    echo(f"\n[bold]6. Recover[/bold] by distillation, {recovery_steps} steps on the calibration records")
    recovered = folder / "mc-smoe"
    with progress("recovering") as update:
        training = recover(
            small,
            recovered,
            data=demo.calibration,
            teacher=demo.checkpoint,
            force=True,
            progress=update,
            steps=recovery_steps,
            **RECOVERY,
        )
    echo(
        f"validation loss {training.validation_before:.4f} -> {training.validation_after:.4f} at step "
        f"{training.best_step}"
    )

    echo("\n[bold]7. Evaluate[/bold] the three checkpoints on held-out data, one core each")
    checkpoints = [demo.checkpoint, compressed, recovered]
    results = evaluate_all(demo, checkpoints, folder, samples=samples)
    print_comparison(results, [experts_of(path) for path in checkpoints], NAMES)
    print_answers(demo, checkpoints)

    echo("\n[bold]8. Report[/bold]")
    page = folder / "report.html"
    with progress("reporting") as update:
        measured = [results_file(path, folder) for path in checkpoints]
        made = make_report(demo.checkpoint, folder / "stats", *checkpoints[1:], *measured, thorough=True, tell=update)
        made.save(page, force=True)
    echo(f"usage, similarity, plan, cost and forecast on one page: open {page} in a browser")
    echo(f"\nmerging took {seconds:.0f} s, all of it {time.perf_counter() - started:.0f} s; files are in {folder}")


def budget(demo: Demo, merged: Path) -> int:
    """Bytes of a checkpoint whose experts take the demo's share of what those of `merged` take."""
    from msmoe.families.inspection import inspect

    summary = inspect(merged)
    experts = summary.parts["experts"][1]
    return summary.num_bytes - experts + int(demo.expert_share * experts)


def reload_elsewhere(demo: Demo, compressed: Path, folder: Path) -> tuple[float, str]:
    """Logits of the compressed checkpoint from a process without msmoe, against a reference made here.

    Returns:
        the largest absolute difference, and what it is to.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from msmoe.calibration.batches import collate
    from msmoe.calibration.profile import load_tokenizer
    from msmoe.calibration.tokenization import special_tokens_of, tokenize
    from msmoe.checkpoint import Checkpoint
    from msmoe.demo import __file__ as here
    from msmoe.demo.answers import first_questions
    from msmoe.errors import UserError
    from msmoe.families.loading import load
    from msmoe.formats.verify import reference_model

    raw = first_questions(demo.tasks)
    special = special_tokens_of(Checkpoint(demo.checkpoint))
    tokens = tokenize(raw, load_tokenizer(demo.checkpoint), causal=special.is_causal)
    batch = collate(tokens, pad_id=special.pad_id)
    batch_file, logits_file = folder / "batch.safetensors", folder / "logits.safetensors"
    save_file(batch, batch_file)
    script = Path(here).with_name("reload.py")
    run = subprocess.run(
        [sys.executable, script, *map(os.path.abspath, (compressed, batch_file, logits_file))],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
    )
    if run.returncode:
        raise UserError(f"the compressed checkpoint did not reload: {run.stderr.strip().splitlines()[-1]}")
    click.echo(run.stdout, nl=False)
    try:
        model, name = reference_model(demo.checkpoint, compressed), "the stock model with merged weights"
    except UserError:  # removed experts: no stock model routes like that
        model, name = load(compressed), "the same checkpoint loaded by msmoe"
    with torch.inference_mode():
        expected = model(**batch).logits
    return float((load_file(logits_file)["logits"] - expected).abs().max()), name


def evaluate_all(demo: Demo, checkpoints: list[Path], folder: Path, *, samples: int | None) -> list[list[dict]]:
    """Evaluate each checkpoint in a process of its own, as many at once as there are cores."""
    from concurrent.futures import ThreadPoolExecutor

    with progress("evaluating") as update, ThreadPoolExecutor(os.cpu_count()) as pool:
        running = [pool.submit(evaluate_one, demo, checkpoint, folder, samples=samples) for checkpoint in checkpoints]
        results = []
        for done, future in enumerate(running, 1):
            results.append(future.result())
            update(done, len(running))
    return results


def evaluate_one(demo: Demo, checkpoint: Path, folder: Path, *, samples: int | None) -> list[dict]:
    """Evaluate a checkpoint in a process of its own: its time and its peak memory are its own."""
    from msmoe.errors import UserError

    tasks = [argument for file in [*demo.tasks, demo.held_out_text] for argument in ("--data", str(file))]
    limit = ["--samples", str(samples)] if samples else []
    command = [
        sys.executable,
        "-m",
        "msmoe.cli",
        "evaluate",
        str(checkpoint),
        *tasks,
        *limit,
        "--metrics",
        demo.metrics,
    ]
    out = results_file(checkpoint, folder)
    run = subprocess.run(
        [*command, "--out", str(out), "--force"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if run.returncode:
        raise UserError(f"evaluation failed: {run.stderr.strip().splitlines()[-1]}")
    return json.loads(out.read_text())["results"]


def results_file(checkpoint: Path, folder: Path) -> Path:
    return folder / f"results-{checkpoint.name}.json"


def experts_of(checkpoint: Path) -> str:
    """Stored experts over all MoE layers, and the layers' own numbers."""
    from msmoe.families.inspection import inspect

    counts = [layer.num_stored for layer in inspect(checkpoint).layers]
    return f"{sum(counts)} ({'+'.join(map(str, counts))})"


def print_comparison(results: list[list[dict]], experts: list[str], names: list[str]) -> None:
    """One table: experts, parameters, bytes, score per task with interval, seconds, peak memory."""

    def interval(record: dict, metric: str) -> str:
        estimate = record["metrics"][metric]
        return f"{estimate['value']:.3f} \\[{estimate['ci95'][0]:.3f}, {estimate['ci95'][1]:.3f}]"

    rows = table("", "majority", *names)
    rows.add_row("experts", "", *experts)
    rows.add_row("parameters", "", *[f"{records[0]['num_parameters']:,}" for records in results])
    rows.add_row("bytes of weights on disk", "", *[f"{records[0]['bytes']:,}" for records in results])
    for records in zip(*results, strict=True):
        metric = next(name for name in SHOWN if name in records[0]["metrics"])
        share = records[0]["majority_share"]
        name = f"{records[0]['task'].replace('_', ' ')}, {metric.replace('_', ' ')}"
        rows.add_row(name, "" if share is None else f"{share:.3f}", *[interval(record, metric) for record in records])
    rows.add_row("seconds to evaluate", "", *[f"{sum(r['seconds'] for r in records):.1f}" for records in results])
    rows.add_row("peak memory", "", *[human_bytes(max(r["peak_memory_bytes"] for r in records)) for records in results])
    console().print(rows)
    console().print(LEGEND, style="dim")


def print_answers(demo: Demo, checkpoints: list[Path]) -> None:
    """The answers of the checkpoints to the first question of every task, side by side."""
    from rich.text import Text

    from msmoe.demo.answers import answers, first_questions

    questions = first_questions(demo.tasks)
    with progress("answering") as update:
        given = []
        for done, checkpoint in enumerate(checkpoints, 1):
            given.append(answers(checkpoint, questions))
            update(done, len(checkpoints))
    rows = table("question: the first of each task", "right answer", *NAMES)
    for question, *texts in zip(questions, *given, strict=True):
        source = question["source"]
        shown = source if len(source) <= SOURCE_WIDTH else f"{source[: SOURCE_WIDTH - 1]}…"
        rows.add_row(*map(Text, (shown, question["target"], *texts)))
    console().print()
    console().print(rows)
