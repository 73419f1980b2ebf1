"""One cell of a comparison: a plan carried out, perhaps recovered, and measured on every task.

A finished cell is a small JSON file named by the digest of everything that decides it, so a rerun does what is new and
a crash loses the cell at hand.

Shapes: L layers.
"""

import json
import shutil
import time
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from msmoe.calibration.batches import batch_indices, collate
from msmoe.calibration.records import TokenRecord, choose_records, read_records
from msmoe.calibration.targets import target_log_probabilities
from msmoe.calibration.tokenization import tokenize_for
from msmoe.calibration.tokenizer import load_tokenizer, tokenizer_digest
from msmoe.checkpoint import Checkpoint
from msmoe.comparison.keeping import keep, kept
from msmoe.comparison.settings import Settings
from msmoe.compression.apply import apply
from msmoe.device import choose_device, choose_dtype
from msmoe.evaluation.results import TaskResult
from msmoe.evaluation.run import evaluate, special_tokens_of
from msmoe.families import inspectable_family_of
from msmoe.families.loading import load
from msmoe.planning.plan import Plan
from msmoe.recovery.run import recover

FORMAT = 3  # of the files, in their digest
LAYER_RECORDS = 16  # per task, for the loss increase of single layers


@dataclass(frozen=True)
class Task:
    """A task file and its metric; `sha256` of its content."""

    file: Path
    metric: str
    sha256: str


@dataclass(frozen=True)
class Job:
    """What one process does at a time: a plan, and the cells that start from it.

    Attributes:
        experts: the size asked for; references have their own.
        steps: lengths of the recovery, one cell each.
        plan, stats: files; a plan of None is the original itself.
        layer_loss: also measure the loss with one layer compressed at a time.
        calibration: identity of what the statistics were made from.
        export: in which the plan is carried out.
    """

    method: str
    experts: float
    seed: int
    steps: tuple[int, ...]
    checkpoint: Path
    plan: Path | None
    stats: Path | None
    layer_loss: bool
    data: str
    tasks: tuple[Task, ...]
    settings: Settings
    out: Path
    calibration: str
    export: str = "exact"

    @property
    def name(self) -> str:
        return f"{self.method}-{self.experts:g}-{self.seed}".replace("/", "_")


def cell_file(job: Job, steps: int) -> Path:
    """Where a cell is kept: the digest of its inputs is the name."""
    settings = job.settings
    plan = json.loads(job.plan.read_text(encoding="utf-8")) | {"stats": job.calibration} if job.plan else "original"
    recovery = [settings.recovery, steps, job.seed, file_digest(Path(job.data))] if steps else None
    content = [
        FORMAT, version("msmoe"), Checkpoint(job.checkpoint).fingerprint, job.method, job.experts, job.seed, plan,
        [[t.file.stem, t.metric, t.sha256] for t in job.tasks], settings.max_examples, recovery, job.layer_loss,
        tokenizer_digest(job.checkpoint),
        *([settings.unusual] if settings.unusual else []), *([job.export] if settings.export and job.plan else []),
    ]  # fmt: skip
    digest = sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return job.out / "cells" / f"{job.name}-{steps}-{digest[:16]}.json"


@lru_cache(maxsize=64)
def file_digest(file: Path) -> str:
    """SHA-256 of a file; of its name where it is a data set's."""
    return sha256(file.read_bytes() if file.exists() else str(file).encode()).hexdigest()


def run_job(job: Job) -> int:
    """Do the cells of a job that are not done yet; returns their number."""
    missing = [steps for steps in job.steps if kept(cell_file(job, steps)) is None]
    if not missing:
        return 0
    work = job.out / "work" / job.name
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        started = time.perf_counter()
        model = job.checkpoint
        if job.plan is not None:
            model = work / "compressed"
            apply(job.checkpoint, job.plan, model, stats=job.stats, export=job.export, workers=1)
        applied = time.perf_counter() - started
        for steps in missing:
            started = time.perf_counter()
            measured = recovered(job, model, work, steps) if steps else model
            recovery = time.perf_counter() - started if steps else 0.0
            cell = measure(job, measured, steps) | {"seconds": {"apply": applied, "recover": recovery}}
            keep(cell_file(job, steps), cell)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return len(missing)


def recovered(job: Job, student: Path, work: Path, steps: int) -> Path:
    """Fine-tune a checkpoint as every other method's: same data, steps, seed and frozen routers."""
    out, settings = work / f"recovered-{steps}", job.settings
    recover(
        student, out, data=job.data, teacher=job.checkpoint, steps=steps, seed=job.seed, columns=settings.columns,
        device=settings.device, dtype=settings.dtype, **settings.recovery,
    )  # fmt: skip
    return out


def placed(job: Job, path: Path) -> Any:
    """A model on the device and in the dtype of the comparison."""
    return load(path, dtype=choose_dtype(job.settings.dtype)).to(choose_device(job.settings.device))


def measure(job: Job, path: Path, steps: int) -> dict:
    """The cell's record: sizes, scores of every task, loss by layer."""
    started = time.perf_counter()
    model, checkpoint = placed(job, path), Checkpoint(path)
    family = inspectable_family_of(checkpoint)
    tasks = {task.file.stem: describe(score(model, task, job), task) for task in job.tasks}
    plan = Plan.load(job.plan) if job.plan else None
    stored = {layer.name: count for layer, count in family.stored_layers(checkpoint)}
    kept = {name: stored[name] for name in (plan.layers if plan else stored)}
    parts = ("experts", "row indices")
    return {
        "method": job.method,
        "experts": job.experts,
        "seed": job.seed,
        "recover_steps": steps,
        "kept": kept,
        "average_kept": sum(kept.values()) / len(kept),
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "bytes": checkpoint.num_bytes,
        "expert_bytes": sum(checkpoint.spec(n).num_bytes for n in checkpoint if family.part(n) in parts),
        "tasks": tasks,
        "layer_loss": layer_losses(job, model) if job.layer_loss and plan and not steps else None,
        "notes": plan.notes if plan else {},
        "evaluate_seconds": time.perf_counter() - started,
        **({"export": job.export} if job.settings.export and plan else {}),
    }


def score(model: Any, task: Task, job: Job) -> TaskResult:
    metrics = ["loss"] if task.metric == "loss" else [task.metric, "loss"]
    tokenizer = load_tokenizer(job.checkpoint)
    return evaluate(
        model, task.file, metrics=metrics, tokenizer=tokenizer, samples=job.settings.max_examples, count_flops=False,
        columns=job.settings.columns,
    )  # fmt: skip


def describe(result: TaskResult, task: Task) -> dict:
    """A task's record, with what happened to every example: paired tests need it."""
    examples: Any = "".join(map(str, result.right))
    if task.metric == "loss":
        examples = [[round(loss, 5), count] for loss, count in result.losses]
    metrics = result.describe()["metrics"]
    return {"metrics": metrics, "examples": examples, "majority_share": result.majority_share}


# ---- loss by layer


def layer_losses(job: Job, compressed: Any) -> dict[str, float]:
    """Loss per target token above the original with a single layer compressed, for every layer of the plan."""
    assert job.plan is not None
    original, records = placed(job, job.checkpoint), layer_records(job)
    before = mean_loss(original, records)
    increases = {}
    for name in Plan.load(job.plan).layers:
        parent, _, last = name.rpartition(".")
        block = original.get_submodule(parent)
        own = getattr(block, last)
        setattr(block, last, compressed.get_submodule(name))
        increases[name] = mean_loss(original, records) - before
        setattr(block, last, own)
    return increases


def layer_records(job: Job) -> list[TokenRecord]:
    """Records of all tasks, a few of each."""
    source = Checkpoint(job.checkpoint)
    raw = [
        record
        for task in job.tasks
        for record in choose_records(read_records(task.file, columns=job.settings.columns), LAYER_RECORDS, seed=0)
    ]
    return tokenize_for(source, raw, seed=0, max_source_length=512, max_target_length=128)


@torch.inference_mode()
def mean_loss(model: Any, records: list[TokenRecord]) -> float:
    """Cross-entropy per target token."""
    total, count = 0.0, 0
    for chosen in batch_indices(records, 32):
        batch = collate([records[i] for i in chosen], pad_id=special_tokens_of(model, None).pad_id)
        said = target_log_probabilities(model, {name: tensor.to(model.device) for name, tensor in batch.items()})
        total -= float(said.double().sum())
        count += len(said)
    return total / count
