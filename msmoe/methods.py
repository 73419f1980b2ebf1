"""The table of methods, and the one function that turns any of them into a plan: stats (+ weights) -> plan.

A method is a row: how experts are grouped, weighted, aligned, and what follows the average. A new method is a row
here, with a function of its own where an existing one does not do.
"""

import difflib
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from msmoe.align import Alignment
from msmoe.calibration.stats import LayerStats, Stats
from msmoe.checkpoint import Checkpoint
from msmoe.errors import UserError
from msmoe.export import EXPORTS, build_export
from msmoe.factorize.choose import check_budget, check_rank, expert_bytes, fixed_shapes
from msmoe.factorize.factors import ROW_SCORES
from msmoe.factorize.options import DEFAULT_KEEP_ROWS, DEFAULT_RANK, SIZES, FactorOptions
from msmoe.families import Family, MoELayer, family_of
from msmoe.families.base import load_expert
from msmoe.grouping import GROUPINGS, Budget, group_counts, group_experts
from msmoe.plan import Group, LayerPlan, Plan
from msmoe.router import ROUTERS
from msmoe.similarity import BASES, LayerView, Metric, similarity

Refitting = Literal["none", "independent", "sequential"]


@dataclass(frozen=True)
class Parameters:
    """Choices of a plan; they are stored in it and decide everything that `apply` does.

    Attributes:
        experts: experts kept per compressible layer, on average.
        budget: `adaptive` gives more to layers whose usage is spread, `uniform` the same to all.
        similarity: a key of `msmoe.similarity.BASES`; metric: `cosine` or `distance`.
        grouping: a key of `msmoe.grouping.GROUPINGS`; group_capacity: most members of a group.
        weighting: `usage` or `uniform`.
        align: how neurons are matched; align_to: the group's `dominant` expert, or the `first` of the layer.
        canonical: scale ReLU neurons to a canonical form before matching and averaging.
        refit: re-solve `wo` on calibration tokens, each layer by itself or in order; and again after factorising.
        rank, keep_rows, energy, target_bytes, target_ratio, svd, row_score: factorise the merged experts, if a rank,
            an energy or a target is given; see `msmoe.factorize.options.FactorOptions`. `target_ratio` is of the
            original's bytes.
    """

    experts: float = 8
    budget: Budget = "adaptive"
    similarity: str = "router-logits"
    metric: Metric = "cosine"
    grouping: str = "dominant"
    group_capacity: int | None = None
    weighting: Literal["usage", "uniform"] = "usage"
    align: Alignment = "weight"
    align_to: Literal["dominant", "first"] = "dominant"
    canonical: bool = False
    refit: Refitting = "none"
    rank: int | None = None
    keep_rows: float = DEFAULT_KEEP_ROWS
    energy: float | None = None
    target_bytes: int | None = None
    target_ratio: float | None = None
    svd: Literal["activation", "plain"] = "activation"
    row_score: Literal["activation", "magnitude"] = "activation"

    @property
    def factors(self) -> FactorOptions | None:
        """How the merged experts are factorised; None if they are not."""
        if all(getattr(self, name) is None for name in SIZES):
            return None
        names = ("keep_rows", "svd", "row_score", *SIZES)
        chosen = FactorOptions(**{name: getattr(self, name) for name in names}, refit=self.refit != "none")
        return chosen.resolve(has_stats=True)


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    name: str
    summary: str
    source: str
    defaults: Parameters


METHODS = {
    method.name: method
    for method in (
        Method(
            "m-smoe",
            "usage-weighted average of aligned experts, grouped around the dominant ones by router logits",
            "arXiv 2310.01334",
            Parameters(),
        ),
        Method(
            "m-smoe-refit",
            "m-smoe, then wo of each merged expert re-solved on calibration tokens in closed form",
            "this project; after arXiv 2510.14436",
            Parameters(refit="independent"),
        ),
        Method(
            "average",
            "plain average of the groups of m-smoe, aligned",
            "baseline of arXiv 2310.01334",
            Parameters(weighting="uniform"),
        ),
        Method(
            "mc-smoe",
            "m-smoe, then the merged experts stored as low rank plus a few rows",
            "arXiv 2310.01334",
            Parameters(rank=DEFAULT_RANK),
        ),
        Method(
            "mc-smoe-refit",
            "m-smoe-refit, then low rank plus a few rows, wo re-solved once more for the truncated wi",
            "this project; after arXiv 2310.01334",
            Parameters(refit="independent", rank=DEFAULT_RANK),
        ),
    )
}
CHOICES = {
    "budget": ("adaptive", "uniform"),
    "similarity": tuple(BASES),
    "metric": ("cosine", "distance"),
    "grouping": tuple(GROUPINGS),
    "weighting": ("usage", "uniform"),
    "align": ("weight", "activation", "none"),
    "align_to": ("dominant", "first"),
    "refit": ("none", "independent", "sequential"),
    "svd": ("activation", "plain"),
    "row_score": ROW_SCORES,
}


def choose(kind: str, name: str, choices: "tuple[str, ...] | dict") -> str:
    """Return `name` if it is a choice; otherwise raise `UserError` with the list and the closest one."""
    if name in choices:
        return name
    close = difflib.get_close_matches(str(name), list(choices), n=1)
    hint = f" - did you mean {close[0]!r}?" if close else "."
    raise UserError(f"unknown {kind} {name!r}{hint} Choose one of: {', '.join(choices)}")


def plan(
    checkpoint: str | Path,
    stats: Stats | str | Path,
    *,
    method: str = "m-smoe-refit",
    keep_layers: list[str] | None = None,
    seed: int = 0,
    export: str = "exact",
    **choices,
) -> Plan:
    """Decide which experts of a checkpoint become one.

    Args:
        checkpoint: checkpoint folder.
        stats: its statistics, or their directory.
        method: a key of `METHODS`.
        keep_layers: layers left as they are; by default the first MoE layer of the encoder, `["none"]` for none.
        seed: for seeded groupings and similarities.
        export: the export for which size is predicted.
        **choices: any attribute of `Parameters`, in place of the method's default.

    Raises:
        UserError: for statistics of another checkpoint, an unknown name or an impossible number of experts.
    """
    source = Checkpoint(checkpoint)
    family = family_of(source)
    stats = stats if isinstance(stats, Stats) else Stats.load(stats)
    stats.check_against(source)
    parameters = resolve(method, choices)
    layers = family.layers(source)
    kept = resolve_kept_layers(family, layers, keep_layers)
    compressible = [layer for layer in layers if layer.name not in kept]
    parameters = with_rank_that_fits(parameters, choices, compressible)
    counts = check_counts(
        compressible, [stats.layers[n.name].usage_frequency.numpy() for n in compressible], parameters
    )
    planned = {
        layer.name: plan_layer(family, source, layer.name, stats.layers[layer.name], count, parameters, seed=seed)
        for layer, count in zip(compressible, counts, strict=True)
    }
    result = Plan(
        method=method,
        parameters=asdict(parameters) | {"keep_layers": kept},
        seed=seed,
        checkpoint={"model_type": source.model_type, "fingerprint": source.fingerprint},
        stats={"sha256": stats.digest},
        layers=planned,
    )
    return predict(family, source, result, export=export)


def check_request(
    family: Family,
    checkpoint: Checkpoint,
    *,
    method: str,
    export: str,
    router: str,
    keep_layers: list[str] | None,
    **choices,
) -> None:
    """Raise `UserError` for everything about a plan and its export that is wrong whatever calibration will see."""
    parameters = resolve(method, choices)
    choose("export", export, EXPORTS)
    choose("router", router, ROUTERS)
    layers = family.layers(checkpoint)
    kept = resolve_kept_layers(family, layers, keep_layers)
    compressible = [layer for layer in layers if layer.name not in kept]
    parameters = with_rank_that_fits(parameters, choices, compressible)
    flat = [np.full(layer.num_experts, 1 / layer.num_experts) for layer in compressible]
    counts = check_counts(compressible, flat, parameters)
    if parameters.factors is not None:
        check_rank(parameters.factors, list(zip(compressible, counts, strict=True)))
        if export == "dense" or (export == "native" and parameters.factors.is_budget):
            raise UserError(f"--export {export} cannot store factors: choose exact, or native with --rank or --energy")
        if parameters.factors.is_budget:
            maps = 8 * sum(layer.num_experts for layer in layers)
            dense = expert_bytes([(layer, layer.num_experts) for layer in compressible])
            stored = list(zip(compressible, counts, strict=True))
            check_budget(parameters.factors, stored, others=checkpoint.num_bytes - dense + maps, source=checkpoint)
    if export != "exact" and (kept or parameters.budget != "uniform") and set(counts) != {1}:
        raise UserError(f"--export {export} needs --budget uniform --keep-layer none")


def predict(family: Family, checkpoint: Checkpoint, plan: Plan, *, export: str) -> Plan:
    """The plan with the parameters and bytes that `apply` will write for an export."""
    options, factors = factor_options(plan.parameters), None
    if options is not None:
        if export == "dense":
            raise UserError("--export dense cannot store factors: choose exact, or native with --rank or --energy")
        layers = [(n, len(plan.layers[n.name].groups)) for n in family.layers(checkpoint) if n.name in plan.layers]
        check_rank(options, layers)
        if options.is_budget:
            if export == "native":
                raise UserError(
                    "--export native multiplies the factors out and saves no bytes: give --rank or --energy"
                )
            layout = build_export(export, family, checkpoint, plan)
            check_budget(options, layers, others=layout.num_bytes - expert_bytes(layers), source=checkpoint)
        if export == "exact" and options.rank is None:
            return replace(plan, predicted={})  # known once the merged experts are decomposed
        factors = fixed_shapes(options, layers) if export == "exact" else None
    layout = build_export(export, family, checkpoint, plan, factors=factors)
    return replace(plan, predicted={"num_parameters": layout.num_parameters, "bytes": layout.num_bytes})


def factor_options(parameters: dict) -> FactorOptions | None:
    """How a plan's merged experts are factorised; None if they are not."""
    known = {f.name for f in fields(Parameters)}
    for name in (*SIZES, "keep_rows"):
        if not isinstance(parameters.get(name, 0), int | float | None):
            raise UserError(f"{name} of a plan must be a number or null, got {parameters[name]!r}")
    return Parameters(**{name: value for name, value in parameters.items() if name in known}).factors


def resolve(method: str, choices: dict) -> Parameters:
    """The method's parameters with the caller's choices; None means the default."""
    defaults = METHODS[choose("method", method, METHODS)].defaults
    given = {name: value for name, value in choices.items() if value is not None}
    for name in given:
        choose("parameter", name, tuple(asdict(defaults)))
    check_parameters(given)
    if any(name in given for name in SIZES) and "rank" not in given:
        given["rank"] = None  # another way to choose sizes takes the place of the method's rank
    parameters = replace(defaults, **given)
    if parameters.factors is None:
        for name in ("keep_rows", "svd", "row_score"):
            if name in given:
                raise UserError(f"--{name.replace('_', '-')} has no effect with method {method}: give --rank, --energy "
                                "or a target as well, or choose mc-smoe")  # fmt: skip
    if parameters.group_capacity is not None and parameters.grouping != "dominant":
        raise UserError(f"--group-capacity has no effect with --grouping {parameters.grouping}")
    return parameters


def with_rank_that_fits(parameters: Parameters, choices: dict, layers: list[MoELayer]) -> Parameters:
    """A method's own rank, where the user gave none, cut to the size of the matrices."""
    if parameters.rank is None or choices.get("rank") is not None or not layers:
        return parameters
    return replace(parameters, rank=min(parameters.rank, *(min(n.d_model, n.d_ff) for n in layers)))


def check_parameters(parameters: dict) -> None:
    """Raise `UserError` for a value that is none of its parameter's choices."""
    for name, allowed in CHOICES.items():
        if name in parameters:
            choose(name.replace("_", "-"), parameters[name], allowed)
    if not isinstance(parameters.get("canonical", False), bool):
        raise UserError(f"canonical must be true or false, got {parameters['canonical']!r}")


def resolve_kept_layers(family: Family, layers: tuple[MoELayer, ...], names: list[str] | None) -> list[str]:
    """Names of the layers to keep; None stands for the family's default, `none` for no layer."""
    if names is None:
        return list(family.default_kept_layers(layers))
    if names == ["none"]:
        return []
    for name in names:
        choose("layer in --keep-layer", name, tuple(layer.name for layer in layers))
    return names


def check_counts(layers: list[MoELayer], usage: list[np.ndarray], parameters: Parameters) -> list[int]:
    """Experts kept per layer, everything checked that can be before the work starts."""
    if not layers:
        raise UserError("every MoE layer is kept: nothing to compress")
    largest = min(layers, key=lambda layer: layer.num_experts)
    if not 1 <= parameters.experts <= largest.num_experts:
        raise UserError(
            f"--experts must be between 1 and {largest.num_experts} (num_experts of {largest.name}), "
            f"got {parameters.experts:g}"
        )
    return group_counts(usage, parameters.experts, budget=parameters.budget)


def plan_layer(
    family: Family,
    checkpoint: Checkpoint,
    name: str,
    stats: LayerStats,
    count: int,
    parameters: Parameters,
    *,
    seed: int,
) -> LayerPlan:
    """Group the experts of one layer and weight them."""
    if count == stats.num_experts:
        ordered = sorted(range(count), key=lambda e: (-float(stats.usage_frequency[e]), e))
        return LayerPlan(count, tuple(Group(e, (e,), (1.0,)) for e in ordered))
    seed = zlib.crc32(f"{seed}/{name}".encode())
    view = LayerView(
        stats=stats,
        router=checkpoint.read_finite(family.router_key(name)),
        expert=expert_cache(family, checkpoint, name),
        seed=seed,
    )
    matrix = similarity(view, base=parameters.similarity, metric=parameters.metric)
    if not matrix.isfinite().all():
        raise UserError(f"the {parameters.similarity} similarity of the experts of {name} is not finite")
    groups = group_experts(
        stats.usage_frequency,
        matrix,
        count,
        grouping=parameters.grouping,
        capacity=parameters.group_capacity,
        seed=seed,
    )
    return LayerPlan(
        stats.num_experts,
        tuple(
            Group(dominant, tuple(members), member_weights(stats.routed, members, parameters.weighting))
            for dominant, members in groups
        ),
    )


def expert_cache(family: Family, checkpoint: Checkpoint, name: str) -> Callable:
    return lambda expert: load_expert(family, checkpoint, name, expert)


def member_weights(routed: Tensor, members: list[int], weighting: str) -> tuple[float, ...]:
    """Usage frequencies within the group, or the same for all; the latter also where no member was ever used."""
    counts = routed[members].double()
    if weighting == "uniform" or counts.sum() == 0:
        counts = torch.ones_like(counts)
    return tuple((counts / counts.sum()).tolist())
