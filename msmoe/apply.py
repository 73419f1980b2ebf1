"""Carry out a plan: checkpoint + plan -> compressed checkpoint, streaming, a few experts in memory at a time.

Groups are computed by worker threads with one arithmetic thread each, so the written weights do not depend on the
number of cores.

Shapes: E experts, G groups, S sampled tokens, T tokens of a group, D d_model, F d_ff.
"""

import contextlib
import json
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from msmoe.align import Match
from msmoe.calibration.sample import TokenSample
from msmoe.calibration.stats import LayerStats, Stats
from msmoe.checkpoint import Checkpoint, CheckpointWriter, to_dtype
from msmoe.checkpoint.writer import MAX_SHARD_BYTES
from msmoe.errors import UserError
from msmoe.export import Export, GroupSlots, Slot, build_export
from msmoe.families import Expert, Family, family_of
from msmoe.families.base import load_expert
from msmoe.merge import Refit, merge_group, refit_output
from msmoe.plan import Group, Plan
from msmoe.router import RouterFit, reduce_router

Progress = Callable[[int, int], None]  # (merged groups done, merged groups in all)
OWN_FILES = ("config.json", "plan.json", "msmoe.json", "README.md", "model.safetensors.index.json")


@dataclass(frozen=True)
class GroupReport:
    """What happened to one merged group."""

    layer: str
    dominant: int
    members: tuple[int, ...]
    matches: dict[int, Match]
    refit: Refit | None

    def describe(self) -> dict:
        """The group's entry in `msmoe.json`."""
        entry: dict = {"layer": self.layer, "dominant": self.dominant, "members": list(self.members)}
        if self.matches:
            entry["alignment"] = {
                str(member): {"share_moved": m.share_moved, "objective_before": m.before, "objective_after": m.after}
                for member, m in self.matches.items()
            }
        if self.refit:
            entry["refit"] = {name: value for name, value in vars(self.refit).items() if name != "wo"}
        return entry


@dataclass(frozen=True)
class ApplyReport:
    """What `apply` wrote.

    Attributes:
        out: the new checkpoint.
        groups: every group that was merged in this run (a resumed run merges only what was missing).
        routers: layer -> fit of its reduced router (`native`).
        drop_rates: layer -> share of calibration tokens over capacity, (before, after).
        num_parameters, num_bytes: as written, expert maps counted in the bytes only.
    """

    out: Path
    groups: list[GroupReport]
    routers: dict[str, RouterFit]
    drop_rates: dict[str, tuple[float, float]]
    num_parameters: int
    num_bytes: int


@dataclass(frozen=True)
class Sources:
    """What merging a group reads."""

    family: Family
    checkpoint: Checkpoint
    plan: Plan
    stats: Stats | None
    moved_inputs: dict[str, "MovedInputs"] = field(default_factory=dict)


@dataclass(frozen=True)
class MovedInputs:
    """What the sampled tokens of a layer look like once earlier layers are compressed.

    Attributes:
        inputs: (S, D); expert: (S,) routed expert; gate: (S,) gate value; 0 for a token that is dropped now.
    """

    inputs: Tensor
    expert: Tensor
    gate: Tensor


def apply(
    checkpoint: str | Path,
    plan: Plan | str | Path,
    out: str | Path,
    *,
    stats: Stats | str | Path | None = None,
    data: str | Path | None = None,
    export: str = "exact",
    router: str = "fit",
    force: bool = False,
    resume: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    workers: int | None = None,
    progress: Progress | None = None,
) -> ApplyReport:
    """Write the checkpoint that a plan describes.

    Args:
        checkpoint: the checkpoint that the plan was made for; it is never changed.
        plan: the plan or its file.
        out: folder to write; complete or absent at any moment.
        stats: needed by plans with refit or activation alignment, and by the `fit` router.
        data: calibration data, needed by plans with sequential refit.
        export: `exact`, `native` or `dense`.
        router: rows of a `native` router: `fit`, `dominant` or `mean`.
        force: replace an existing `out`.
        resume: finish what a killed run left.
        max_shard_bytes: largest weight file.
        workers: groups merged at the same time; by default one per core.
        progress: called with (groups done, groups in all).

    Raises:
        UserError: for a plan or statistics that do not belong to the checkpoint, or an output that cannot be written.
    """
    source = Checkpoint(checkpoint)
    family = family_of(source)
    plan = plan if isinstance(plan, Plan) else Plan.load(plan)
    plan.check_against(source, family.layers(source))
    layout = build_export(export, family, source, plan)
    stats = load_needed_stats(plan, layout, stats, source, router)
    if plan.parameters.get("refit") == "sequential" and data is None and layout.merged:
        raise UserError("this plan refits layer by layer: give the calibration data with --data")
    identity = json.dumps([plan.to_json(), source.fingerprint, export, router])
    sources = Sources(family, source, plan, stats)
    writer = CheckpointWriter(
        out, layout.tensors, identity=identity, force=force, resume=resume, max_shard_bytes=max_shard_bytes
    )
    checksums: dict[Slot, int] = {}
    with writer:
        copy_tensors(writer, layout, source)
        routers = write_routers(writer, layout, sources, router)
        reports = []
        for layer, g, merged, report in merge_groups(sources, layout, writer.done, data=data, workers=workers, progress=progress):
            for slot, tensor in zip(layout.merged[layer, g], merged, strict=True):
                checksums[slot] = checksum(tensor.to(to_dtype(writer.specs[slot.tensor].dtype)))
                writer.write(slot.tensor, tensor, index=slot.index)
            reports.append(report)
        for spec in layout.tensors:
            if spec.name not in writer.done:
                writer.finish(spec.name)
        verify(writer.partial, checksums)
        drop_rates = capacity_drop_rates(layout, plan, stats, source)
        write_metadata(writer, layout, sources, reports, routers, drop_rates)
    return ApplyReport(writer.out, reports, routers, drop_rates, layout.num_parameters, layout.num_bytes)


def load_needed_stats(
    plan: Plan, layout: Export, stats: Stats | str | Path | None, source: Checkpoint, router: str
) -> Stats | None:
    """The statistics, checked against plan and checkpoint; None where nothing needs them."""
    needs = [
        (plan.parameters.get("refit", "none") != "none" and bool(layout.merged), "its refit"),
        (plan.parameters.get("align") == "activation" and bool(layout.merged), "activation alignment"),
        (router == "fit" and bool(layout.routers), "the fitted router (or choose --router dominant)"),
        (layout.kind == "dense", "the mean gate of the dense export"),
    ]
    if stats is None:
        for needed, what in needs:
            if needed:
                raise UserError(f"this plan needs --stats for {what}")
        return None
    stats = stats if isinstance(stats, Stats) else Stats.load(stats)
    stats.check_against(source)
    if plan.stats.get("sha256") not in (None, stats.digest):
        raise UserError("these are not the statistics that the plan was made from (their digests differ)")
    return stats


def copy_tensors(writer: CheckpointWriter, layout: Export, source: Checkpoint) -> None:
    """Everything that does not change, byte for byte, and the expert maps."""
    for slot, name in layout.copies:
        if slot.tensor not in writer.done:
            writer.copy(slot.tensor, source, name, index=slot.index)


def write_routers(writer: CheckpointWriter, layout: Export, sources: Sources, kind: str) -> dict[str, RouterFit]:
    """Expert maps of the `exact` export, reduced router rows of the `native` one."""
    plan, family = sources.plan, sources.family
    for layer, name in layout.maps.items():
        layer_plan = plan.layers.get(layer)
        mapping = layer_plan.expert_map if layer_plan else list(range(writer.specs[name].shape[0]))
        writer.write(name, torch.tensor(mapping))
    fits = {}
    for layer, name in layout.routers.items():
        rows = sources.checkpoint.read_finite(family.router_key(layer))
        layer_stats = sources.stats.layers[layer] if sources.stats else None
        fits[layer] = reduce_router(kind, rows, plan.layers[layer], layer_stats)
        writer.write(name, fits[layer].rows)
    return fits


def merge_groups(
    sources: Sources,
    layout: Export,
    done: set[str],
    *,
    data: str | Path | None,
    workers: int | None,
    progress: Progress | None,
) -> Iterator[tuple[str, int, Expert, GroupReport]]:
    """Merge every group whose tensors are not written yet; yields (layer, group, expert, report) in plan order."""
    pending = [key for key, slots in layout.merged.items() if not {slot.tensor for slot in slots} <= done]
    sequential = sources.plan.parameters.get("refit") == "sequential"
    if sequential and pending:
        from msmoe.sequential import merge_sequentially

        assert data is not None
        pending = list(layout.merged)
        results: Iterator = merge_sequentially(sources, layout, data)
    else:
        results = in_order(lambda key: merge_one(sources, layout, *key), pending, workers or os.cpu_count() or 1)
    for count, ((layer, g), (expert, report)) in enumerate(zip(pending, results, strict=True), 1):
        yield layer, g, expert, report
        if progress:
            progress(count, len(pending))


def in_order(function: Callable, items: list, workers: int) -> Iterator:
    """`map` on worker threads with one arithmetic thread each, at most `workers` results ahead of the consumer."""
    with single_threaded(), ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        running: list[Future] = []
        try:
            for item in items:
                running.append(pool.submit(function, item))
                if len(running) == workers:
                    yield running.pop(0).result()
            while running:
                yield running.pop(0).result()
        finally:
            for future in running:
                future.cancel()


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """One arithmetic thread per Python thread: sums come out the same on any number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def merge_one(sources: Sources, layout: Export, layer: str, g: int) -> tuple[Expert, GroupReport]:
    """Merge, and refit if the plan says so, one group of one layer."""
    parameters, group = sources.plan.parameters, sources.plan.layers[layer].groups[g]
    stats = sources.stats.layers[layer] if sources.stats else None
    load = lambda e: load_expert(sources.family, sources.checkpoint, layer, e)  # noqa: E731
    refits = parameters.get("refit", "none") != "none" and len(group.members) > 1
    targets = GroupTargets(group, stats) if refits and stats else None
    reference = 0 if parameters.get("align_to") == "first" else group.dominant
    merged = merge_group(
        group.members,
        group.weights,
        load,
        reference=reference,
        alignment=parameters.get("align", "weight") if len(group.members) > 1 else "none",
        canonical=parameters.get("canonical", False) and len(group.members) > 1,
        inputs=(lambda member: routed_inputs(stats, (member, reference))) if stats else None,
        visit=targets.visit if targets else None,
    )
    expert, refit = merged.expert, None
    if targets:
        moved = sources.moved_inputs.get(layer)
        refit = targets.refit(expert, moved)
        expert = Expert(expert.wi, refit.wo)
    if layout.kind == "dense":
        assert stats is not None
        expert = Expert(expert.wi, expert.wo * mean_gate(stats))
    return expert, GroupReport(layer, group.dominant, group.members, merged.matches, refit)


def mean_gate(stats: LayerStats) -> float:
    """Mean gate value of a layer's routed tokens; 1 for a layer that saw none."""
    return float(stats.gate_mass.sum() / stats.num_tokens) if stats.num_tokens else 1.0


def routed_inputs(stats: LayerStats, experts: tuple[int, ...]) -> Tensor:
    """Inputs (T, D) of the sampled tokens routed to any of the experts."""
    sample = stats.tokens()
    return sample.inputs[torch.isin(sample.expert, torch.tensor(experts))]


class GroupTargets:
    """The sampled tokens of a group, and what the original layer made of them.

    The targets of a member's tokens are computed when the merge visits it.
    """

    def __init__(self, group: Group, stats: LayerStats):
        sample = stats.tokens()
        self.members = torch.tensor(group.members)
        self.chosen = torch.isin(sample.expert, self.members).nonzero().flatten()
        self.sample: TokenSample = sample.select(self.chosen)
        self.weights = sample.weights(stats.dispatched)[self.chosen]
        self.targets = torch.zeros_like(self.sample.inputs)

    def visit(self, member: int, expert: Expert) -> None:
        mine = self.sample.expert == member
        self.targets[mine] = expert(self.sample.inputs[mine]) * self.sample.gate[mine, None]

    def refit(self, merged: Expert, moved: MovedInputs | None) -> Refit:
        sample = self.sample
        if moved is None:
            return refit_output(merged, sample.inputs, sample.gate, self.targets, self.weights, sample.held_out)
        stays = torch.isin(moved.expert[self.chosen], self.members)
        inputs, gate = moved.inputs[self.chosen][stays], moved.gate[self.chosen][stays]
        return refit_output(merged, inputs, gate, self.targets[stays], self.weights[stays], sample.held_out[stays])


def checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def verify(folder: Path, checksums: dict[Slot, int]) -> None:
    """Read the merged experts back with the safetensors library and compare them with what was computed.

    Raises:
        UserError: if the storage gave back something else.
    """
    wanted: dict[str, dict[int | None, int]] = {}
    for slot, value in checksums.items():
        wanted.setdefault(slot.tensor, {})[slot.index] = value
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in wanted.keys() & set(tensors.keys()):
                for index, value in wanted[name].items():
                    stored = tensors.get_slice(name)[index : index + 1][0] if index is not None else tensors.get_tensor(name)
                    if checksum(stored) != value:
                        raise UserError(f"{name} read back from {file.name} differs from what was written: check the disk")


def capacity_drop_rates(
    layout: Export, plan: Plan, stats: Stats | None, source: Checkpoint
) -> dict[str, tuple[float, float]]:
    """Share of calibration tokens over capacity before and after, if routing follows the plan."""
    if stats is None:
        return {}
    before = source.config.get("expert_capacity", 64)
    rates = {}
    for name, layer_plan in plan.layers.items():
        layer = stats.layers[name]
        identity = torch.arange(layer.num_experts)
        mapping = identity if layout.kind == "exact" else torch.tensor(layer_plan.expert_map)
        after = layout.config.get("expert_capacity", layer.num_tokens or 1)
        rates[name] = layer.drop_rate(identity, before), layer.drop_rate(mapping, after)
    return rates


def write_metadata(
    writer: CheckpointWriter,
    layout: Export,
    sources: Sources,
    reports: list[GroupReport],
    routers: dict[str, RouterFit],
    drop_rates: dict[str, tuple[float, float]],
) -> None:
    """Configuration, plan, provenance, model card, modelling code, and every small file of the source."""
    plan, source = sources.plan, sources.checkpoint
    for file in sorted(source.path.iterdir()):
        if file.is_file() and file.name not in OWN_FILES and file.suffix not in (".safetensors", ".bin", ".py"):
            writer.copy_file(file)
    if layout.kind == "exact":
        for file in sources.family.code_files():
            writer.copy_file(file)
    provenance = {
        "format": "msmoe-checkpoint/1",
        "export": layout.kind,
        "versions": {name: version(name) for name in ("msmoe", "torch", "transformers")},
        "seed": plan.seed,
        "source": {"model_type": source.model_type, "fingerprint": source.fingerprint},
        "stats": plan.stats,
        "num_parameters": {"source": source.num_parameters, "predicted": plan.predicted.get("num_parameters"), "written": layout.num_parameters},
        "bytes": {"source": source.num_bytes, "predicted": plan.predicted.get("bytes"), "written": layout.num_bytes},
        "groups": [report.describe() for report in reports],
        "routers": {name: {"agreement": fit.agreement, "gate_error": fit.gate_error} for name, fit in routers.items()},
        "drop_rates": {name: {"before": rate[0], "after": rate[1]} for name, rate in drop_rates.items()},
    }  # fmt: skip
    writer.write_text("config.json", json.dumps(layout.config, indent=2) + "\n")
    writer.write_text("plan.json", plan.to_json())
    writer.write_text("msmoe.json", json.dumps(provenance, indent=1) + "\n")
    writer.write_text("README.md", model_card(layout, plan, source))


def model_card(layout: Export, plan: Plan, source: Checkpoint) -> str:
    """README of the compressed checkpoint."""
    load = {
        "exact": 'AutoModelForSeq2SeqLM.from_pretrained(path, trust_remote_code=True, attn_implementation="eager")',
        "native": 'AutoModelForSeq2SeqLM.from_pretrained(path, attn_implementation="eager")',
        "dense": "AutoModelForSeq2SeqLM.from_pretrained(path)",
    }[layout.kind]
    rows = "\n".join(
        f"| `{name}` | {layer.num_experts} | {len(layer.groups)} |" for name, layer in plan.layers.items()
    )
    return f"""---
library_name: transformers
tags: [msmoe, mixture-of-experts, model-compression]
---

# Compressed Mixture-of-Experts checkpoint

Made from a `{source.model_type}` checkpoint (fingerprint `{source.fingerprint}`) by msmoe {version("msmoe")} with method
`{plan.method}`, export `{layout.kind}`: {source.num_parameters:,} -> {layout.num_parameters:,} parameters,
{source.num_bytes:,} -> {layout.num_bytes:,} bytes of weights.

```python
from transformers import AutoModelForSeq2SeqLM
model = {load}
```

| layer | experts before | after |
|---|---|---|
{rows}

`plan.json` says which experts became one and with which weights, `msmoe.json` how it was done.
"""
