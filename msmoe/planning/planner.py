"""Plan: stats + weights + a method -> which experts of each layer are kept, and what becomes of the others.

Shapes: E experts.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from msmoe.calibration.stats import Stats
from msmoe.checkpoint import Checkpoint
from msmoe.compression.router import ROUTERS
from msmoe.errors import UserError, choose, warn
from msmoe.families import Family, MoELayer, family_of
from msmoe.formats.build import EXPORTS, build_export
from msmoe.lowrank.choose import check_budget, check_rank, expert_bytes, fixed_shapes
from msmoe.planning.grouping import REAM_CAPACITY, assign_to_kept, dominant_experts, group_counts, group_experts
from msmoe.planning.limits import check_layers
from msmoe.planning.methods import METHODS, REROUTING, check_statistics, resolve
from msmoe.planning.parameters import Parameters
from msmoe.planning.plan import Group, LayerPlan, Plan
from msmoe.planning.progressive import Routes, logit_routes, progressive_subset, router_routes
from msmoe.planning.scores import score_experts, shares
from msmoe.planning.similarity import LayerView, similarity
from msmoe.planning.sizes import Choices, settle
from msmoe.planning.subset import RoutedSubsetErrors, SubsetErrors, best_subset

RANKS = 4  # devices that should be able to share the experts of a layer equally


def plan(
    checkpoint: str | Path,
    stats: Stats | str | Path,
    *,
    method: str = "m-smoe-refit",
    keep_layers: list[str] | None = None,
    seed: int = 0,
    export: str | None = None,
    round_to: int = 1,
    **choices,
) -> Plan:
    """Decide which experts of a checkpoint are kept and what becomes of the others.

    Args:
        checkpoint: checkpoint folder.
        stats: its statistics, or their directory.
        method: a key of `METHODS`.
        keep_layers: layers left as they are; by default the first MoE layer of the encoder, `["none"]` for none.
        seed: for seeded scores, groupings and similarities.
        export: the export that the plan is for: its size is predicted, and what it can hold is kept to. By default the
            family's own, `exact` for Switch and `native` for decoders.
        round_to: keep a multiple of so many experts in each layer, rounded up, so that ranks can share them equally.
        **choices: any attribute of `Parameters`, in place of the method's default. `experts` may be a share such as
            `"25%"`. `target_size`, such as `"500MB"` or `"50%"` of the input, takes its place: the most experts whose
            written bytes fit are kept; a method that factorises gets the largest rank that fits.

    Raises:
        UserError: for statistics of another checkpoint or without what the method needs, an unknown name or an
            impossible number of experts or size.
    """
    planner = Planner(checkpoint, stats)
    return planner.plan(method, keep_layers=keep_layers, seed=seed, export=export, round_to=round_to, **choices)


@dataclass(frozen=True)
class Request:
    """A method with its parameters; per compressible layer, experts to keep, scores (E,) and seed."""

    method: str
    seed: int
    parameters: Parameters
    counts: dict[str, int]
    scores: dict[str, Tensor]
    seeds: dict[str, int]


class Planner:
    """Plans of one checkpoint and its statistics; what one method computes of a layer serves the next.

    Raises:
        UserError: for statistics of another checkpoint.
    """

    def __init__(self, checkpoint: str | Path | Checkpoint, stats: Stats | str | Path):
        self.source = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)
        self.family = family_of(self.source)
        self.stats = stats if isinstance(stats, Stats) else Stats.load(stats)
        self.stats.check_against(self.source)
        self.layers = self.family.layers(self.source)
        self._views: dict[str, LayerView] = {}

    def plan(
        self,
        method: str,
        *,
        keep_layers: list[str] | None = None,
        seed: int = 0,
        export: str | None = None,
        round_to: int = 1,
        **choices,
    ) -> Plan:
        """As `msmoe.plan`."""
        export = choose("export", export or self.family.exports[0], EXPORTS)
        choices = with_defaults(self.family, export, choices)
        asked = {"keep_layers": keep_layers, "seed": seed, "round_to": round_to}
        if export != "exact" and any(map(self._has_several_dtypes, self.layers)):  # then it matters which ones stay
            predicted: Callable[[Choices], int] = lambda tried: predict(
                self.family, self.source, self.decide(method, export=export, **asked, **tried), export=export
            ).predicted["bytes"]
        else:
            predicted = lambda tried: self.predicted_bytes(method, export=export, **asked, **tried)
        layers, held = self.compressible(keep_layers), held_counts(self.family, self.source, export, round_to)
        settled, target = settle(method, choices, layers, self.source.num_bytes, predicted, counts=held)
        decided = self.decide(method, export=export, **asked, **settled)
        if target is not None:
            decided = replace(decided, parameters=replace(decided.parameters, target_size=target))
        return predict(self.family, self.source, decided, export=export)

    def decide(
        self,
        method: str,
        *,
        keep_layers: list[str] | None = None,
        seed: int = 0,
        export: str = "exact",
        round_to: int = 1,
        **choices,
    ) -> Plan:
        """The plan without the size that it will have."""
        request = self._request(method, keep_layers, seed, round_to, choices, export)
        check_held(self.family, self.source, export, request.counts.values(), request.parameters)
        num_groups = {layer.name: layer.num_groups for layer in self.layers}
        planned, notes = {}, {}
        for name, count in request.counts.items():
            view = replace(self.view(name), seed=request.seeds[name])
            groups = num_groups[name] if export == "native" or request.parameters.loses_rows else 1
            planned[name], note = plan_layer(view, name, request.scores[name], count, request.parameters, groups)
            if note:
                notes[name] = note
        return self._plan(request, planned, notes)

    def predicted_bytes(
        self,
        method: str,
        *,
        keep_layers: list[str] | None = None,
        seed: int = 0,
        export: str = "exact",
        round_to: int = 1,
        **choices,
    ) -> int:
        """Bytes that a plan would store, from the numbers of experts alone: which ones are kept does not matter where
        all experts of a layer have the same dtypes, or the export stacks them.

        Raises:
            UserError: as `plan`, and for factors whose sizes follow from the merged weights.
        """
        choices = with_defaults(self.family, export, choices)
        request = self._request(method, keep_layers, seed, round_to, choices, export)
        counts = {name: (self.stats.layers[name].num_experts, count) for name, count in request.counts.items()}
        return sketched_bytes(self.family, self.source, method, request.parameters, counts, export=export)

    def _has_several_dtypes(self, layer: MoELayer) -> bool:
        """Whether the experts of a layer differ in the dtype of a matrix."""
        parts = [self.family.parts(self.source, layer.name, e) for e in range(layer.num_experts)]
        return any(len({self.source.spec(part.key).dtype for part in same}) > 1 for same in zip(*parts, strict=True))

    def compressible(self, keep_layers: list[str] | None) -> list[MoELayer]:
        """The MoE layers that are not kept as they are."""
        kept = resolve_kept_layers(self.family, self.layers, keep_layers)
        return [layer for layer in self.layers if layer.name not in kept]

    def _request(
        self, method: str, keep_layers: list[str] | None, seed: int, round_to: int, choices: dict, export: str
    ) -> "Request":
        """Check what is asked for, score the experts and spread the budget."""
        parameters = resolve(method, choices)
        layers = self.compressible(keep_layers)
        check_layers(self.family, layers, parameters, method=method, export=export)
        parameters = rounded(with_rank_that_fits(parameters, choices, layers), round_to, layers)
        for layer in layers:
            check_statistics(parameters, method, self.stats.layers[layer.name])
        seeds = {layer.name: zlib.crc32(f"{seed}/{layer.name}".encode()) for layer in layers}
        scores = {
            n.name: score_experts(parameters.saliency, self.stats.layers[n.name], seed=seeds[n.name]) for n in layers
        }
        parameters, counts = count_experts(method, layers, [shares(s) for s in scores.values()], parameters)
        return Request(method, seed, parameters, dict(zip(scores, counts, strict=True)), scores, seeds)

    def _plan(self, request: "Request", layers: dict[str, LayerPlan], notes: dict[str, str]) -> Plan:
        kept = [layer.name for layer in self.layers if layer.name not in request.counts]
        return Plan(
            method=request.method,
            parameters=replace(request.parameters, keep_layers=tuple(kept)),
            seed=request.seed,
            checkpoint={"model_type": self.source.model_type, "fingerprint": self.source.fingerprint},
            stats=self.stats.reference,
            layers=layers,
            notes=notes,
            kept={
                layer.name: bytes_of_experts(self.family, self.source, layer)
                for layer in self.layers
                if layer.name in kept
            },
        )

    def view(self, name: str) -> LayerView:
        """What similarities and searches may look at of a layer."""
        if name not in self._views:
            router = self.family.router(self.source, name)
            self._views[name] = LayerView(
                stats=self.stats.layers[name],
                router=router,
                expert=lambda expert: self.family.load_expert(self.source, name, expert),
            )
        return self._views[name]


def check_request(
    family: Family,
    checkpoint: Checkpoint,
    *,
    method: str,
    export: str | None,
    router: str,
    keep_layers: list[str] | None,
    round_to: int = 1,
    **choices,
) -> None:
    """Raise `UserError` for everything about a plan and its export that is wrong whatever calibration will see."""
    choose("method", method, METHODS)
    export = choose("export", export or family.exports[0], EXPORTS)
    choose("router", router, ROUTERS)
    choose("export", export, family.exports)
    choices = with_defaults(family, export, choices)
    layers = family.layers(checkpoint)
    kept = resolve_kept_layers(family, layers, keep_layers)
    compressible = [layer for layer in layers if layer.name not in kept]

    def counted(tried: Choices) -> tuple[Parameters, list[int]]:
        found = rounded(with_rank_that_fits(resolve(method, tried), tried, compressible), round_to, compressible)
        flat = [torch.full((layer.num_experts,), 1 / layer.num_experts) for layer in compressible]
        return count_experts(method, compressible, flat, found)

    def predicted(tried: Choices) -> int:
        found, numbers = counted(tried)
        stored = {n.name: (n.num_experts, count) for n, count in zip(compressible, numbers, strict=True)}
        return sketched_bytes(family, checkpoint, method, found, stored, export=export)

    held = held_counts(family, checkpoint, export, round_to)
    settled, _ = settle(method, choices, compressible, checkpoint.num_bytes, predicted, counts=held)
    parameters, counts = counted(settled)
    check_layers(family, compressible, parameters, method=method, export=export)
    if parameters.factors is not None:
        check_rank(parameters.factors, list(zip(compressible, counts, strict=True)))
        if export == "dense" or (export == "native" and parameters.factors.is_budget):
            raise UserError(f"--export {export} cannot store factors: choose exact, or native with --rank or --energy")
        if parameters.factors.is_budget:
            maps = 8 * sum(layer.num_experts for layer in layers)
            dense = expert_bytes([(layer, layer.num_experts) for layer in compressible])
            stored = list(zip(compressible, counts, strict=True))
            check_budget(parameters.factors, stored, others=checkpoint.num_bytes - dense + maps, source=checkpoint)
    for layer, count in zip(compressible, counts, strict=True):
        check_capacity(parameters, layer.num_experts, count)
    if export != "exact" and parameters.others == "mean-output":
        raise UserError(f"--export {export} cannot store mean outputs in place of experts: choose exact")
    if export != "exact" and (kept or parameters.budget != "uniform") and set(counts) != {1}:
        raise UserError(f"--export {export} needs --budget uniform --keep-layer none")
    check_held(family, checkpoint, export, counts, parameters)


def predict(family: Family, checkpoint: Checkpoint, plan: Plan, *, export: str) -> Plan:
    """The plan with the parameters and bytes that `apply` will write for an export."""
    options, factors = plan.parameters.factors, None
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


def sketch(num_experts: int, count: int, *, removes: bool, num_groups: int = 1) -> LayerPlan:
    """Some plan of a layer that keeps `count` experts, removing or merging the others: for its size only.

    Args:
        num_groups: of the router, in each of which as many experts stay if `count` can be shared.
    """
    split = num_groups if count % num_groups == 0 else 1
    kept = [e for part in parts_of(num_experts, split) for e in part[: count // split]]
    rest = (0, *(e for e in range(num_experts) if e not in kept))
    one_hot = (1.0, *[0.0] * (len(rest) - 1))
    first = Group(0, (0,), (1.0,)) if removes else Group(0, rest, one_hot)
    groups = (first, *(Group(e, (e,), (1.0,)) for e in kept[1:]))
    return LayerPlan(num_experts, groups, tuple(rest[1:]) if removes else ())


def sketched_bytes(
    family: Family,
    checkpoint: Checkpoint,
    method: str,
    parameters: Parameters,
    counts: dict[str, tuple[int, int]],
    *,
    export: str,
) -> int:
    """Bytes that a plan would store: which experts it keeps does not matter.

    Args:
        counts: of every layer that is not kept as it is, its number of experts and how many of them stay.

    Raises:
        UserError: for factors whose sizes follow from the merged weights.
    """
    removes = parameters.others in REROUTING
    num_groups = {layer.name: layer.num_groups for layer in family.layers(checkpoint)}
    sketches = {
        name: sketch(before, after, removes=removes, num_groups=num_groups[name])
        for name, (before, after) in counts.items()
    }
    source = {"model_type": checkpoint.model_type, "fingerprint": ""}
    drawn = Plan(method, parameters, 0, source, {}, sketches)
    found = predict(family, checkpoint, drawn, export=export).predicted
    if not found:
        raise UserError(f"the size of method {method} is known only once the merged experts are decomposed: "
                        "give --rank")  # fmt: skip
    return found["bytes"]


def bytes_of_experts(family: Family, checkpoint: Checkpoint, layer: MoELayer) -> int:
    """Bytes of the experts of a layer as they are."""
    parts = [part for e in range(layer.num_experts) for part in family.parts(checkpoint, layer.name, e)]
    names = {place.tensor for part in parts for place in part.places}
    return sum(checkpoint.spec(name).num_bytes for name in names)


def merged_size(checkpoint: Checkpoint, share: float, *, keep_layers: list[str] | None = None) -> dict[str, int]:
    """What a checkpoint would store with a share of the experts of each compressible layer, merged.

    Args:
        share: 0 to 1; a layer keeps at least one expert.
        keep_layers: as `plan`.

    Returns:
        `num_parameters` and `bytes` of the `exact` export.
    """
    family = family_of(checkpoint)
    layers = family.layers(checkpoint)
    kept = resolve_kept_layers(family, layers, keep_layers)
    sketches = {
        layer.name: sketch(layer.num_experts, max(1, round(share * layer.num_experts)), removes=False)
        for layer in layers
        if layer.name not in kept
    }
    source = {"model_type": checkpoint.model_type, "fingerprint": checkpoint.fingerprint}
    return predict(family, checkpoint, Plan("m-smoe", Parameters(), 0, source, {}, sketches), export="exact").predicted


def with_rank_that_fits(parameters: Parameters, choices: dict, layers: list[MoELayer]) -> Parameters:
    """A method's own rank, where the user gave none, cut to the size of the matrices."""
    if parameters.rank is None or choices.get("rank") is not None or not layers:
        return parameters
    return replace(parameters, rank=min(parameters.rank, *(min(n.d_model, n.d_ff) for n in layers)))


def resolve_kept_layers(family: Family, layers: tuple[MoELayer, ...], names: list[str] | None) -> list[str]:
    """Names of the layers to keep; None stands for the family's default, `none` for no layer."""
    if names is None:
        return list(family.default_kept_layers(layers))
    if names == ["none"]:
        return []
    for name in names:
        choose("layer in --keep-layer", name, tuple(layer.name for layer in layers))
    return names


def count_experts(
    method: str, layers: list[MoELayer], scores: list[Tensor], parameters: Parameters
) -> tuple[Parameters, list[int]]:
    """Experts kept per layer, and the parameters with the average that a `fixed` method has.

    Args:
        scores: (E,) of each layer, as shares of their sum.

    Raises:
        UserError: if no layer is left, or the number of experts is impossible.
    """
    if not layers:
        raise UserError("every MoE layer is kept: nothing to compress")
    if METHODS[method].fixed == "all":
        counts = [layer.num_experts for layer in layers]
        return replace(parameters, experts=float(np.mean(counts))), counts
    largest = min(layers, key=lambda layer: layer.num_experts)
    if not 1 <= parameters.experts <= largest.num_experts:
        raise UserError(
            f"--experts must be between 1 and {largest.num_experts} (num_experts of {largest.name}), "
            f"got {parameters.experts:g}"
        )
    return parameters, group_counts([s.numpy() for s in scores], parameters.experts, budget=parameters.budget)


def check_capacity(parameters: Parameters, num_experts: int, count: int) -> None:
    """Raise `UserError` if the groups of a layer cannot hold its experts."""
    limits = {"dominant": parameters.group_capacity, "centroids-first": parameters.group_capacity or REAM_CAPACITY}
    limit = limits.get(parameters.grouping) if parameters.others == "merge" else None
    if limit is not None and count * limit < num_experts:
        raise UserError(
            f"{count} groups of at most {limit} cannot hold {num_experts} experts: keep {-(-num_experts // limit)} or "
            "more, or raise --group-capacity"
        )


def with_defaults(family: Family, export: str, choices: dict) -> dict:
    """The choices, with an even budget where a decoder's own class, which holds no other, is asked for."""
    if family.is_causal and export == "native" and choices.get("budget") is None:
        return choices | {"budget": "uniform"}
    return choices


def rounded(parameters: Parameters, round_to: int, layers: list[MoELayer]) -> Parameters:
    """A number of experts raised to a multiple, at most all.

    Raises:
        UserError: for a multiple below 1.
    """
    if round_to < 1:
        raise UserError(f"--round-to must be at least 1, got {round_to}")
    if round_to == 1 or not layers:
        return parameters
    most = min(layer.num_experts for layer in layers)
    return replace(parameters, experts=min(most, math.ceil(parameters.experts / round_to) * round_to))


def held_counts(family: Family, checkpoint: Checkpoint, export: str, round_to: int) -> Sequence[int] | None:
    """Numbers of experts that every layer of a decoder's own class can have, ascending; None where any will do."""
    return family.counts(checkpoint, round_to=round_to) if export == "native" and family.is_causal else None


def check_held(
    family: Family, checkpoint: Checkpoint, export: str, counts: Iterable[int], parameters: Parameters
) -> None:
    """Raise `UserError` for numbers of experts that a decoder's routers cannot choose among; warn of ones that split
    badly."""
    if not family.is_causal or (export != "native" and not parameters.loses_rows):
        return
    num_groups = max(layer.num_groups for layer in family.layers(checkpoint))
    if num_groups > 1 and parameters.budget != "uniform":
        raise UserError(
            f"routers of {num_groups} groups keep the same number of experts in each, which --budget "
            f"{parameters.budget} does not give: choose uniform"
        )
    for count in dict.fromkeys(counts):
        family.check_count(checkpoint, count)
        num_experts = family.layers(checkpoint)[0].num_experts
        if export == "native" and num_experts % RANKS == 0 and count % RANKS:
            warn(f"{count} experts cannot be shared equally by {RANKS} devices, as expert parallelism needs: "
                 f"--round-to {RANKS} keeps {math.ceil(count / RANKS) * RANKS}")  # fmt: skip


def parts_of(num_experts: int, num_groups: int) -> list[list[int]]:
    """Experts of each group of a group-limited router."""
    size = num_experts // num_groups
    return [list(range(g * size, (g + 1) * size)) for g in range(num_groups)]


def plan_layer(
    view: LayerView, name: str, scores: Tensor, count: int, parameters: Parameters, num_groups: int = 1
) -> tuple[LayerPlan, str]:
    """Decide what becomes of the experts of one layer.

    Args:
        scores: (E,) the saliency of each.
        count: experts to keep.
        num_groups: groups of the router, each of which keeps as many.

    Returns:
        the layer's plan, and a note on how it was found, often empty.
    """
    stats, usage = view.stats, view.stats.usage_frequency
    by_usage = lambda e: (-float(usage[e]), e)
    if count == stats.num_experts:
        return LayerPlan(count, tuple(Group(e, (e,), (1.0,)) for e in sorted(range(count), key=by_usage))), ""
    if parameters.others == "merge":
        matrix, groups = finite_similarity(view, name, parameters), []
        for part in parts_of(len(scores), num_groups):
            found = group_experts(
                scores[part],
                matrix[part][:, part],
                count // num_groups,
                grouping=parameters.grouping,
                capacity=parameters.group_capacity,
                seed=view.seed,
            )
            groups += [(part[dominant], [part[m] for m in members]) for dominant, members in found]
        positive = scores[scores > 0]
        raised = scores.clamp(min=float(positive.min())) if len(positive) else scores  # as REAM
        weighed = {"usage": stats.routed, "uniform": torch.ones(stats.num_experts), "saliency": raised}
        made = [
            Group(dominant, tuple(members), member_weights(weighed[parameters.weighting], members))
            for dominant, members in groups
        ]
        return LayerPlan(stats.num_experts, tuple(sorted(made, key=lambda g: by_usage(g.dominant)))), ""
    kept, note = select_experts(view, scores, count, parameters, num_groups)
    if parameters.others == "nearest":
        labels = assign_to_kept(usage.numpy(), finite_similarity(view, name, parameters).numpy(), kept)
        members = {k: tuple(np.flatnonzero(labels == i).tolist()) for i, k in enumerate(kept)}
    else:
        members = {k: (k,) for k in kept}
    made = [Group(k, members[k], tuple(float(m == k) for m in members[k])) for k in sorted(kept, key=by_usage)]
    named = {m for g in made for m in g.members}
    removed = tuple(e for e in range(stats.num_experts) if e not in named)
    return LayerPlan(stats.num_experts, tuple(made), removed), note


def select_experts(
    view: LayerView, scores: Tensor, count: int, parameters: Parameters, num_groups: int
) -> tuple[list[int], str]:
    """The experts of a layer that a pruning method keeps, ascending, and a note on how they were found.

    Raises:
        UserError: for a search in the groups of a group-limited router.
    """
    if parameters.selection == "top":
        parts = parts_of(len(scores), num_groups)
        best = [dominant_experts(scores[part].numpy(), count // num_groups) for part in parts]
        return sorted(part[e] for part, chosen in zip(parts, best, strict=True) for e in chosen), ""
    if num_groups > 1:
        raise UserError(
            f"--selection {parameters.selection} does not work with a router of {num_groups} groups: use top"
        )
    if parameters.selection == "subset":
        found = best_subset(subset_errors(view), count)
        return list(found.experts), f"{found.search}; relative output error {found.error:.4f}"
    sample = view.stats.tokens()
    sample = sample.select(interleaved(sample.expert[:, 0], view.num_experts))
    weights = sample.weights(view.stats.dispatched).numpy()
    if sample.top_k == 1:
        routed: Routes = logit_routes(view.asked.logits(sample.routed_on).double().numpy())
    else:
        routed = router_routes(view.asked, sample.routed_on)
    return list(progressive_subset(routed, view.num_experts, weights, count)), ""


def subset_errors(view: LayerView) -> SubsetErrors | RoutedSubsetErrors:
    """What the errors of a layer's subsets follow from."""
    out = view.outputs
    if not len(out.products):
        arrays = (out.logits, out.inner, out.square, out.target, out.weights)
        return SubsetErrors(*(a.numpy() for a in arrays))
    return RoutedSubsetErrors(view.asked, out.routed_on, out.inner, out.products, out.target, out.weights.numpy())


def interleaved(expert: Tensor, num_experts: int) -> Tensor:
    """Order of tokens (T,) in which every stretch holds the same share of each expert's.

    The sample itself is not: of rarely used experts its last tokens are the most.
    """
    order = expert.argsort(stable=True)
    counts = torch.bincount(expert, minlength=num_experts)
    starts = counts.cumsum(0) - counts
    rank = torch.empty(len(expert), dtype=torch.float64)
    rank[order] = (torch.arange(len(expert)) - starts[expert[order]] + 0.5).double()
    return (rank / counts[expert]).argsort(stable=True)


def finite_similarity(view: LayerView, name: str, parameters: Parameters) -> Tensor:
    """Similarity (E, E); `UserError` naming the layer if it is not finite."""
    matrix = similarity(view, base=parameters.similarity, metric=parameters.metric)
    if not matrix.isfinite().all():
        raise UserError(f"the {parameters.similarity} similarity of the experts of {name} is not finite")
    return matrix


def member_weights(scores: Tensor, members: list[int]) -> tuple[float, ...]:
    """Shares of the members' scores in their sum; the same for all where that is 0.

    Args:
        scores: (E,) routed tokens, or other non-negative scores.
    """
    chosen = scores[members].double()
    if chosen.sum() == 0:
        chosen = torch.ones_like(chosen)
    return tuple((chosen / chosen.sum()).tolist())
