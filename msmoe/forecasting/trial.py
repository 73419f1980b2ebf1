"""One layer, compressed in memory to one size after the other, and measured on held-out tokens.

Shapes: E experts, S sampled tokens, T tokens, D d_model.
"""

from dataclasses import replace

import torch
from torch import Tensor

from msmoe.calibration.stats import LayerStats
from msmoe.checkpoint import to_dtype
from msmoe.compression.group import Sources, merge_one, routed_inputs
from msmoe.compression.layer_errors import read_layer, relative_errors
from msmoe.families import MoELayer
from msmoe.formats.layout import Layout
from msmoe.layer.expert import Expert
from msmoe.layer.layer import Layer
from msmoe.layer.tokens import TokenSample
from msmoe.merge import LayerTokens, merge_group
from msmoe.merge.align import Alignment, Match, match
from msmoe.merge.layer_refit import LayerRefit
from msmoe.planning.plan import Plan
from msmoe.planning.planner import Planner
from msmoe.planning.scores import mean_output


def token_divergence(
    gradient: Tensor, change: Tensor, weights: Tensor, *, num_tokens: float, num_targets: int
) -> float:
    """Predict the KL divergence of the changed model from the original, nats per target token.

    For one record, to second order in the changes d_t of the layer's output, KL(p || p') = 1/2 E (sum_t g_t . d_t)^2
    with g_t the gradient of the record's summed log-likelihood at token t and labels drawn from p: such gradients are
    0 on average and their covariance is the Fisher information. Here the terms of different tokens are taken as
    uncorrelated, 1/2 sum_t E (g_t . d_t)^2, so that a sample of tokens will do, and one draw of labels stands for the
    expectation. With w_t the tokens that each one stands for, n tokens in all and N target tokens, the prediction is
    n / (N sum_t w_t) sum_t w_t (g_t . d_t)^2 / 2: tokens of experts without any gradient count as the average of the
    others. Beyond the second order, and so not in it, are large changes and tokens that later routers send elsewhere.

    Args:
        gradient, change: (T, D) g and d; weights: (T,) float64.
        num_tokens: n, dispatched tokens of the layer; num_targets: N, target tokens of the same data.

    Returns:
        NaN without tokens.
    """
    if len(gradient) == 0:
        return float("nan")
    squares = (gradient.double() * change.double()).sum(1).square()
    return float(weights @ squares / weights.sum()) / 2 * num_tokens / num_targets


class Observed:
    """Held-out tokens of a layer, and what the original layer makes of them.

    Attributes:
        sample: T tokens; weights: (T,) float64 calibration tokens that each one stands for; wanted: (T, D).
    """

    def __init__(self, layer: Layer, sample: TokenSample, stats: LayerStats):
        self.sample, self.weights = sample, sample.weights(stats.dispatched)
        self.wanted = layer.run(sample.inputs, layer.route(sample, layer))

    def change(self, compressed: Layer, original: Layer) -> Tensor:
        """What compression adds to the output (T, D)."""
        return compressed.run(self.sample.inputs, compressed.route(self.sample, original)) - self.wanted


class Trial:
    """One layer, compressed to one size after the other; what the sizes share is computed once.

    Args:
        planner: of statistics without the held-out records.
        held_out: their tokens; tokens: most of them to use.
        num_targets: target tokens of the calibration data.
    """

    def __init__(self, planner: Planner, layer: MoELayer, held_out: TokenSample, *, tokens: int, num_targets: int):
        self.planner, self.layer, self.num_targets = planner, layer, num_targets
        self.stats = planner.stats.layers[layer.name]
        stored = read_layer(planner.family, planner.source, layer.name, layer.num_experts)
        self.experts = [stored.expert(e) for e in range(layer.num_experts)]
        self.original = replace(stored, expert=self.experts.__getitem__)
        self.matches: dict[tuple[int, int], Match] = {}
        self.given: dict[int, tuple[Tensor, Tensor]] = {}
        fitted, observe = self.stats.tokens(), lambda sample: Observed(self.original, sample, self.stats)
        self.fitted = observe(fitted)
        self.held_out = observe(held_out.drawn(tokens, layer.num_experts))
        known = held_out.select(held_out.has_gradient).drawn(tokens, layer.num_experts)
        self.with_gradient = observe(known) if self.stats.has_output_gradients else None

    def measure(self, plan: Plan) -> tuple[float, float | None]:
        """Output error and KL divergence of the layer under a plan."""
        compressed, seen = self.compressed(plan), self.held_out
        change = seen.change(compressed, self.original)
        error, _ = relative_errors(seen.wanted, change, seen.weights, seen.sample.expert, self.layer.num_experts)
        if self.with_gradient is None:
            return error, None
        return error, token_divergence(
            self.with_gradient.sample.output_gradient,
            self.with_gradient.change(compressed, self.original),
            self.with_gradient.weights,
            num_tokens=float(self.stats.dispatched.sum()),
            num_targets=self.num_targets,
        )

    def compressed(self, plan: Plan) -> Layer:
        """The layer as an `exact` export stores it."""
        layer_plan = plan.layers[self.layer.name]
        routes = layer_plan.routes(plan.parameters)
        front_dtype, output_dtype = (to_dtype(self.layer.dtype(matrix)) for matrix in self.layer.matrices)
        means = (
            mean_output(self.stats)[list(routes.constants)].to(output_dtype)
            if routes.constants
            else self.original.constants
        )
        stored: list[Expert] = []
        layer = Layer(
            router=self.original.router.keeping(routes.rows),
            targets=torch.tensor(routes.targets),
            num_stored=len(layer_plan.groups),
            expert=stored.__getitem__,
            constants=means.float(),
        )
        tokens = self.tokens(layer) if plan.parameters.refit != "none" else None
        is_rerouted = not layer.router.equals(self.original.router)
        merged = [self.merged(plan, g) for g in layer_plan.stored_order]
        if tokens is not None:
            order = layer_plan.stored_order
            changing = [i for i, g in enumerate(order) if is_rerouted or len(layer_plan.groups[g].members) > 1]
            refit = LayerRefit(merged.__getitem__, len(merged), tokens, constants=layer.constants, changing=changing)
            for index, found in list(refit.groups()):
                merged[index] = merged[index].with_output(found.output)
        stored += [rounded(expert, front_dtype, output_dtype) for expert in merged]
        return layer

    def tokens(self, layer: Layer) -> LayerTokens:
        """What a refit solves for: the fitted tokens under the routing of a compressed layer."""
        sample, fitted = self.fitted.sample, self.fitted
        routing = layer.route(sample, self.original)
        return LayerTokens(sample.inputs, routing, fitted.wanted, fitted.weights, sample.held_out)

    def merged(self, plan: Plan, g: int) -> Expert:
        """What a group becomes before refit, float32: as `merge_one`, with alignments shared by all sizes."""
        group, parameters = plan.layers[self.layer.name].groups[g], plan.parameters
        if group.sole is not None:
            return self.experts[group.sole]
        if parameters.rule != "average" or parameters.align_to == "mean" or parameters.canonical:
            sources = Sources(self.planner.family, self.planner.source, plan, self.planner.stats)
            return merge_one(sources, Layout("exact", {}), self.layer.name, g)[0]
        reference = 0 if parameters.align_to == "first" else group.dominant
        load = lambda member: self.aligned(member, reference, parameters.align)
        return merge_group(group.members, group.weights, load, reference=reference, alignment="none").expert

    def aligned(self, member: int, reference: int, alignment: Alignment) -> Expert:
        """A member in the neuron order that matches a reference."""
        if member == reference or alignment == "none":
            return self.experts[member]
        if (member, reference) not in self.matches:
            inputs = routed_inputs(self.stats, (member, reference)) if alignment != "weight" else None
            pair = self.experts[reference], self.experts[member]
            self.matches[member, reference] = match(*pair, alignment=alignment, inputs=inputs)
        return self.experts[member].permuted(self.matches[member, reference].permutation)


def rounded(expert: Expert, inputs: torch.dtype, output: torch.dtype) -> Expert:
    """An expert as it is stored, in float32 again.

    Args:
        inputs, output: dtypes of the input side and of the output side.
    """
    count = len(expert.inputs)
    dtypes = (inputs if i < count else output for i in range(len(expert.tensors)))
    return expert.like([t.to(dtype).float() for t, dtype in zip(expert.tensors, dtypes, strict=True)])
