"""What a refit solves for: where the compressed layer sends the sampled tokens, and what the original made of them.

Shapes: E experts, G groups, S sampled tokens, T tokens, D d_model.
"""

from collections import Counter
from collections.abc import Mapping
from threading import Lock

import torch
from torch import Tensor

from msmoe.checkpoint import to_dtype
from msmoe.compression.group import Sources, dense_gate
from msmoe.formats.layout import Layout
from msmoe.layer.routing import Routing, SoftmaxTop1
from msmoe.layer.tokens import TokenSample
from msmoe.merge.layer_refit import LayerTokens


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

    def __call__(self, layer: str) -> LayerTokens:
        with self.locks[layer]:
            if layer not in self.found:
                routing = planned_routing(self.sources, self.layout, layer, self.routers.get(layer))
                self.found[layer] = layer_tokens(self.sources, self.layout, layer, routing)
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
    if reduced is not None:
        return SoftmaxTop1(reduced)(sample.inputs)
    routes = plan.routes(sources.plan.parameters)
    targets = torch.tensor(routes.targets)
    if len(routes.rows) == plan.num_experts:
        return Routing(targets[sample.expert][:, None], sample.gate[:, None])
    router = sources.family.router(sources.checkpoint, layer).keeping(routes.rows)(sample.inputs)
    return Routing(targets[router.experts], router.weights)


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
        mine = sample.expert == e
        expert = sources.family.load_expert(sources.checkpoint, layer, e)
        outputs[mine] = expert(sample.inputs[mine]) * sample.gate[mine, None]
    return outputs
