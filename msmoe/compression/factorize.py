"""Factorise the experts of a checkpoint, original or compressed, streaming: a few experts in memory at a time.

With a budget all matrices are decomposed first and kept beside the output; their error curves decide every shape, and
nothing is decomposed twice.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from msmoe.calibration.stats import Stats
from msmoe.checkpoint import Checkpoint
from msmoe.checkpoint.writer import MAX_SHARD_BYTES, CheckpointWriter
from msmoe.compression.factor_layout import expert_places, factor_layout
from msmoe.compression.provenance import read_provenance, write_factor_metadata
from msmoe.errors import UserError
from msmoe.families import Family, MoELayer, inspectable_family_of
from msmoe.families.loading import check_complete
from msmoe.files import Output
from msmoe.formats.layout import Layout
from msmoe.formats.verify import check_written
from msmoe.lowrank.choose import check_rank, choose_shapes
from msmoe.lowrank.layer import FactorSources, factorize_layer
from msmoe.lowrank.measures import stable_rank
from msmoe.lowrank.options import DEFAULT_RANK, SIZES, FactorOptions
from msmoe.lowrank.shapes import FactorShape, LayerFactors
from msmoe.places import CHECKPOINT
from msmoe.planning.parameters import Parameters
from msmoe.planning.plan import LayerPlan, Plan
from msmoe.workers import Progress, in_order


@dataclass(frozen=True)
class FactorizeReport:
    """What `factorize` wrote.

    Attributes:
        out: the new checkpoint.
        shapes: layer -> matrix -> shape; a matrix not named stayed dense, being smaller so.
        dense: (layer, matrix) of factorised layers that stayed dense.
        matrices: per expert and matrix rank, errors and stable ranks, see `MatrixReport`.
        predicted_error: summed output error that the budget's allocation expects; None without budget.
    """

    out: Path
    shapes: dict[str, LayerFactors]
    dense: tuple[tuple[str, str], ...]
    matrices: list[dict]
    predicted_error: float | None
    num_parameters: int
    num_bytes: int


def factorize(
    checkpoint: str | Path,
    out: str | Path,
    *,
    stats: Stats | str | Path | None = None,
    keep_layers: list[str] | None = None,
    export: str = "exact",
    original: str | Path | None = None,
    plan: Plan | None = None,
    force: bool = False,
    resume: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    workers: int | None = None,
    progress: Progress | None = None,
    **options,
) -> FactorizeReport:
    """Write a checkpoint whose experts are low rank plus kept rows.

    Args:
        checkpoint: an original, `native` or `exact` checkpoint; it is never changed.
        out: folder to write; complete or absent at any moment.
        stats: statistics of the checkpoint, or of the original that it was compressed from.
        keep_layers: layers left as they are; by default the first MoE layer of the encoder, `["none"]` for none.
        export: `exact` stores the factors; `native` multiplies them out into a stock checkpoint.
        original: the checkpoint before merging, for its stable ranks in the report.
        plan: to store in the output; by default the one that the checkpoint carries.
        workers: groups of experts factorised at the same time; by default one per core.
        **options: any attribute of `FactorOptions`.

    Raises:
        UserError: for an input or an option that cannot be used, or an output that cannot be written.
    """
    inputs = [path for path in (checkpoint, stats, original) if isinstance(path, str | Path)]
    with Output(out, CHECKPOINT, force=force, resume=resume, inputs=inputs) as output:
        return factorize_into(
            output, checkpoint, stats=stats, keep_layers=keep_layers, export=export, original=original, plan=plan,
            max_shard_bytes=max_shard_bytes, workers=workers, progress=progress, **options,
        )  # fmt: skip


def factorize_into(
    output: Output,
    checkpoint: str | Path,
    *,
    stats: Stats | str | Path | None,
    keep_layers: list[str] | None,
    export: str,
    original: str | Path | None,
    plan: Plan | None,
    max_shard_bytes: int,
    workers: int | None,
    progress: Progress | None,
    **options,
) -> FactorizeReport:
    """`factorize` into an output that is open already; its scratch folder keeps the decompositions."""
    source = Checkpoint(checkpoint)
    family = inspectable_family_of(source)
    stored = family.stored_layers(source)
    chosen = check_request(family, source, keep_layers=keep_layers, export=export)
    check_complete(source)
    if all(options.get(name) is None for name in SIZES):
        options["rank"] = min(DEFAULT_RANK, *(min(layer.d_model, layer.d_ff) for layer, _ in chosen))
    chosen_options = FactorOptions(**options).resolve(has_stats=stats is not None)
    check_rank(chosen_options, chosen)
    if export == "native" and chosen_options.is_budget:
        raise UserError("--export native multiplies the factors out, which saves no bytes: give --rank")
    if stats is not None:
        stats = stats if isinstance(stats, Stats) else Stats.load(stats)
    sources = FactorSources(family, source, chosen_options, stats, expert_maps(family, source, stats))
    workers = workers or os.cpu_count() or 1
    scratch = output.scratch / "spectra"
    shapes, predicted_error = choose_shapes(sources, chosen, scratch, workers=workers)
    layout = factor_layout(export, family, source, stored, shapes)
    identity = [asdict(chosen_options), source.fingerprint, export, shapes, stats.digest if stats else None]
    check = partial(check_written, original=source.path)
    with CheckpointWriter(
        output, layout.tensors, identity=json.dumps(identity), max_shard_bytes=max_shard_bytes, check=check
    ) as writer:
        copy_unchanged(writer, layout, source, stored)
        write_experts(writer, layout, sources, chosen, shapes, scratch, workers=workers, progress=progress)
        notes = [writer.notes[f"{layer.name}/{g}"] for layer, count in chosen for g in range(count)]
        matrices = [matrix for note in notes for matrix in note["matrices"]]
        if original is not None:
            matrices = with_ranks_before(matrices, Checkpoint(original), family, source, workers=workers)
        described = output_plan(plan, source, family, chosen_options, layout)
        write_factor_metadata(
            writer, layout, source, family, described, options=asdict(chosen_options), matrices=matrices, stats=stats
        )
    dense = tuple((layer.name, m) for layer, _ in chosen for m in layer.matrices if m not in shapes.get(layer.name, {}))
    return FactorizeReport(
        writer.out, shapes, dense, matrices, predicted_error, layout.num_parameters, layout.num_bytes
    )


def copy_unchanged(
    writer: CheckpointWriter, layout: Layout, source: Checkpoint, stored: Sequence[tuple[MoELayer, int]]
) -> None:
    """Everything but the factorised experts, byte for byte, and the maps of a checkpoint that had none."""
    for target, given in layout.copies:
        if target.tensor not in writer.done:
            writer.copy_place(target, source, given)
    num_experts = {layer.name: layer.num_experts for layer, _ in stored}
    for layer, name in layout.maps.items():
        writer.write(name, torch.arange(num_experts[layer]))


def measure_ranks(
    checkpoint: str | Path,
    *,
    stats: Stats | str | Path | None = None,
    rank: int | None = None,
    original: str | Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[dict]:
    """Stable ranks, energies and errors of the experts of a checkpoint; nothing is written.

    A factorised checkpoint answers from its provenance. Any other is decomposed, and the errors are those that
    factors of the given rank without kept rows would make.

    Args:
        stats: weighs errors by what the experts saw; plain without.
        rank: by default 32, or the largest that fits.
        original: the checkpoint before merging, for its stable ranks.

    Returns:
        entries of `MatrixReport`, one per stored expert and matrix.
    """
    source = Checkpoint(checkpoint)
    family = inspectable_family_of(source)
    known = read_provenance(source).get("factors", {}).get("matrices")
    if known:
        if rank is not None or stats is not None or original is not None:
            raise UserError(
                f"{source.path} is factorised: its own report is shown, without --rank, --stats, --original"
            )
        return known
    layers = check_request(family, source, keep_layers=["none"], export="exact")
    fits = min(DEFAULT_RANK, *(min(layer.d_model, layer.d_ff) for layer, _ in layers))
    options = FactorOptions(rank=fits if rank is None else rank, keep_rows=0.0, refit=False)
    options = options.resolve(has_stats=stats is not None)
    check_rank(options, layers)
    if stats is not None:
        stats = stats if isinstance(stats, Stats) else Stats.load(stats)
    sources = FactorSources(family, source, options, stats, expert_maps(family, source, stats))
    shape = FactorShape(options.rank or 1, 0)
    workers = workers or os.cpu_count() or 1
    shapes = lambda layer: dict.fromkeys(layer.matrices, shape)
    results = in_order(lambda job: factorize_layer(sources, job[0], job[1], shapes(job[0]), None), layers, workers)
    reports: list[dict] = []
    for done, experts in enumerate(results, 1):
        reports += [asdict(report) for expert in experts for report in expert.reports]
        if progress:
            progress(done, len(layers))
    if original is not None:
        reports = with_ranks_before(reports, Checkpoint(original), family, source, workers=workers)
    return reports


def check_request(
    family: Family, source: Checkpoint, *, keep_layers: list[str] | None, export: str
) -> list[tuple[MoELayer, int]]:
    """The layers to factorise, each with its number of stored experts.

    Raises:
        UserError: for a checkpoint that cannot be factorised or stored that way.
    """
    stored = family.stored_layers(source)
    if not stored:
        raise UserError(f"{source.path} is not a Mixture-of-Experts model: it has no router")
    if source.config.get("factors"):
        raise UserError(f"{source.path} is factorised already: start from the checkpoint that it was made from")
    if export not in ("exact", "native"):
        raise UserError(f"--export {export} cannot be combined with factors; choose exact or native")
    if export == "native" and family.is_exact(source):
        raise UserError(f"--export native needs a stock checkpoint, original or native; {source.path} is exact")
    layers = tuple(layer for layer, _ in stored)
    kept = family.default_kept_layers(layers) if keep_layers is None else keep_layers
    for name in kept:
        if name not in (*(layer.name for layer in layers), "none"):
            raise UserError(f"unknown layer in --keep-layer {name!r}; choose from {', '.join(n.name for n in layers)}")
    chosen = [(layer, count) for layer, count in stored if layer.name not in kept]
    if not chosen:
        raise UserError("every MoE layer is kept: nothing to factorise")
    return chosen


def expert_maps(family: Family, source: Checkpoint, stats: Stats | None) -> dict[str, Tensor]:
    """Layer -> stored expert of every expert that the statistics count, or of every row that the router has left.

    Raises:
        UserError: if the statistics are neither of the checkpoint nor of the original that it was made from.
    """
    if stats is None:
        return {}
    plan = None
    if stats.checkpoint.get("fingerprint") != source.fingerprint:
        before = read_provenance(source).get("source", {}).get("fingerprint")
        if stats.checkpoint.get("fingerprint") != before:
            stats.check_against(source)
        if not family.is_exact(source) and (source.path / "plan.json").exists():
            plan = Plan.load(source.path / "plan.json")
    maps = {}
    for layer, _ in family.stored_layers(source):
        if family.is_exact(source):
            maps[layer.name] = source.read(family.expert_map_key(source, layer.name))
        elif plan is not None and layer.name in plan.layers and keeps_routing(plan, layer.name):
            maps[layer.name] = torch.tensor(plan.layers[layer.name].expert_map)
        else:
            maps[layer.name] = torch.arange(layer.num_experts)
    return maps


def keeps_routing(plan: Plan, layer: str) -> bool:
    """Whether every original expert still has a place, so that its tokens go where it went."""
    layer_plan = plan.layers[layer]
    return len(layer_plan.routes(plan.parameters).rows) == layer_plan.num_experts


def write_experts(
    writer: CheckpointWriter,
    layout: Layout,
    sources: FactorSources,
    layers: Sequence[tuple[MoELayer, int]],
    shapes: dict[str, LayerFactors],
    scratch: Path,
    *,
    workers: int,
    progress: Progress | None,
) -> None:
    """Factorise the layers that are not written yet, several at a time, and write them in order."""
    family = sources.family
    writer.finish_copied()
    counts = {layer.name: count for layer, count in layers}
    pending = [(n, count) for n, count in layers if f"{n.name}/{count - 1}" not in writer.notes]
    scratch_or_none = scratch if scratch.exists() else None
    results = in_order(
        lambda job: factorize_layer(sources, job[0], job[1], shapes[job[0].name], scratch_or_none), pending, workers
    )
    for done, ((layer, _), experts) in enumerate(zip(pending, results, strict=True), 1):
        names: dict[str, None] = {}
        for g, expert in enumerate(experts):
            count = counts[layer.name]
            for place, values in expert_places(layout, family, sources.checkpoint, layer, g, count, expert.stored):
                writer.write_place(place, values, finish=False)
                names[place.tensor] = None
        notes = {
            f"{layer.name}/{g}": {"matrices": [asdict(report) for report in expert.reports]}
            for g, expert in enumerate(experts)
        }
        writer.finish(*names, notes=notes)
        if progress:
            progress(done, len(pending))


def with_ranks_before(
    matrices: list[dict], original: Checkpoint, family: Family, source: Checkpoint, *, workers: int
) -> list[dict]:
    """The reports with the stable rank that the members of each merged expert had, on average.

    Raises:
        UserError: if the checkpoint carries no plan, or one that was made for another original.
    """
    plan = Plan.load(source.path / "plan.json")
    origin = inspectable_family_of(original)
    plan.check_against(original, origin.layers(original))
    fronts = {layer.name: layer.front for layer in origin.layers(original)}
    known = [m for m in matrices if m["layer"] in plan.layers]

    def mean_rank(report: dict) -> float:
        name = report["layer"]
        layer = plan.layers[name]
        members = layer.groups[layer.stored_order[report["expert"]]].members
        experts = (origin.load_expert(original, name, e) for e in members)
        ranks = [stable_rank(e.front if report["matrix"] == fronts[name] else e.output) for e in experts]
        return sum(ranks) / len(ranks)

    for report, rank in zip(known, in_order(mean_rank, known, workers), strict=True):
        report["stable_rank_before"] = rank
    return matrices


def output_plan(plan: Plan | None, source: Checkpoint, family: Family, options: FactorOptions, layout: Layout) -> Plan:
    """The plan as given, the one that the input carries, or one that keeps every expert; with the new size."""
    predicted = {"num_parameters": layout.num_parameters, "bytes": layout.num_bytes}
    if plan is not None:
        return replace(plan, predicted=predicted)
    if (source.path / "plan.json").exists():
        return replace(Plan.load(source.path / "plan.json"), predicted=predicted)
    layers = {n.name: LayerPlan.identity(n.num_experts) for n, _ in family.stored_layers(source)}
    checkpoint = {"model_type": source.model_type, "fingerprint": source.fingerprint}
    chosen = asdict(options) | {"refit": "independent" if options.refit else "none"}
    parameters = Parameters.from_dict(chosen, "parameters")
    return Plan("factorize", parameters, 0, checkpoint, {}, layers, predicted)
