"""What comes before the first cell: statistics of every seed, a plan for every method at every size."""

import json
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from msmoe.calibration.profile import profile
from msmoe.calibration.stats import Stats
from msmoe.calibration.tokenizer import tokenizer_digest
from msmoe.checkpoint import Checkpoint
from msmoe.comparison.budget import budget_bytes, experts_within
from msmoe.comparison.cells import Job, Task
from msmoe.comparison.exports import export_of
from msmoe.comparison.keeping import keep, kept
from msmoe.comparison.settings import FISHER_RECORDS, Settings
from msmoe.compression.provenance import versions
from msmoe.errors import UserError
from msmoe.planning.methods import METHODS, resolve, variant
from msmoe.planning.plan import Plan
from msmoe.planning.planner import Planner

Progress = Callable[..., None]  # (done, in all, note)


def calibrate(
    source: Checkpoint, data: str | Path, settings: Settings, seed: int, out: Path, progress: Progress | None
) -> Stats:
    """The statistics of a seed, with all that any method needs: made once, kept beside the cells.

    Those of an earlier run serve if they hold no less; if they hold less, the new ones hold both.
    """
    needs = {need for label in settings.methods for need in resolve(*variant(label)).needs}
    request = {"samples": settings.samples, "token_sample": settings.token_sample, "seed": seed}
    extra = {
        "fisher": FISHER_RECORDS if "output gradients" in needs else 0,
        "gradients": "weight gradients" in needs,
    }
    content = Path(data).read_bytes() if Path(data).exists() else str(data).encode()
    identity = [request, source.fingerprint, sha256(content).hexdigest(), versions()["msmoe"]]
    identity.append(tokenizer_digest(source.path))
    identity += [settings.unusual] if settings.unusual else []
    folder = out / "stats" / f"seed-{seed}"
    marker = out / "stats" / f"seed-{seed}.json"
    earlier = kept(marker)
    if earlier is not None and earlier["identity"] == identity:
        extra = {name: max(value, earlier["extra"][name]) for name, value in extra.items()}
        stats = load_undamaged(folder, earlier["digest"])
        if extra == earlier["extra"] and stats is not None:
            return stats
    show = None if progress is None else lambda done, total: progress(done, total, f"calibrating, seed {seed}")
    stats = profile(
        source.path, data, progress=show, columns=settings.columns, device=settings.device, dtype=settings.dtype,
        **request, **extra,
    )  # fmt: skip
    stats.save(folder, force=True)
    stored = Stats.load(folder)
    keep(marker, {"identity": identity, "extra": extra, "digest": stored.digest})
    return stored


def load_undamaged(folder: Path, digest: str) -> Stats | None:
    """The statistics of an earlier run; None if they are no longer what was written."""
    try:
        stats = Stats.load(folder)
    except UserError:
        return None
    return stats if stats.digest == digest else None


def plan_jobs(
    planner: Planner,
    seed: int,
    settings: Settings,
    tasks: tuple[Task, ...],
    data: str,
    out: Path,
    note: Callable[[str], None],
) -> list[Job]:
    """Plan every method at every size; the references once."""
    first = seed == settings.seeds[0]
    layers = planner.compressible(settings.kept)
    most = max(layer.num_experts for layer in layers)
    jobs = []
    for label in settings.methods:
        method, choices = variant(label)
        fixed = METHODS[method].fixed
        if fixed and not first:
            continue
        sizes = {"all": (float(most),), "one": (1.0,)}.get(fixed or "", settings.experts)
        for experts in sizes:
            job = Job(
                label, experts, seed, settings.recover_steps, planner.source.path, None,
                out / "stats" / f"seed-{seed}", first, data, tasks, settings, out,
                calibration_of(planner.stats, settings, label), export_of(label, settings.export),
            )  # fmt: skip
            if method == "full":
                jobs.append(job)
                continue
            note(f"planning {label}, {experts:g} experts, seed {seed}")
            kind = "" if job.export == "exact" else f"-{job.export}"
            file = out / "plans" / f"seed-{seed}" / f"{label}-{experts:g}{kind}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            chosen: dict[str, Any] = {}
            if not fixed:
                budget = budget_bytes(planner, experts, keep_layers=settings.kept, export=settings.export)
                within = experts_within(
                    planner, method, budget, keep_layers=settings.kept, size=experts, export=job.export,
                    budget_export=settings.export, **choices,
                )  # fmt: skip
                chosen = {"experts": within}
            if not is_planned(file, planner, {layer.name for layer in layers}, chosen):
                planned = planner.plan(
                    method, keep_layers=settings.kept, seed=seed, export=job.export, **choices, **chosen
                )
                planned.save(file)
            jobs.append(replace(job, plan=file))
    return jobs


def is_planned(file: Path, planner: Planner, layers: set[str], chosen: dict[str, Any]) -> bool:
    """Whether a file holds the plan of an earlier run from the same statistics at the same size."""
    if not file.exists():
        return False
    try:
        plan = Plan.load(file)
    except UserError:  # damaged: it is made again
        return False
    experts = plan.parameters.experts
    same_size = experts == chosen.get("experts", experts)
    return plan.stats.get("sha256") == planner.stats.digest and same_size and set(plan.layers) == layers


def calibration_of(stats: Stats, settings: Settings, label: str) -> str:
    """What of the calibration decides a method's cells: output gradients only where it reads them."""
    gradients = FISHER_RECORDS if "output gradients" in resolve(*variant(label)).needs else 0
    return json.dumps([stats.data["sha256"], stats.data["seed"], settings.token_sample, gradients])
