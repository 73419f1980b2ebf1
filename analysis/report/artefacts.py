"""The files that a report is made from: what each one is, and whether they belong together."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from msmoe.analysis.report.document import shorten
from msmoe.analysis.report.evaluation_records import read_records

from msmoe.calibration.stats import Stats
from msmoe.comparison.fields import Field, load_json
from msmoe.comparison.reading import FORMAT as COMPARISON
from msmoe.errors import UserError

if TYPE_CHECKING:
    from msmoe.checkpoint import Checkpoint
    from msmoe.comparison.summary import Summary as ComparisonSummary
    from msmoe.families.inspection import Summary
    from msmoe.planning.plan import Plan
    from msmoe.planning.planner import Planner

PLAN, RESULTS = "msmoe-plan/1", "msmoe-results/1"
KINDS = "a statistics directory, a plan, a checkpoint, or the results of `msmoe compare` or `msmoe evaluate`"


@dataclass(frozen=True)
class CheckpointFolder:
    """A checkpoint on disk; `provenance` is empty and `plan` None for an original one."""

    label: str
    checkpoint: "Checkpoint"
    summary: "Summary"
    provenance: dict
    plan: "Plan | None"

    @property
    def is_original(self) -> bool:
        return not self.provenance

    @property
    def source_fingerprint(self) -> str:
        """Of the original checkpoint that it is, or was made from."""
        from msmoe.compression.provenance import original_fingerprint

        return original_fingerprint(self.checkpoint)


@dataclass(frozen=True)
class LabelledStats:
    label: str
    stats: Stats


@dataclass(frozen=True)
class LabelledPlan:
    label: str
    plan: "Plan"


@dataclass(frozen=True)
class Comparison:
    """Results of `msmoe compare`; `content` is the file's."""

    label: str
    content: dict

    @cached_property
    def summary(self) -> "ComparisonSummary":
        from msmoe.comparison.scoring import summarise

        return summarise(self.content)


@dataclass(frozen=True)
class Evaluation:
    """Results of `msmoe evaluate`: records as in results.json."""

    label: str
    records: tuple[dict, ...]


Item = CheckpointFolder | LabelledStats | LabelledPlan | Comparison | Evaluation


@dataclass(frozen=True)
class Artefacts:
    """All that is known of one model.

    Attributes:
        stats: statistics, one for each calibration data set.
        plans: plans given as files; those inside of compressed checkpoints are there.
        compressed: checkpoints made from the original, in the order given.
        is_thorough: compute what takes long in full; otherwise a few seconds' worth of it.
    """

    original: CheckpointFolder | None
    stats: tuple[LabelledStats, ...]
    plans: tuple[LabelledPlan, ...]
    compressed: tuple[CheckpointFolder, ...]
    comparisons: tuple[Comparison, ...]
    evaluations: tuple[Evaluation, ...]
    is_thorough: bool = False

    @cached_property
    def calibration(self) -> Stats | None:
        """All statistics together."""
        found = [item.stats for item in self.stats]
        return sum(found[1:], found[0]) if found else None

    @cached_property
    def num_shared_records(self) -> int:
        """Sampled records that stand in more than one of the statistics, and so count more than once in all."""
        if len(self.stats) < 2:
            return 0
        records = [
            np.unique(np.concatenate([layer.tokens().record.numpy() for layer in item.stats.layers.values()]))
            for item in self.stats
        ]
        return sum(map(len, records)) - len(np.unique(np.concatenate(records)))

    @cached_property
    def plan(self) -> LabelledPlan | None:
        """The plan that the report is about: the first given, else that of the first compressed checkpoint."""
        inside = (LabelledPlan(item.label, item.plan) for item in self.compressed if item.plan)
        return next(iter((*self.plans, *inside)), None)

    @cached_property
    def planner(self) -> "Planner | None":
        """Access to the weights behind the statistics; needs the original checkpoint and statistics."""
        if self.original is None or self.calibration is None:
            return None
        from msmoe.planning.planner import Planner

        return Planner(self.original.checkpoint, self.calibration)

    @cached_property
    def layers(self) -> dict[str, int]:
        """MoE layers -> number of experts, from whatever knows them; empty if nothing does."""
        if self.calibration is not None:
            return {name: layer.num_experts for name, layer in self.calibration.layers.items()}
        if self.original is not None:
            return {layer.name: layer.num_experts for layer in self.original.summary.layers}
        known: dict[str, int] = {}
        for folder in self.compressed:  # a router may have lost rows: the plan knows how many there were
            for layer in folder.summary.layers:
                known[layer.name] = max(layer.num_experts, known.get(layer.name, 0))
        plans = [*self.plans, *(folder for folder in self.compressed if folder.plan)]
        for item in plans:
            assert item.plan is not None
            known |= {name: layer.num_experts for name, layer in item.plan.layers.items()}
        return known


def gather(items: Sequence[object], *, thorough: bool = False) -> Artefacts:
    """Open artefacts, paths or objects of the API, and check that they are of one model.

    Args:
        items: paths; or `Stats`, `Plan`, results of `compare` and of `evaluate` as `msmoe` returns them, also in lists.
        thorough: see `Artefacts.is_thorough`.

    Raises:
        UserError: for something that is no artefact, or that belongs to another checkpoint than the first one.
    """
    if not items:
        raise UserError(f"nothing to report on: give {KINDS}")
    opened = [open_artefact(item) for given in items for item in (given if isinstance(given, list) else [given])]
    check_same_model(opened)
    folders = [item for item in opened if isinstance(item, CheckpointFolder)]
    originals = [folder for folder in folders if folder.is_original]
    if len(originals) > 1:
        raise UserError(f"{originals[0].label} and {originals[1].label} are the same checkpoint: give one of them")
    stats = tuple(item for item in opened if isinstance(item, LabelledStats))
    for i, item in enumerate(stats):
        if any(item.stats.covers & other.stats.covers for other in stats[:i]):
            raise UserError(f"{item.label} holds the same statistics as another artefact: give one of them")
    comparisons = [item for item in opened if isinstance(item, Comparison)]
    if any(a.content == b.content for i, a in enumerate(comparisons) for b in comparisons[:i]):
        raise UserError(f"{comparisons[-1].label} holds the same results as another artefact: give one of them")
    if originals:
        check_layers_known(originals[0], opened)
    paths = [os.path.realpath(folder.checkpoint.path) for folder in folders]
    if len(set(paths)) < len(paths):
        raise UserError(f"{max(paths, key=paths.count)} is given twice")
    return Artefacts(
        original=originals[0] if originals else None,
        stats=stats,
        plans=tuple(item for item in opened if isinstance(item, LabelledPlan)),
        compressed=tuple(folder for folder in folders if not folder.is_original),
        comparisons=tuple(item for item in opened if isinstance(item, Comparison)),
        evaluations=tuple(item for item in opened if isinstance(item, Evaluation)),
        is_thorough=thorough,
    )


def open_artefact(item: object) -> Item:
    """Find out what something is, and read it.

    Raises:
        UserError: if it is nothing that a report can show.
    """
    if isinstance(item, Stats):
        return LabelledStats(shorten(Path(str(item.data.get("source", "statistics"))).name), item)
    if isinstance(item, dict):
        return read_results(item, "results")
    if isinstance(item, str | Path):
        return open_path(Path(item))
    from msmoe.evaluation.results import TaskResult
    from msmoe.planning.plan import Plan

    if isinstance(item, Plan):
        return LabelledPlan(item.method, item)
    if isinstance(item, TaskResult):
        return Evaluation("results", (item.describe(),))
    raise UserError(f"a report cannot show {type(item).__name__}: give {KINDS}")


def open_path(path: Path) -> Item:
    label = shorten(os.path.basename(os.path.realpath(path)))
    if (path / "stats.json").exists():
        return LabelledStats(label, Stats.load(path))
    if (path / "config.json").exists():
        return open_checkpoint(path, label)
    if (path / "results.json").exists():
        path = path / "results.json"
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.is_dir():
        raise UserError(f"{path} is no artefact of msmoe: expected {KINDS}")
    try:
        content = load_json(path)
    except UserError as error:
        raise UserError(f"{error}; a report takes {KINDS}") from error
    if isinstance(content, dict) and content.get("format") == PLAN:
        from msmoe.planning.plan import Plan

        return LabelledPlan(label, Plan.load(path))
    if path.name == "results.json":
        label = shorten(os.path.basename(os.path.dirname(os.path.realpath(path))))
    return read_results(content, label, path)


def open_checkpoint(path: Path, label: str) -> CheckpointFolder:
    """A checkpoint folder; one with a provenance file is a compressed or fine-tuned one."""
    from msmoe.checkpoint import Checkpoint
    from msmoe.compression.provenance import read_provenance
    from msmoe.families.inspection import inspect
    from msmoe.planning.plan import Plan

    checkpoint = Checkpoint(path)
    plan = path / "plan.json"
    provenance, summary = read_provenance(checkpoint), inspect(checkpoint)
    found = Plan.load(plan) if provenance and plan.exists() else None
    if found is not None:
        check_plan(label, summary, provenance, found)
    return CheckpointFolder(label, checkpoint, summary, provenance, found)


def check_plan(label: str, summary: "Summary", provenance: dict, plan: "Plan") -> None:
    """Refuse a plan inside of a checkpoint that is not the one it was made by.

    Raises:
        UserError: if stored experts or merged groups differ.
    """
    stored = {layer.name: layer.num_stored for layer in summary.layers}
    planned = {name: {group.members for group in layer.groups} for name, layer in plan.layers.items()}
    groups = provenance.get("groups", ())
    if any(stored.get(name) != len(members) for name, members in planned.items()) or any(
        tuple(group["members"]) not in planned.get(group["layer"], ()) for group in groups
    ):
        raise UserError(f"plan.json in {label} is not the plan that the checkpoint was made by")


def read_results(content: object, label: str, path: Path | None = None) -> Comparison | Evaluation:
    """Results of `msmoe compare` or `msmoe evaluate`, checked.

    Raises:
        UserError: naming the file, and the field that is wrong.
    """
    found = content.get("format") if isinstance(content, dict) else None
    name = str(path) if path else f"the results {label}"
    if not isinstance(content, dict) or found not in (COMPARISON, RESULTS):
        other = isinstance(found, str) and found.rpartition("/")[0] in ("msmoe-comparison", "msmoe-results")
        version = f"; this version reads {COMPARISON} and {RESULTS}" if other else ""
        raise UserError(f"{name} is no artefact of msmoe (format {found!r}{version}): expected {KINDS}")
    try:
        if found == RESULTS:
            return Evaluation(label, read_records(Field(content)))
        comparison = Comparison(label, content)
        _ = comparison.summary  # damaged results are refused here
        return comparison
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def check_same_model(items: Sequence[Item]) -> None:
    """Refuse artefacts of different checkpoints.

    Raises:
        UserError: naming the two that contradict each other.
    """
    first: tuple[str, str] | None = None
    for item in items:
        found = fingerprint_of(item)
        if found is None:
            continue
        if first is None:
            first = item.label, found
        elif found != first[1]:
            raise UserError(f"{item.label} is of another checkpoint than {first[0]} (fingerprints differ)")


def check_layers_known(original: CheckpointFolder, items: Sequence[Item]) -> None:
    """Refuse a plan that names layers, or numbers of experts, that its checkpoint does not have."""
    from msmoe.families import inspectable_family_of

    plans = [item.plan for item in items if isinstance(item, LabelledPlan)]
    for plan in plans:
        layers = inspectable_family_of(original.checkpoint).stored_layers(original.checkpoint)
        plan.check_against(original.checkpoint, [layer for layer, _ in layers])


def fingerprint_of(item: Item) -> str | None:
    """Of the original checkpoint behind an artefact, where it says."""
    if isinstance(item, CheckpointFolder):
        return item.source_fingerprint
    if isinstance(item, LabelledStats):
        return item.stats.checkpoint.get("fingerprint")
    if isinstance(item, LabelledPlan):
        return item.plan.checkpoint.get("fingerprint")
    if isinstance(item, Comparison):
        return item.content["checkpoint"].get("fingerprint")
    return next((record["source"] for record in item.records if record.get("source")), None)
