"""A comparison from beginning to end: calibrate once a seed, plan every method at every size, do the cells, collect."""

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from msmoe.calibration.records import DataWarning, choose_records, read_records
from msmoe.calibration.tokenization import tokenize_for
from msmoe.calibration.tokenizer import tokenizer_digest
from msmoe.checkpoint import Checkpoint
from msmoe.comparison.budget import REFERENCE, budget_bytes
from msmoe.comparison.cells import Job, Task, cell_file, run_job
from msmoe.comparison.cost import cost_file, run_cost, run_peak
from msmoe.comparison.exports import export_of, settled_export
from msmoe.comparison.fields import load_json
from msmoe.comparison.keeping import keep, kept
from msmoe.comparison.prepare import calibrate, plan_jobs
from msmoe.comparison.processes import in_a_process_of_its_own, workers
from msmoe.comparison.reading import read
from msmoe.comparison.settings import REFERENCES, Settings, task_files, task_metric
from msmoe.compression.provenance import versions
from msmoe.errors import UserError
from msmoe.families import family_of
from msmoe.files import locked, remove, write_whole
from msmoe.places import check_apart
from msmoe.planning.methods import METHODS, resolve, variant
from msmoe.planning.planner import Planner, check_request, resolve_kept_layers, with_defaults
from msmoe.planning.sizes import count_of
from msmoe.strict_json import without_nan

FORMAT = "msmoe-comparison/1"
MARKER = ".lock"  # a comparison's folder has it; who writes there holds it
STARTED_OVER = ".started-over"  # while its results.json is of the comparison before
FAILURES = UserError | RuntimeError | ValueError | OSError  # of a cell; the others go on
Progress = Callable[..., None]  # (cells done, cells in all, note)
Tell = Callable[[str], None]


def compare(
    checkpoint: str | Path,
    out: str | Path,
    *,
    data: str | Path,
    tasks: str | Path | Sequence[str | Path],
    methods: str | Sequence[str],
    experts: float | str | Sequence[float | str],
    seeds: int | Sequence[int] = 3,
    recover_steps: int | Sequence[int] = (0,),
    processes: int = 1,
    recover_data: str | Path | None = None,
    explicit_metric: bool = False,
    cost: bool = True,
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    tell: Tell = lambda text: None,
    **options: Any,
) -> dict:
    """Compare methods at the same stored bytes on the same data, and write `results.json`.

    The full model and one expert per layer are always there beside the methods asked for.

    Args:
        checkpoint: the original.
        out: folder for everything; `resume` adds to it what is new, `force` starts it over.
        data: calibration data; tasks: task files or folders of them.
        methods: keys of `METHODS`, perhaps with choices of their own: `reap:others=nearest`.
        experts: sizes, as experts per compressible layer of m-smoe, whose bytes are the budget of all; or shares of
            the experts such as `"25%"`.
        seeds: of everything random, or how many.
        recover_steps: lengths of the recovery that follows, 0 for none.
        processes: cells measured at the same time; they share the cores.
        recover_data: what recovery trains on; by default the calibration data.
        explicit_metric: refuse tasks without the metric in place of scoring their loss.
        cost: also measure FLOPs, speed and memory of every method at every size.
        progress: called with (cells done, cells in all, note).
        tell: called with a sentence for each damaged file of an earlier run that is made again or left out.
        **options: any other attribute of `Settings`; the `export` of decoders is `native` by default.

    Returns:
        the content of `results.json`.

    Raises:
        UserError: for a request that cannot be met, before anything is run; or, at the end, for cells that failed.
    """
    if not set(listed(methods)) - set(REFERENCES):
        raise UserError("--methods names no method to compare with the references")
    export = options.pop("export", None)
    settings = Settings(
        methods=tuple(dict.fromkeys([*REFERENCES, *listed(methods)])),
        experts=numbers_of_experts(checkpoint, listed(experts), options.get("keep_layers"), export=export),
        seeds=tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds),
        recover_steps=listed(recover_steps),
        **options,
    )
    settings.check()
    if "-" in (str(data), str(recover_data)):
        raise UserError("a comparison reads its data more than once: give a file in place of standard input")
    source = Checkpoint(checkpoint)
    settings = replace(settings, export=settled_export(export, family_of(source)))
    check_methods(source, settings)
    files = task_files(list(listed(tasks)))
    out = Path(out)
    if processes < 1:
        raise UserError(f"--processes must be at least 1, got {processes}")
    for path in (checkpoint, data, *listed(tasks), *([recover_data] if recover_data else [])):
        check_apart(out, Path(path))
    check_folder(out, resume=resume, force=force)
    measured = tuple(
        Task(
            Path(os.path.abspath(f)),  # a link goes by its own name
            task_metric(f, settings.metric, explicit=explicit_metric, columns=settings.columns),
            sha256(f.read_bytes()).hexdigest(),
        )
        for f in files
    )
    check_tasks(source, measured, settings)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / MARKER), removed_if_nothing_is_done(out):
        if force:
            start_over(out)
        shutil.rmtree(out / "work", ignore_errors=True)  # of a killed run
        (out / "cells").mkdir(exist_ok=True)
        note = lambda text: progress(0, 0, text) if progress else None
        planners = {}
        for seed in settings.seeds:
            planners[seed] = Planner(source.path, calibrate(source, data, settings, seed, out, progress))
        training = str(recover_data or data)
        jobs = []
        for seed, planner in planners.items():
            jobs += plan_jobs(planner, seed, settings, measured, training, out, note)
        remove_damaged(jobs, tell)
        total = sum(len(job.steps) for job in jobs)
        failures = run_all(jobs, total, processes, progress)
        costs = measure_all_costs(jobs, settings, progress) if cost and not failures else {}
        results = collect(source, planners, settings, measured, jobs, costs)
        if resume and not (out / STARTED_OVER).exists():
            results = with_earlier(results, out / "results.json", tell)
        with contextlib.suppress(OSError):
            (out / "work").rmdir()
        write_whole(out / "results.json", to_json(results))
        (out / STARTED_OVER).unlink(missing_ok=True)
    if failures:
        raise UserError(f"{len(failures)} of {len(jobs)} jobs failed, {failures[0]}; the others are kept in {out}: "
                        "--resume tries again")  # fmt: skip
    return results


def check_tasks(source: Checkpoint, tasks: Sequence[Task], settings: Settings) -> None:
    """Raise `UserError` for a record that the checkpoint cannot be measured on, before anything is run."""
    for task in tasks:
        raw = read_records(task.file, columns=settings.columns)
        chosen = choose_records(raw, settings.max_examples, seed=0) if settings.max_examples else raw
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DataWarning)  # said when it is measured
            tokenize_for(source, chosen, seed=0, max_source_length=None, max_target_length=None)


@contextlib.contextmanager
def removed_if_nothing_is_done(out: Path) -> Iterator[None]:
    """After an error, remove a folder that holds neither a cell nor results to go on from."""
    try:
        yield
    except Exception:
        if not any((out / "cells").glob("*.json")) and not (out / "results.json").exists():
            remove(out, last=MARKER)
        raise


def listed(values: Any) -> tuple:
    """A single value as a sequence of one."""
    return (values,) if isinstance(values, int | float | str | Path) else tuple(values)


def numbers_of_experts(
    checkpoint: str | Path,
    sizes: Sequence[float | str],
    keep_layers: Sequence[str] | None,
    *,
    export: str | None = None,
) -> tuple[float, ...]:
    """The sizes with a number in the place of every share; a checkpoint without shares is not opened."""
    if not any(isinstance(size, str) for size in sizes):
        return tuple(map(float, sizes))
    source = Checkpoint(checkpoint)
    family = family_of(source)
    layers = family.layers(source)
    kept = resolve_kept_layers(family, layers, None if keep_layers is None else list(keep_layers))
    compressible = [layer for layer in layers if layer.name not in kept]
    choices = with_defaults(family, export or family.exports[0], {})
    return tuple(count_of(str(size), compressible, resolve(REFERENCE, choices)) for size in sizes)


def check_methods(source: Checkpoint, settings: Settings) -> None:
    """Raise `UserError` for a method that cannot have one of the sizes, whatever calibration will see."""
    family = family_of(source)
    if settings.export == "native":
        for size in settings.experts:
            if not size.is_integer():
                raise UserError(f"--export native needs whole numbers of --experts, got {size:g}")
            check_request(
                family, source, method=REFERENCE, export="native", router="fit", keep_layers=settings.kept, experts=size
            )
    for label in settings.methods:
        method, choices = variant(label)
        for size in settings.experts if not METHODS[method].fixed else (None,):
            check_request(
                family, source, method=method, export=export_of(label, settings.export), router="fit",
                keep_layers=settings.kept, experts=size, **choices,
            )  # fmt: skip


def check_folder(out: Path, *, resume: bool, force: bool) -> None:
    """Raise `UserError` for an output that may not be written to, or that is no comparison's."""
    if resume and force:
        raise UserError("--resume adds to a comparison, --force starts it over: give one of them")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / MARKER).exists():
        raise UserError(f"{out} exists and holds no comparison: choose another --out")
    if not (resume or force):
        raise UserError(f"{out} exists; use --resume to add what is new, or --force to start over")
    results = out / "results.json"
    if os.path.lexists(results) and not results.is_file():
        raise UserError(f"{results} is not a regular file: move it away, or choose another --out")


def start_over(out: Path) -> None:
    """Remove what an earlier comparison left, but for its results, which stay until there are new ones."""
    (out / STARTED_OVER).touch()
    for name in ("stats", "plans", "cells", "cost"):
        shutil.rmtree(out / name, ignore_errors=True)


# ---- cells


def remove_damaged(jobs: list[Job], tell: Tell) -> None:
    """Remove cells and costs of an earlier run that are not what was written, so that they are measured again."""
    files = [cell_file(job, steps) for job in jobs for steps in job.steps]
    files += [cost_file(job) for job in jobs]
    for file in files:
        if file.exists() and kept(file) is None:
            tell(f"{file} is damaged: it is measured again")
            file.unlink()


def run_all(jobs: list[Job], total: int, processes: int, progress: Progress | None) -> list[str]:
    """Do every job, several at a time; returns what went wrong with those that failed."""
    done, failures = 0, []
    if progress:
        progress(0, total, "measuring")
    try:
        with workers(processes) as submit:
            for future, job in finished(submit, jobs, at_once=1 if processes == 1 else 2 * processes):
                error = future.exception()
                if isinstance(error, BrokenProcessPool) or not isinstance(error, FAILURES | None):
                    raise error
                if error is not None:
                    failures.append(f"{job.name}: {str(error).splitlines()[0]}")
                done += len(job.steps)
                if progress:
                    progress(done, total, job.name)
    except BrokenProcessPool:
        raise UserError(
            "a process that measured cells was killed, perhaps for want of memory: use --resume, and fewer --processes"
        ) from None
    return failures


def finished(submit: Callable[..., Future], jobs: list[Job], at_once: int) -> Iterator[tuple[Future, Job]]:
    """The jobs as they get done, `at_once` handed out at a time."""
    waiting: list[Job] = list(reversed(jobs))
    running: dict[Future, Job] = {}
    while waiting or running:
        while waiting and len(running) < at_once:
            job = waiting.pop()
            running[submit(run_job, job)] = job
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            yield future, running.pop(future)


# ---- cost


def measure_all_costs(jobs: list[Job], settings: Settings, progress: Progress | None) -> dict[str, dict]:
    """FLOPs, speed and memory of every method at every size, one after the other, on the first seed."""
    chosen = [job for job in jobs if job.seed == settings.seeds[0] and job.plan is not None]
    missing = [job for job in chosen if not cost_file(job).exists()]
    if missing:
        if progress:
            progress(0, len(missing), "cost of the full model")
        full_peak = in_a_process_of_its_own(run_peak, missing[0], missing[0].checkpoint)
        for done, job in enumerate(missing):
            if progress:
                progress(done, len(missing), f"cost of {job.method} at size {job.experts:g}")
            path = job.out / "work" / f"cost-{job.name}"
            shutil.rmtree(path, ignore_errors=True)
            try:
                content = in_a_process_of_its_own(run_cost, job, path)
                content["peak_memory_bytes"] = in_a_process_of_its_own(run_peak, job, path)
            finally:
                shutil.rmtree(path, ignore_errors=True)
            content["full"]["peak_memory_bytes"] = full_peak
            cost_file(job).parent.mkdir(exist_ok=True)
            keep(cost_file(job), content)
    return {f"{job.method}/{job.experts:g}": kept(cost_file(job)) for job in chosen}


# ---- results


def to_json(results: dict) -> str:
    """The content of `results.json`: a line for each entry, and for each cell."""
    results = without_nan(results)
    cells = ",\n".join(json.dumps(cell, separators=(",", ":")) for cell in results["cells"])
    entries = [
        f'"cells": [\n{cells}\n]' if name == "cells" else f"{json.dumps(name)}: {json.dumps(value)}"
        for name, value in results.items()
    ]
    return "{\n" + ",\n".join(entries) + "\n}\n"


def collect(
    source: Checkpoint,
    planners: dict[int, Planner],
    settings: Settings,
    tasks: tuple[Task, ...],
    jobs: list[Job],
    costs: dict[str, dict],
) -> dict:
    """The content of `results.json`, from the cells that are done."""
    done = [kept(cell_file(job, steps)) for job in jobs for steps in job.steps]
    cells = [cell for cell in done if cell is not None]
    first = planners[settings.seeds[0]]
    described = first.stats.data
    scores = cells[0]["tasks"] if cells else {}
    about = {
        task: {
            "num_examples": next(iter(score["metrics"].values()))["num_examples"],
            "majority_share": score["majority_share"],
        }
        for task, score in scores.items()
    }
    return {
        "format": FORMAT,
        "checkpoint": {
            "name": source.path.name, "model_type": source.model_type, "fingerprint": source.fingerprint,
            "num_parameters": source.num_parameters, "bytes": source.num_bytes,
            "num_experts": {layer.name: layer.num_experts for layer in first.layers},
            "tokenizer": tokenizer_digest(source.path),
        },
        "calibration": {
            "source": Path(described["source"]).name, "num_records": described["num_records"],
            "num_tokens": described["num_tokens"], "sha256": [p.stats.data["sha256"] for p in planners.values()],
        },
        "settings": settings.describe() | {"kept_layers": kept_layers(first, settings)},
        "versions": versions(),
        "methods": {
            label: {"summary": METHODS[name].summary, "source": METHODS[name].source, "kind": METHODS[name].kind}
            for label in settings.methods
            for name in [variant(label)[0]]
        },
        "tasks": {
            t.file.stem: {"metric": t.metric, "sha256": t.sha256, **about.get(t.file.stem, {})} for t in tasks
        },
        "budgets": {
            f"{n:g}": budget_bytes(first, n, keep_layers=settings.kept, export=settings.export)
            for n in settings.experts
        },
        "cells": cells,
        "cost": costs,
    }  # fmt: skip


def with_earlier(results: dict, file: Path, tell: Tell) -> dict:
    """The results together with what an earlier run in the same folder measured of the same things.

    Nothing is taken over from a run on another checkpoint, other tasks or calibration data, of another version, or with
    other settings than methods, sizes, seeds and lengths of the recovery.
    """
    if not file.exists():
        return results
    try:
        earlier = load_json(file)
        read(earlier)
        return joined(results, earlier)
    except (UserError, KeyError, TypeError, ValueError) as error:
        tell(f"{file} of an earlier run is damaged and left out: {error}")
        return results


def joined(results: dict, earlier: dict) -> dict:
    """Two results as one, where they are of the same things; else the first."""
    mine, theirs = results["settings"], earlier["settings"]
    varying = ("methods", "experts", "seeds", "recover_steps")
    fixed = lambda s: json.dumps({k: v for k, v in s.items() if k not in varying}, sort_keys=True)
    same = fixed(mine) == fixed(theirs) and all(results[k] == earlier[k] for k in ("checkpoint", "tasks"))
    same = same and results["versions"]["msmoe"] == earlier.get("versions", {}).get("msmoe")
    same = same and results["calibration"]["source"] == earlier["calibration"]["source"]
    digests = dict(zip(theirs["seeds"], earlier["calibration"]["sha256"], strict=True))
    own = dict(zip(mine["seeds"], results["calibration"]["sha256"], strict=True))
    if not same or any(digests[seed] != own[seed] for seed in digests.keys() & own.keys()):
        return results
    key = lambda cell: (cell["method"], cell["experts"], cell["seed"], cell["recover_steps"])
    known = {key(cell) for cell in results["cells"]}
    settings = mine | {name: list(dict.fromkeys([*theirs[name], *mine[name]])) for name in varying}
    digests |= own
    return results | {
        "settings": settings,
        "calibration": results["calibration"] | {"sha256": [digests[seed] for seed in settings["seeds"]]},
        "methods": earlier["methods"] | results["methods"],
        "budgets": earlier["budgets"] | results["budgets"],
        "cells": [cell for cell in earlier["cells"] if key(cell) not in known] + results["cells"],
        "cost": earlier["cost"] | results["cost"],
    }


def kept_layers(planner: Planner, settings: Settings) -> list[str]:
    """Names of the layers left as they are."""
    compressed = {layer.name for layer in planner.compressible(settings.kept)}
    return [layer.name for layer in planner.layers if layer.name not in compressed]
