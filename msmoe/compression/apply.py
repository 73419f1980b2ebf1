"""Carry out a plan: checkpoint + plan -> compressed checkpoint, streaming, a few experts in memory at a time.

Groups are computed by worker threads with one arithmetic thread each, so the written weights do not depend on the
number of cores.

Shapes: E experts, G groups, S sampled tokens, T tokens of a group, D d_model, F d_ff.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from msmoe.calibration.stats import Stats
from msmoe.checkpoint import Checkpoint
from msmoe.checkpoint.writer import MAX_SHARD_BYTES, CheckpointWriter
from msmoe.compression.factorize import FactorizeReport, factorize_into
from msmoe.compression.group import GroupReport, Sources, merge_one
from msmoe.compression.layer_errors import routing_costs
from msmoe.compression.provenance import capacity_drop_rates, write_metadata
from msmoe.compression.refitting import RefitTokens, refit_layers, stored_rows
from msmoe.compression.router import ROUTERS, RouterFit, reduce_router
from msmoe.compression.sequential import merge_sequentially
from msmoe.errors import UserError, choose
from msmoe.families import Family, family_of
from msmoe.families.loading import check_complete
from msmoe.families.quantised import encoded
from msmoe.files import Output
from msmoe.formats.build import EXPORTS, build_export
from msmoe.formats.layout import Layout
from msmoe.formats.verify import check_written
from msmoe.layer.expert import Expert
from msmoe.lowrank.options import SIZES, FactorOptions
from msmoe.merge import RULES
from msmoe.places import CHECKPOINT, check_place
from msmoe.planning.limits import check_layers
from msmoe.planning.plan import Plan
from msmoe.planning.planner import predict
from msmoe.planning.scores import mean_output
from msmoe.tables import html_table
from msmoe.workers import Progress, in_order, on_one_thread, single_threaded

REPORT_COLUMNS = ("layer", "merged groups", "dropped", "dropped now")


@dataclass(frozen=True)
class ApplyReport:
    """What `apply` wrote.

    Attributes:
        out: the new checkpoint.
        groups: per merged group its layer, dominant expert, members, alignment (share of neurons moved, objective
            before and after, by member) and refit (ridge, tokens, held-out error before and after).
        routers: layer -> fit of its reduced router (`native`).
        drop_rates: layer -> share of calibration tokens over capacity, (before, after).
        num_parameters, num_bytes: as written, expert maps counted in the bytes only.
        routing_costs: layer -> relative squared output error on held-out tokens (as the plan routes, as the reduced
            router does), of a `native` export with statistics.
        factors: what factorising the merged experts gave, for plans that say so.
        dropped: why tensors of the input were left out -> how many.
    """

    out: Path
    groups: list[dict]
    routers: dict[str, RouterFit]
    drop_rates: dict[str, tuple[float, float]]
    num_parameters: int
    num_bytes: int
    routing_costs: dict[str, tuple[float, float]] = field(default_factory=dict)
    factors: FactorizeReport | None = None
    dropped: dict[str, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        row = "{:<30} {:>13} {:>8} {:>11}".format
        return "\n".join([f"ApplyReport: {self._title}", *(row(*cells) for cells in (REPORT_COLUMNS, *self._rows()))])

    def _repr_html_(self) -> str:
        """A short table for notebooks."""
        return html_table(self._title, REPORT_COLUMNS, self._rows())

    @property
    def _title(self) -> str:
        left_out = "".join(f"; without {count} tensors: {reason}" for reason, count in self.dropped.items())
        return f"{self.out}: {self.num_parameters:,} parameters, {self.num_bytes:,} bytes{left_out}"

    def _rows(self) -> list[tuple[str, ...]]:
        """Of each layer: name, merged groups, share of dropped tokens before and after."""
        count = Counter(group["layer"] for group in self.groups)
        drops = {name: [f"{rate:.2%}" for rate in rates] for name, rates in self.drop_rates.items()}
        names = dict.fromkeys([*count, *self.routers, *drops])
        return [(name, str(count[name]), *drops.get(name, ("-", "-"))) for name in names]


def apply(
    checkpoint: str | Path,
    plan: Plan | str | Path,
    out: str | Path,
    *,
    stats: Stats | str | Path | None = None,
    data: str | Path | None = None,
    export: str | None = None,
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
        export: `exact`, `native` or `dense`; by default the family's own, `exact` for Switch and `native` for decoders.
        router: rows of a `native` router: `fit`, `dominant` or `mean`.
        force: replace an existing `out`.
        resume: finish what a killed run left.
        max_shard_bytes: largest weight file.
        workers: groups merged at the same time; by default one per core.
        progress: called with (groups done, groups in all).

    Raises:
        UserError: for a plan or statistics that do not belong to the checkpoint, or an output that cannot be written.
    """
    inputs = [path for path in (checkpoint, plan, stats, data) if isinstance(path, str | Path)]
    check_place(Path(out), CHECKPOINT, force=force, inputs=inputs)
    source = Checkpoint(checkpoint)
    family = family_of(source)
    check_complete(source)
    plan = plan if isinstance(plan, Plan) else Plan.load(plan)
    plan.check_against(source, family.layers(source))
    plan.parameters.check()
    choose("router", router, ROUTERS)
    export = choose("export", export or family.exports[0], EXPORTS)
    planned = [layer for layer in family.layers(source) if layer.name in plan.layers]
    check_layers(family, planned, plan.parameters, method=plan.method, export=export)
    plan = predict(family, source, plan, export=export)
    how = {
        "data": data, "export": export, "router": router, "max_shard_bytes": max_shard_bytes, "workers": workers,
        "progress": progress,
    }  # fmt: skip
    options = plan.parameters.factors
    if options is not None and stats is None:
        raise UserError("this plan needs --stats to factorise the merged experts")
    with Output(out, CHECKPOINT, force=force, resume=resume, inputs=inputs) as output:
        if options is None:
            check = partial(check_written, original=source.path)
            return merge(source, family, plan, output, stats=stats, check=check, **how)
        return merge_and_factorize(source, family, plan, output, options, stats=stats, resume=resume, **how)


def merge_and_factorize(
    source: Checkpoint,
    family: Family,
    plan: Plan,
    output: Output,
    options: FactorOptions,
    *,
    stats: Stats | str | Path | None,
    resume: bool,
    **how,
) -> ApplyReport:
    """Merge into the scratch folder of the output, and factorise from there."""
    assert stats is not None
    stats = stats if isinstance(stats, Stats) else Stats.load(stats)
    merged_plan = without_factors(plan)
    merged_plan = predict(family, source, merged_plan, export=how["export"])
    merged = output.scratch / "merged"
    budget = options.budget(source.num_bytes) if options.is_budget else None
    if resume and is_finished(merged, merged_plan, how["router"]):
        report = merged_report(merged)
    else:
        with Output(merged, CHECKPOINT, force=True, resume=resume) as inner:
            report = merge(source, family, merged_plan, inner, stats=stats, **how)
    kept = [layer.name for layer in family.layers(source) if layer.name not in plan.layers]
    factors = factorize_into(
        output, merged, stats=stats, keep_layers=kept or ["none"], export=how["export"], original=source.path,
        max_shard_bytes=how["max_shard_bytes"], workers=how["workers"], progress=how["progress"], plan=plan,
        **asdict(replace(options, target_bytes=budget, target_ratio=None)),
    )  # fmt: skip
    return replace(
        report, out=output.path, num_parameters=factors.num_parameters, num_bytes=factors.num_bytes, factors=factors
    )


def merge(
    source: Checkpoint,
    family: Family,
    plan: Plan,
    output: Output,
    *,
    stats: Stats | str | Path | None,
    data: str | Path | None,
    export: str,
    router: str,
    max_shard_bytes: int,
    workers: int | None,
    progress: Progress | None,
    check: Callable[[Path], None] | None = None,
) -> ApplyReport:
    """Write the merged checkpoint of a checked plan."""
    layout = build_export(export, family, source, plan)
    stats = load_needed_stats(plan, layout, stats, source, router)
    if plan.parameters.refit == "sequential" and export == "dense":
        raise UserError("--refit sequential does not work with --export dense: the gate is folded away")
    if plan.parameters.refit == "sequential" and data is None and layout.merged:
        raise UserError("this plan refits layer by layer: give the calibration data with --data")
    identity = json.dumps([plan.to_json(), source.fingerprint, export, router, stats.digest if stats else None])
    sources = Sources(family, source, plan, stats)
    with CheckpointWriter(
        output, layout.tensors, identity=identity, max_shard_bytes=max_shard_bytes, check=check
    ) as writer:
        copy_tensors(writer, layout, source)
        with single_threaded():
            routers = write_routers(writer, layout, sources, router)
        places = {key: [place for part in parts for place in part.places] for key, parts in layout.merged.items()}
        unwritten = Counter(place.tensor for each in places.values() for place in each)
        writer.finish_copied()
        for layer, g, merged, report in merge_groups(
            sources, layout, writer.done, routers=routers, data=data, workers=workers, progress=progress
        ):
            note = report.describe() | {"crc32": []}
            for part in layout.merged[layer, g]:
                for place, tensor in encoded(part, part.join(merged.weights), writer.specs):
                    note["crc32"].append(writer.write_place(place, tensor))
            writer.note(f"{layer}/{report.dominant}", note)
            for name, _, _ in places[layer, g]:
                unwritten[name] -= 1
                if unwritten[name] == 0 and name not in writer.done:
                    writer.finish(name)
        notes = [writer.notes[f"{layer}/{plan.layers[layer].groups[g].dominant}"] for layer, g in layout.merged]
        drop_rates = capacity_drop_rates(layout, plan, stats, source)
        write_metadata(writer, layout, sources, notes, router, routers, drop_rates)
    costs = routing_costs(source, Checkpoint(writer.out), plan, stats) if layout.kind == "native" and stats else {}
    return ApplyReport(
        writer.out, notes, routers, drop_rates, layout.num_parameters, layout.num_bytes, costs,
        dropped=layout.num_dropped,
    )  # fmt: skip


def without_factors(plan: Plan) -> Plan:
    """The merging half of a plan that merges and factorises."""
    return replace(plan, parameters=replace(plan.parameters, **dict.fromkeys(SIZES)))


def is_finished(merged: Path, plan: Plan, router: str) -> bool:
    """Whether a killed run left the complete merge of a plan, with routers of the kind asked for."""
    if not (merged / "plan.json").exists() or Plan.load(merged / "plan.json") != plan:
        return False
    return json.loads((merged / "msmoe.json").read_text(encoding="utf-8")).get("router") == router


def merged_report(merged: Path) -> ApplyReport:
    """Report of a merge that a killed run had finished, from what it wrote."""
    content = json.loads((merged / "msmoe.json").read_text(encoding="utf-8"))
    rates = {name: (rate["before"], rate["after"]) for name, rate in content["drop_rates"].items()}
    written = content["num_parameters"]["written"], content["bytes"]["written"]
    return ApplyReport(merged, content["groups"], {}, rates, *written, dropped=content.get("dropped", {}))


def load_needed_stats(
    plan: Plan, layout: Layout, stats: Stats | str | Path | None, source: Checkpoint, router: str
) -> Stats | None:
    """The statistics, checked against plan and checkpoint; None where nothing needs them."""
    alignment, rule = plan.parameters.align, plan.parameters.rule
    needs = [
        (plan.parameters.refit != "none" and bool(layout.merged), "its refit"),
        (alignment in ("activation", "ream") and bool(layout.merged), f"{alignment} alignment"),
        (RULES[rule].needs_tokens and bool(layout.merged), f"the {rule} rule"),
        (bool(layout.constants), "the mean outputs"),
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
    if not stats.is_named_by(plan.stats):
        raise UserError("these are not the statistics that the plan was made from (their digests differ)")
    return stats


def copy_tensors(writer: CheckpointWriter, layout: Layout, source: Checkpoint) -> None:
    """Everything that does not change, byte for byte, and the expert maps."""
    for target, given in layout.copies:
        if target.tensor not in writer.done:
            writer.copy_place(target, source, given)


def write_cut(writer: CheckpointWriter, layout: Layout, family: Family, source: Checkpoint) -> None:
    """The tensors that lose the entries of experts, but for rows that are computed, and those that renumber them."""
    for tensor, kept in layout.cut:
        if tensor.name not in layout.routers.values():
            writer.write(tensor.name, tensor.select(source.read(tensor.name), kept))
    for name, layer, kept in layout.renumbered:
        writer.write(name, family.renumbered(source, layer, source.read(name), kept))


def write_routers(writer: CheckpointWriter, layout: Layout, sources: Sources, kind: str) -> dict[str, RouterFit]:
    """Maps and mean outputs of the `exact` export, routers without the rows of removed experts, reduced routers."""
    plan, family = sources.plan, sources.family
    for layer, name in layout.maps.items():
        layer_plan = plan.layers.get(layer)
        mapping = layer_plan.routes(plan.parameters).targets if layer_plan else range(writer.specs[name].shape[0])
        writer.write(name, torch.tensor(list(mapping)))
    write_cut(writer, layout, family, sources.checkpoint)
    for layer, name in layout.constants.items():
        assert sources.stats is not None
        constants = plan.layers[layer].routes(plan.parameters).constants
        writer.write(name, mean_output(sources.stats.layers[layer])[list(constants)].float())
    fits = {}
    for layer, name in layout.routers.items():
        router = family.router(sources.checkpoint, layer)
        assert router is not None
        layer_stats = sources.stats.layers[layer] if sources.stats else None
        fits[layer] = reduce_router(kind, router, plan.layers[layer], layer_stats)
        writer.write(name, fits[layer].rows)
    return fits


def merge_groups(
    sources: Sources,
    layout: Layout,
    done: set[str],
    *,
    routers: Mapping[str, RouterFit],
    data: str | Path | None,
    workers: int | None,
    progress: Progress | None,
) -> Iterator[tuple[str, int, Expert, GroupReport]]:
    """Merge every group whose tensors are not written yet; yields (layer, group, expert, report) in plan order."""
    places = {key: {place.tensor for part in parts for place in part.places} for key, parts in layout.merged.items()}
    pending = [key for key, names in places.items() if not names <= done]
    rows = {layer: stored_rows(layout, layer, fit.rows) for layer, fit in routers.items()}
    refit = sources.plan.parameters.refit
    if refit == "sequential" and pending:
        assert data is not None
        pending = list(layout.merged)
        results: Iterator = on_one_thread(merge_sequentially(sources, layout, data, rows))
    else:
        workers = workers or os.cpu_count() or 1
        tokens = RefitTokens(sources, layout, rows) if refit != "none" else None
        if tokens is not None and any(layer.top_k > 1 for layer in sources.family.layers(sources.checkpoint)):
            pending = [key for key in layout.merged if key[0] in {layer for layer, _ in pending}]
            results = refit_layers(sources, layout, pending, tokens, workers=workers)
        else:
            sources = replace(sources, tokens=tokens)
            results = in_order(lambda key: merge_one(sources, layout, *key), pending, workers)
    for count, ((layer, g), (expert, report)) in enumerate(zip(pending, results, strict=True), 1):
        yield layer, g, expert, report
        if progress:
            progress(count, len(pending))
