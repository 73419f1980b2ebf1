"""What is known of each compressed checkpoint: bytes by part, errors, ranks and rates by layer and expert."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from msmoe.analysis.report.artefacts import Artefacts, CheckpointFolder
from msmoe.analysis.report.charts import short_names
from msmoe.analysis.report.document import distinct

from msmoe.calibration.stats import Stats
from msmoe.compression.layer_errors import LayerError, layer_errors, made_from, refit_errors
from msmoe.errors import UserError
from msmoe.families.inspection import INDICES, LayerSummary

MAX_CHECKPOINTS = 7  # drawn and measured: as many as there are colours
RANK_SECONDS = 1.5  # of one core: where stable ranks would take longer, they are left out
SECONDS_PER_CUBE = 1e-9  # of one matrix, by the cube of its smaller side
MAX_NAME = 32  # characters of a layer in charts
NAN = float("nan")
FRONTS, OUTPUTS = ("wi", "gate_up_proj", "up_proj"), ("wo", "down_proj")  # names of the matrices


@dataclass(frozen=True)
class Cost:
    """One compressed checkpoint.

    Attributes:
        index: its place among those drawn, as text: what controls switch by.
        label: unlike all others.
        errors: layer -> what was measured; empty where nothing could be.
        lacking: why nothing was measured.
        short: layer -> its name in charts.
        before: layer -> experts of the original.
    """

    index: str
    label: str
    folder: CheckpointFolder
    errors: dict[str, LayerError]
    lacking: str
    short: dict[str, str]
    before: dict[str, int]

    @property
    def experts(self) -> tuple[int, int]:
        """Experts before and after, all layers together."""
        return sum(self.before.values()), sum(layer.num_stored for layer in self.folder.summary.layers)

    @property
    def num_bytes(self) -> int:
        return self.folder.summary.num_bytes

    @property
    def source_bytes(self) -> int | None:
        """Bytes of the original, as provenance has them."""
        return self.folder.provenance.get("bytes", {}).get("source")

    @cached_property
    def worst(self) -> tuple[str, float] | None:
        """The layer with the largest measured error, by its short name, and that error."""
        known = {name: found.error for name, found in self.errors.items() if found.error == found.error}
        if not known:
            return None
        name = max(known, key=lambda n: known[n])
        return self.short[name], known[name]


def gather_costs(artefacts: Artefacts, say: Callable[[str], None]) -> list[Cost]:
    """The first compressed checkpoints, each measured if the original checkpoint and statistics are there."""
    folders = artefacts.compressed[:MAX_CHECKPOINTS]
    labels = distinct(["original", *(folder.label for folder in folders)])[1:]
    names = dict.fromkeys(layer.name for folder in folders for layer in folder.summary.layers)
    short = short_names(list(names))
    costs = []
    for i, (folder, label) in enumerate(zip(folders, labels, strict=True)):
        errors, lacking = measure(artefacts, folder, lambda note, label=label: say(f"{label}, {note}"))
        costs.append(Cost(str(i), label, folder, errors, lacking, short, experts_before(artefacts, folder)))
    return costs


def measure(
    artefacts: Artefacts, folder: CheckpointFolder, say: Callable[[str], None]
) -> tuple[dict[str, LayerError], str]:
    """Errors of the layers; or none, and why."""
    original, stats = artefacts.original, measuring_stats(artefacts, folder)
    if original is None or stats is None:
        return {}, ""
    try:
        found = layer_errors(
            original.checkpoint, folder.checkpoint, stats,
            stable_ranks=artefacts.is_thorough
            or rank_seconds([*original.summary.layers, *folder.summary.layers]) <= RANK_SECONDS,
            progress=lambda done, total: say(f"layer {done} of {total}"),
        )  # fmt: skip
    except UserError as error:
        return {}, str(error)
    return found, ""


def measuring_stats(artefacts: Artefacts, folder: CheckpointFolder) -> Stats | None:
    """Statistics that a checkpoint was not made from, where there are some, else all."""
    used = made_from(folder.checkpoint)
    others = [item.stats for item in artefacts.stats if not item.stats.covers & used]
    return sum(others[1:], others[0]) if others else artefacts.calibration


def rank_seconds(layers: Iterable[LayerSummary]) -> float:
    """About how long the stable ranks of all experts take."""
    cubes = sum(2 * layer.num_stored * min(layer.d_model, layer.d_ff) ** 3 for layer in layers)
    return SECONDS_PER_CUBE * cubes


def experts_before(artefacts: Artefacts, folder: CheckpointFolder) -> dict[str, int]:
    """Layer -> experts of the original, from the best source that there is."""
    stored = {layer.name: layer.num_experts for layer in folder.summary.layers}
    planned = {name: layer.num_experts for name, layer in folder.plan.layers.items()} if folder.plan else {}
    return {name: artefacts.layers.get(name, planned.get(name, count)) for name, count in stored.items()}


def part_frame(artefacts: Artefacts, costs: Sequence[Cost]) -> pd.DataFrame:
    """Parameters and bytes of each part of each checkpoint, the original first; `change` is of the bytes, 0 to 1."""
    folders = [("original", artefacts.original)] if artefacts.original else []
    rows = []
    for label, folder in [*folders, *((cost.label, cost.folder) for cost in costs)]:
        parts: dict[str, list[int]] = {}
        for part, numbers in folder.summary.parts.items():
            total = parts.setdefault("maps and indices" if part in INDICES else part, [0, 0])
            total[:] = [a + b for a, b in zip(total, numbers, strict=True)]
        rows += [
            {"checkpoint": label, "part": part, "parameters": count, "bytes": size}
            for part, (count, size) in parts.items()
        ]
    frame = pd.DataFrame(rows)
    before = frame[frame.checkpoint == "original"].set_index("part")["bytes"] if folders else pd.Series(dtype=float)
    return frame.assign(share=frame["bytes"] / frame.part.map(before))


def step_frame(artefacts: Artefacts, costs: Sequence[Cost]) -> pd.DataFrame:
    """How each checkpoint became smaller: bytes from `start` to `end` by step, in order; totals start at 0."""
    rows = []
    for cost in costs:
        level = 0
        for place, (step, kind, change) in enumerate(size_steps(artefacts.original, cost)):
            start, level = (0, change) if kind == "total" else (level, level + change)
            rows.append(
                {"index": cost.index, "checkpoint": cost.label, "place": place, "step": step, "kind": kind,
                 "start": start, "end": level, "change": change}
            )  # fmt: skip
    return pd.DataFrame(rows)


def size_steps(original: CheckpointFolder | None, cost: Cost) -> list[tuple[str, str, int]]:
    """(step, kind, bytes): the original, what each step added, and what is stored; the changes add up."""
    before = cost.source_bytes if original is None else original.summary.num_bytes
    total = ("stored", "total", cost.num_bytes)
    if before is None:
        return [total]
    start = ("original", "total", before)
    if original is None:
        return [start, ("all steps", change_kind(cost.num_bytes - before), cost.num_bytes - before), total]
    sizes = {layer.name: layer for layer in original.summary.layers}
    known = [(layer, sizes[layer.name]) for layer in cost.folder.summary.layers if layer.name in sizes]
    dense = [layer.num_stored * was.num_bytes // was.num_stored for layer, was in known]
    fewer = sum(dense) - sum(was.num_bytes for _, was in known)
    inside = sum(layer.num_bytes for layer, _ in known) - sum(dense)
    label = "experts as factors" if "factors" in cost.folder.provenance else "mean outputs for experts"
    steps = (
        ("fewer experts", fewer), (label, inside),
        ("routers, maps, others", cost.num_bytes - before - fewer - inside),
    )  # fmt: skip
    return [start, *((step, change_kind(change), change) for step, change in steps if change), total]


def change_kind(change: int) -> str:
    return "taken away" if change < 0 else "added"


def layer_frame(costs: Sequence[Cost]) -> pd.DataFrame:
    """One row per checkpoint and layer; NaN for what is not known."""
    return pd.DataFrame([layer_row(cost, layer) for cost in costs for layer in cost.folder.summary.layers])


def layer_row(cost: Cost, layer: LayerSummary) -> dict:
    name, about = layer.name, cost.folder.provenance
    found = cost.errors.get(name)
    before, after = refit_errors(about.get("groups", ())).get(name, (NAN, NAN))
    rates = about.get("drop_rates", {}).get(name, {})
    return {
        "index": cost.index,
        "checkpoint": cost.label,
        "layer": cost.short[name],
        "name": name,
        "experts": cost.before[name],
        "stored": layer.num_stored,
        "error": found.error if found else NAN,
        "rerouted": found.rerouted if found else NAN,
        "tokens": found.num_tokens if found else 0,
        **rank_columns(cost, name, found),
        "refit_before": before,
        "refit_after": after,
        "drop_before": rates.get("before", NAN),
        "drop_after": rates.get("after", NAN),
    }


def rank_columns(cost: Cost, name: str, found: LayerError | None) -> dict[str, float]:
    """Mean stable ranks of a layer's experts before and after, measured, or before factorising from provenance."""
    columns = {}
    matrices = [m for m in cost.folder.provenance.get("factors", {}).get("matrices", ()) if m.get("layer") == name]
    for matrix, part, names in (("wi", "front", FRONTS), ("wo", "output", OUTPUTS)):
        mine = [m for m in matrices if m.get("matrix") in names]
        before, after = (mean(m.get(key) for m in mine) for key in ("stable_rank_before", "stable_rank"))
        if cost.folder.provenance.get("factors"):
            after = NAN  # the report is of the matrices before they were factorised
        if found and found.stable_rank_before and found.stable_rank_after:
            before, after = getattr(found.stable_rank_before, part), getattr(found.stable_rank_after, part)
        columns |= {f"{matrix}_before": before, f"{matrix}_after": after}
    return columns


def mean(values: Iterable[float | None]) -> float:
    """Of the numbers that are known; NaN if there are none."""
    known = [value for value in values if value is not None and np.isfinite(value)]
    return float(np.mean(known)) if known else NAN


def lost_experts(costs: Sequence[Cost], stats: Stats | None, count: int) -> pd.DataFrame:
    """The `count` experts of each measured checkpoint with the largest relative error of their output."""
    rows = []
    for cost in costs:
        for name, found in cost.errors.items():
            usage = stats.layers[name].usage if stats is not None else []
            for expert, error in enumerate(found.by_expert.tolist()):
                if np.isfinite(error) and error > 0:
                    rows.append((cost.label, name, expert, float(usage[expert]), error))
    frame = pd.DataFrame(rows, columns=pd.Index(["checkpoint", "layer", "expert", "usage", "error"]))
    frame = frame.sort_values("error", ascending=False, kind="stable")
    return frame.groupby("checkpoint", sort=False).head(count).reset_index(drop=True)
