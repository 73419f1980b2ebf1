"""What a refit solves for: where the compressed layer sends the sampled tokens, and what the original made of them.

Shapes: E experts, G groups, S sampled tokens, T tokens, D d_model.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from threading import Lock

import torch
from torch import Tensor

from msmoe.checkpoint import to_dtype
from msmoe.compression.group import GroupReport, Sources, dense_gate, merge_one
from msmoe.errors import UserError
from msmoe.formats.layout import Layout
from msmoe.layer.expert import Expert
from msmoe.layer.routing import Routing
from msmoe.layer.tokens import TokenSample
from msmoe.merge.layer_refit import LayerRefit, LayerTokens
from msmoe.planning.plan import LayerPlan
from msmoe.planning.scores import mean_output
from msmoe.workers import in_order, single_threaded


class RefitTokens:
    """Tokens of the layers of a plan; those of a layer are computed once, whichever thread asks first.

    They are kept until every group of the layer has asked.

    Args:
        routers: layer -> rows (G, D) of its reduced router.
    """

    def __init__(self, sources: Sources, layout: Layout, routers: Mapping[str, Tensor]):
        self.sources, self.layout, self.routers = sources, layout, routers
        self.left = Counter(layer for layer, _ in layout.merged)
        self.locks = {layer: Lock() for layer in self.left}
        self.found: dict[str, LayerTokens] = {}

    def whole(self, layer: str) -> LayerTokens:
        """Tokens of a layer, not kept."""
        routing = planned_routing(self.sources, self.layout, layer, self.routers.get(layer))
        return layer_tokens(self.sources, self.layout, layer, routing)

    def __call__(self, layer: str) -> LayerTokens:
        with self.locks[layer]:
            if layer not in self.found:
                self.found[layer] = self.whole(layer)
            self.left[layer] -= 1
            return self.found[layer] if self.left[layer] > 0 else self.found.pop(layer)


def planned_routing(sources: Sources, layout: Layout, layer: str, reduced: Tensor | None) -> Routing:
    """Where the router of an exported layer sends the sampled tokens: to which stored group or constant.

    As recorded, free of rounding, where the router keeps its rows.

    Args:
        reduced: (G, D) rows of a reduced router, in stored order.
    """
    assert sources.stats is not None
    stats, plan = sources.stats.layers[layer], sources.plan.layers[layer]
    sample = stats.tokens()
    if layout.kind == "dense":
        gate = dense_gate(stats, sources, layer)
        return Routing(torch.zeros(len(sample), 1, dtype=torch.int64), torch.full((len(sample), 1), gate))
    routes = plan.routes(sources.plan.parameters)
    targets = torch.tensor(routes.targets)
    is_narrowed = layout.kind == "native" and len(plan.groups) < len(routes.rows)
    if len(routes.rows) == plan.num_experts and not is_narrowed:
        return Routing(targets[sample.expert], sample.gate)
    router = sources.family.router(sources.checkpoint, layer)
    if router is None:
        raise UserError(f"a refit cannot know where the smaller router of {layer} sends tokens: choose --refit none")
    if is_narrowed:
        narrow = router.keeping([plan.groups[g].dominant for g in plan.stored_order])
        return (narrow if reduced is None else narrow.with_rows(reduced))(sample.routed_on)
    routing = router.keeping(routes.rows)(sample.routed_on)
    return Routing(targets[routing.experts], routing.weights)


def stored_rows(layout: Layout, layer: str, rows: Tensor) -> Tensor:
    """Rows (G, D) of a reduced router as they will be read again, float32."""
    spec = next(spec for spec in layout.tensors if spec.name == layout.routers[layer])
    return rows.to(to_dtype(spec.dtype)).float()


def layer_tokens(
    sources: Sources, layout: Layout, layer: str, routing: Routing, *, inputs: Tensor | None = None
) -> LayerTokens:
    """The sampled tokens of a layer under a routing, with the outputs of the original layer as targets.

    Args:
        routing: of all sampled tokens, (S, K).
        inputs: (S, D) what the compressed layer sees, by default the sample's.
    """
    assert sources.stats is not None
    stats, plan = sources.stats.layers[layer], sources.plan.layers[layer]
    sample = stats.tokens()
    computed = torch.tensor([plan.stored_order.index(g) for name, g in layout.merged if name == layer])
    needed = torch.isin(routing.experts, computed).any(1)
    targets = original_outputs(sources, layer, sample, needed)
    seen = sample.inputs if inputs is None else inputs
    return LayerTokens(seen, routing, targets, sample.weights(stats.dispatched), sample.held_out)


def original_outputs(sources: Sources, layer: str, sample: TokenSample, needed: Tensor) -> Tensor:
    """Gate-weighted outputs (S, D) of the original layer, for every expert that a needed token (S,) is routed to.

    One expert in memory at a time; zero for tokens of other experts.
    """
    outputs = torch.zeros_like(sample.inputs)
    for e in sample.expert[needed].unique().tolist():
        rows, gate = sample.of(e)
        expert = sources.family.load_expert(sources.checkpoint, layer, e)
        outputs.index_add_(0, rows, expert(sample.inputs[rows]) * gate[:, None])
    return outputs


def refit_layers(
    sources: Sources, layout: Layout, pending: Sequence[tuple[str, int]], tokens: RefitTokens, *, workers: int
) -> Iterator[tuple[Expert, GroupReport]]:
    """Merge the groups of each layer, several at a time, and refit them together: tokens meet several of them.

    Holds the merged experts of one layer.

    Args:
        pending: (layer, group), the groups of a layer in a row; all of its groups that are computed.
    """
    for layer, keys in groupby(pending, key=lambda key: key[0]):
        plan, found = sources.plan.layers[layer], tokens.whole(layer)
        places = {plan.stored_order.index(g): (layer, g) for _, g in keys}
        merged = in_order(lambda key: merge_one(sources, layout, *key), list(places.values()), workers)
        experts = dict(zip(places, merged, strict=True))
        load = partial(stored_expert, sources, plan, {index: expert for index, (expert, _) in experts.items()}, layer)
        constants = constants_of(sources, layer)
        with single_threaded():
            refit = LayerRefit(load, len(plan.groups), found, constants=constants, changing=list(places))
            solved = dict(refit.groups())
        order = {key: index for index, key in places.items()}
        for key in places.values():
            (expert, report), result = experts[order[key]], solved[order[key]]
            yield expert.with_output(result.output), replace(report, refit=result)


def stored_expert(sources: Sources, plan: LayerPlan, computed: Mapping[int, Expert], layer: str, index: int) -> Expert:
    """A stored expert of a layer before its refit: computed, or the sole member of its group."""
    if index in computed:
        return computed[index]
    sole = plan.groups[plan.stored_order[index]].sole
    assert sole is not None
    return sources.family.load_expert(sources.checkpoint, layer, sole)


def constants_of(sources: Sources, layer: str) -> Tensor | None:
    """Mean outputs (C, D) in the place of experts."""
    assert sources.stats is not None
    constants = sources.plan.layers[layer].routes(sources.plan.parameters).constants
    return mean_output(sources.stats.layers[layer])[list(constants)].float() if constants else None
