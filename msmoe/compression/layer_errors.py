"""Layer errors: what compression did to each MoE layer, on sampled calibration tokens and from files alone.

A layer is taken by itself: its tokens are those that the original model showed it. What compressed layers hand on to
one another is not in it, and neither are tokens over capacity.

Shapes: E experts of the original, T tokens, K experts of a token, D d_model.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from msmoe.calibration.stats import LayerStats, Stats
from msmoe.checkpoint import Checkpoint
from msmoe.compression.provenance import read_provenance
from msmoe.errors import UserError
from msmoe.families import Family, family_of, inspectable_family_of
from msmoe.families.protocol import load_stored_expert
from msmoe.layer.expert import Expert
from msmoe.layer.layer import Layer
from msmoe.layer.routing import Routing
from msmoe.lowrank.measures import stable_rank
from msmoe.merge import RULES
from msmoe.planning.parameters import Parameters
from msmoe.planning.plan import Plan
from msmoe.workers import Progress

GATE_TOLERANCE = 1e-4  # relative; rounding of float32 logits stays below


class StableRanks(NamedTuple):
    """Mean over a layer's experts of |W|_F^2 / |W|_2^2, of all input matrices together and of the output."""

    front: float
    output: float


@dataclass(frozen=True)
class LayerError:
    """What compression did to one layer.

    Attributes:
        error: the relative output error, sum_t w_t |y_t - y'_t|^2 / sum_t w_t |y_t|^2, with y the gate-weighted output
            of the original layer, y' that of the compressed one, and w the number of calibration tokens that each one
            stands for; NaN without tokens. 0 is unchanged, 1 as far off as no output, and more is possible.
        by_expert: (E,) float64, the same over the tokens of each original expert; NaN where there are none.
        num_tokens: tokens that it was measured on.
        rerouted: share of the calibration tokens, in [0, 1], that meet another gate value, or another stored expert
            than the one that stands for their own: 0 where the router keeps all its rows. NaN without tokens, or where
            no plan says which stored expert stands for which.
        seen: whether the compressed weights were computed from the tokens of these very statistics: the error is then
            smaller than on other tokens.
        stable_rank_before, stable_rank_after: mean over the original and over the stored experts; None if not asked
            for.
    """

    error: float
    by_expert: Tensor
    num_tokens: int
    rerouted: float
    seen: bool
    stable_rank_before: StableRanks | None
    stable_rank_after: StableRanks | None


def layer_errors(
    original: str | Path | Checkpoint,
    compressed: str | Path | Checkpoint,
    stats: Stats | str | Path,
    *,
    tokens: int = 1024,
    every: bool = False,
    stable_ranks: bool = True,
    progress: Progress | None = None,
) -> dict[str, LayerError]:
    """Measure the output error of every MoE layer of a compressed checkpoint.

    On held-out tokens, which choose the ridge of a refit. Its final solution is fitted to both halves: on the
    statistics that a refit was made from the error comes out too small (`LayerError.seen`). Statistics of other
    records do not have that fault, and all of their tokens may be used.

    Args:
        original: the checkpoint that was compressed.
        compressed: what was made from it, `exact` or `native`; or the original itself.
        stats: statistics of the original.
        tokens: most tokens per layer; rare experts get more than their share, which the weights undo.
        every: use all tokens of the sample, not the held-out half alone.
        stable_ranks: also compute stable ranks, two eigenvalue problems per expert.
        progress: called with (layers done, layers in all).

    Returns:
        layer -> its error, in forward order.

    Raises:
        UserError: for statistics or checkpoints that do not belong together, a `dense` checkpoint, and NaN or
            infinite weights, naming the tensor.
    """
    source, target = (c if isinstance(c, Checkpoint) else Checkpoint(c) for c in (original, compressed))
    family, stored_family = family_of(source), inspectable_family_of(target)
    stats = stats if isinstance(stats, Stats) else Stats.load(stats)
    stats.check_against(source)
    if tokens < 1:
        raise UserError(f"tokens must be at least 1, got {tokens}")
    check_layers(source, family, target, stored_family, stats)
    plan = Plan.load(target.path / "plan.json") if (target.path / "plan.json").exists() else None
    seen = computed_from(target, plan, stats)
    result: dict[str, LayerError] = {}
    for layer, count in stored_family.stored_layers(target):
        num_experts = stats.layers[layer.name].num_experts
        before = read_layer(family, source, layer.name, num_experts)
        after = read_layer(stored_family, target, layer.name, count)
        planned = plan.layers.get(layer.name) if plan else None
        places = torch.tensor(planned.expert_map) if planned else None
        result[layer.name] = compare_layers(
            before, after, places, stats.layers[layer.name], tokens=tokens, every=every, stable_ranks=stable_ranks,
            seen=seen and planned is not None,
        )  # fmt: skip
        if progress:
            progress(len(result), len(stats.layers))
    return result


def refit_errors(groups: Iterable[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Relative output error of the refitted groups of each layer before and after the refit, as `LayerError.error`.

    Over the held-out tokens of these groups alone: the errors of groups, weighed by the squares they are relative to.

    Args:
        groups: as `ApplyReport.groups` and `msmoe.json` list them.

    Returns:
        layer -> errors, of layers with a refitted group that has held-out tokens.
    """
    sums: dict[str, list[float]] = {}
    for group in groups:
        refit = group.get("refit") or {}
        square = refit.get("held_out_square")
        if square and refit.get("error_before") is not None:
            total = sums.setdefault(group["layer"], [0.0, 0.0, 0.0])
            total[0] += square * refit["error_before"]
            total[1] += square * refit["error_after"]
            total[2] += square
    return {layer: (before / square, after / square) for layer, (before, after, square) in sums.items()}


def routing_costs(
    original: Checkpoint, native: Checkpoint, plan: Plan, stats: Stats, *, tokens: int = 1024
) -> dict[str, tuple[float, float]]:
    """What the reduced routers of a `native` export cost: output errors under the plan's routing, and under theirs.

    A refit of a native export solves for the routing of its own routers: under the plan's routing, with the gate values
    of the original, such weights are off.

    Returns:
        layer with a reduced router -> relative squared output errors on held-out tokens: with original rows and map, as
        an `exact` export of the same plan has it, and with the rows of the export. NaN without tokens.
    """
    family, costs = family_of(original), {}
    for layer in family.layers(native):
        if family.router(original, layer.name) is None:
            continue
        before = read_layer(family, original, layer.name, stats.layers[layer.name].num_experts)
        exported = read_layer(family, native, layer.name, layer.num_experts)
        if layer.name not in plan.layers or exported.router.num_experts == before.router.num_experts:
            continue
        targets = torch.tensor(plan.layers[layer.name].expert_map)
        planned = replace(exported, router=before.router, targets=targets)
        how = {"tokens": tokens, "every": False, "stable_ranks": False, "seen": True}
        errors = [compare_layers(before, after, None, stats.layers[layer.name], **how) for after in (planned, exported)]
        costs[layer.name] = errors[0].error, errors[1].error
    return costs


def check_layers(source: Checkpoint, family: Family, target: Checkpoint, stored_family: Family, stats: Stats) -> None:
    """Raise `UserError` unless a checkpoint may have been made from another one that the statistics describe."""
    layers = {layer.name: layer for layer in family.layers(source)}
    stored = {layer.name: layer for layer, _ in stored_family.stored_layers(target)}
    for path, names in ((target.path, stored), ("the statistics", stats.layers)):
        if set(names) != set(layers):
            different = sorted(set(names) ^ set(layers))[0]
            raise UserError(f"{path} and {source.path} do not belong together: only one of them has {different}")
    for name, layer in layers.items():
        if stats.layers[name].num_experts != layer.num_experts:
            raise UserError(
                f"the statistics count {stats.layers[name].num_experts} experts in {name}, "
                f"{source.path} has {layer.num_experts}"
            )
        if stored[name].num_experts > layer.num_experts or stored[name].d_model != layer.d_model:
            raise UserError(
                f"{target.path} has {stored[name].num_experts} router rows of width {stored[name].d_model} in {name}: "
                f"it was not made from {source.path}, with {layer.num_experts} of width {layer.d_model}"
            )


def computed_from(target: Checkpoint, plan: Plan | None, stats: Stats) -> bool:
    """Whether weights, mean outputs or routers were solved for, or weighed by, tokens of these statistics."""
    about = read_provenance(target)
    parameters = plan.parameters if plan else Parameters()
    rule = RULES.get(parameters.rule)
    merging_does = (
        parameters.refit != "none"
        or parameters.others == "mean-output"
        or (rule is not None and rule.needs_tokens)
        or bool(about.get("routers"))
    )
    factors = about.get("factors", {})
    used = covered(about.get("stats", {})) if merging_does else frozenset()
    if factors.get("options", {}).get("refit"):
        used |= covered(factors.get("stats") or about.get("stats", {}))
    return bool(used & stats.covers)


def made_from(target: Checkpoint) -> frozenset[str]:
    """Digests of all statistics that a compressed checkpoint says it was made from."""
    about = read_provenance(target)
    return covered(about.get("stats", {})) | covered(about.get("factors", {}).get("stats", {}))


def covered(reference: dict) -> frozenset[str]:
    """Digests behind a reference to statistics."""
    digest = reference.get("sha256")
    return frozenset(reference.get("parts") or ([digest] if digest else []))


def read_layer(family: Family, checkpoint: Checkpoint, name: str, num_stored: int) -> Layer:
    """A layer of an original, `exact` or `native` checkpoint; experts are read when asked for."""
    router = family.router(checkpoint, name)
    if router is None:
        raise UserError(f"the outputs of {name} cannot be computed from files alone: its router cannot be asked")
    exact, constants = family.is_exact(checkpoint), family.constants_key(checkpoint, name)
    return Layer(
        router=router,
        targets=(
            checkpoint.read(family.expert_map_key(checkpoint, name)) if exact else torch.arange(router.num_experts)
        ),
        num_stored=num_stored,
        expert=lambda index: load_stored_expert(family, checkpoint, name, index),
        constants=checkpoint.read_finite(constants) if constants in checkpoint else router.rows[:0],
    )


class RankMeans:
    """Means of the stable ranks of the experts that it is called with."""

    def __init__(self) -> None:
        self.ranks: list[tuple[float, float]] = []

    def __call__(self, expert: Expert) -> None:
        self.ranks.append((stable_rank(expert.front), stable_rank(expert.output)))

    def means(self) -> StableRanks:
        return StableRanks(*(sum(values) / len(values) for values in zip(*self.ranks, strict=True)))


def compare_layers(
    before: Layer,
    after: Layer,
    places: Tensor | None,
    stats: LayerStats,
    *,
    tokens: int,
    every: bool,
    stable_ranks: bool,
    seen: bool,
) -> LayerError:
    """Measure one layer.

    Args:
        places: (E,) the stored expert that stands for each original one, -1 for none; None where that is unknown.
        seen: whether the compressed layer was computed from the sample.
    """
    sample = stats.tokens()
    sample = (sample if every else sample.select(sample.held_out)).drawn(tokens, stats.num_experts)
    weights = sample.weights(stats.dispatched)
    routed, ranks = after.route(sample, before), (RankMeans(), RankMeans())
    visits = ranks if stable_ranks else (None, None)
    wanted = before.run(sample.inputs, before.route(sample, before), visit=visits[0])
    given = after.run(sample.inputs, routed, visit=visits[1])
    error, by_expert = relative_errors(wanted, given - wanted, weights, sample.expert, stats.num_experts)
    if after.router.equals(before.router):
        places = after.targets
    rerouted = float("nan")
    if places is not None and len(sample):
        num_places = after.num_stored + len(after.constants)
        change = by_place(routed, num_places) - by_place(Routing(places[sample.expert], sample.gate), num_places)
        moved = (change.abs() > GATE_TOLERANCE * sample.gate.sum(1, keepdim=True)).any(1)
        rerouted = float(weights @ moved.double() / weights.sum())
    means = [found.means() if stable_ranks else None for found in ranks]
    return LayerError(error, by_expert, len(sample), rerouted, seen, *means)


def by_place(routing: Routing, num_places: int) -> Tensor:
    """Weights (T, P + 1) with which tokens go to each of P places; those of the place -1 are in the last column."""
    weights = routing.weights.new_zeros(len(routing.experts), num_places + 1)
    return weights.scatter_add_(1, routing.experts % (num_places + 1), routing.weights)


def relative_errors(
    wanted: Tensor, change: Tensor, weights: Tensor, expert: Tensor, num_experts: int
) -> tuple[float, Tensor]:
    """Weighted squared change relative to the weighted squared output, of all tokens and by expert (E,), float64.

    NaN for no tokens, and for outputs of zero.

    Args:
        wanted, change: (T, D); weights: (T,) float64; expert: (T, K) of each token.
    """
    squares_T2 = torch.stack([t.double().square().sum(1) * weights for t in (change, wanted)], dim=1)
    sums_E2 = torch.zeros(num_experts, 2, dtype=torch.float64)
    sums_E2.index_add_(0, expert.flatten(), squares_T2.repeat_interleave(expert.shape[1], dim=0))
    total = sums_E2.sum(0)  # K times that of the tokens
    ratio = lambda sums: torch.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1], torch.nan)
    return float(ratio(total)), ratio(sums_E2)
