"""Expert similarity: vectors, Gram matrices or pair values of experts -> a symmetric (E, E) matrix in [0, 1].

Sources: M-SMoE (arXiv 2310.01334) and its published code for the bases; expert outputs from HC-SMoE
(arXiv 2410.08589), token by token from Sub-MoE (arXiv 2506.23266), gated from REAM (arXiv 2604.04356). The published
`1/(1 + 0.1 ln d)` is not monotone in the distance; `distance` here is.

Shapes: E experts, T tokens, D d_model, F d_ff, N features.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from msmoe.calibration.stats import LayerStats
from msmoe.errors import UserError
from msmoe.layer.expert import Expert
from msmoe.layer.routing import Router
from msmoe.merge.align import match_weights, standardise
from msmoe.planning.outputs import LayerOutputs, layer_outputs

Metric = Literal["cosine", "distance", "euclidean"]
TINY = 1e-30


@dataclass(frozen=True)
class LayerView:
    """What a similarity basis may look at.

    Attributes:
        stats: sums of the layer.
        router: of the layer; None where it cannot be asked about tokens alone.
        expert: loads one expert, float32.
        seed: for the `random` basis.
        cache: what was computed already; shared by views of one layer that differ in their seed.
    """

    stats: LayerStats
    router: Router | None
    expert: Callable[[int], Expert]
    seed: int = 0
    cache: dict[Any, Any] = field(default_factory=dict)

    @property
    def num_experts(self) -> int:
        return self.stats.num_experts

    @property
    def asked(self) -> Router:
        """The router, for what cannot do without.

        Raises:
            UserError: where it cannot be asked about tokens alone.
        """
        if self.router is None:
            raise UserError("the router of the layer cannot be asked about tokens alone")
        return self.router

    @property
    def outputs(self) -> LayerOutputs:
        """What all experts make of the same tokens."""
        if "outputs" not in self.cache:
            self.cache["outputs"] = layer_outputs(self.stats, self.asked, self.expert)
        return self.cache["outputs"]

    def experts(self) -> Iterator[Expert]:
        return (self.expert(e) for e in range(self.num_experts))


def gram_similarity(gram: Tensor, *, metric: Metric = "cosine") -> Tensor:
    """Similarity from inner products.

    `cosine` is (1 + cos) / 2. `distance` is 1 / (1 + d) with d = |x - y|^2 / ((|x|^2 + |y|^2) / 2), scale free.
    For both, a zero vector is similar to nothing but itself. `euclidean` is 1 - |x - y| / (largest distance of a
    pair), so that clustering 1 - similarity is clustering the distances themselves.

    Args:
        gram: (E, E) inner products.

    Returns:
        (E, E) float64, symmetric, diagonal 1.
    """
    gram = gram.double()
    square = gram.diagonal().clamp(min=0)
    if metric == "euclidean":
        distance = (square[:, None] + square[None, :] - 2 * gram).clamp(min=0).sqrt().fill_diagonal_(0.0)
        return finish(1 - distance / distance.max().clamp(min=TINY))
    if metric == "cosine":
        norm = square.sqrt()
        similarity = (1 + gram / (norm[:, None] * norm[None, :]).clamp(min=TINY)) / 2
    else:
        mean_square = (square[:, None] + square[None, :]) / 2
        similarity = 1 / (1 + (2 * mean_square - 2 * gram).clamp(min=0) / mean_square.clamp(min=TINY))
    dead = square <= 0  # exactly 0 means undefined; opposite vectors stay just above it
    return finish(similarity.clamp(min=TINY).masked_fill(dead[:, None] | dead[None, :], 0.0))


def finish(similarity: Tensor) -> Tensor:
    """Make a similarity exactly symmetric, within [0, 1], with diagonal 1."""
    similarity = ((similarity + similarity.T) / 2).clamp(0, 1)
    return similarity.fill_diagonal_(1.0)


def vector_similarity(vectors: Tensor, *, metric: Metric = "cosine") -> Tensor:
    """Similarity (E, E) of feature vectors (E, N)."""
    vectors = vectors.double()
    return gram_similarity(vectors @ vectors.T, metric=metric)


def streamed_gram(features: Iterable[Tensor], num_experts: int) -> Tensor:
    """Gram matrix (E, E) float64 of flat features, all held once in float32."""
    stacked = torch.empty(0, 0)
    for e, matrix in enumerate(features):
        if e == 0:
            stacked = torch.empty(num_experts, matrix.numel())
        stacked[e] = matrix.flatten()
    gram = torch.zeros(num_experts, num_experts, dtype=torch.float64)
    for block in stacked.split(1 << 20, dim=1):
        gram += (block @ block.T).double()
    return gram


def router_logits(view: LayerView, metric: Metric) -> Tensor:
    return gram_similarity(view.stats.router_logits_gram, metric=metric)


def router_weight(view: LayerView, metric: Metric) -> Tensor:
    return vector_similarity(view.asked.rows, metric=metric)


def weight(view: LayerView, metric: Metric) -> Tensor:
    """Inner products of whole experts, each pair with its neurons matched: a permuted copy is the same expert.

    The matched inner product is the objective of the assignment; E (E - 1) / 2 assignments.
    """
    experts = list(view.experts())
    gram = torch.zeros(len(experts), len(experts), dtype=torch.float64)
    for i, expert in enumerate(experts):
        gram[i, i] = sum(w.double().square().sum() for w in expert.features)
        for j in range(i):
            gram[i, j] = gram[j, i] = match_weights(experts[j], expert).after
    return gram_similarity(gram, metric=metric)


def feature(view: LayerView, metric: Metric) -> Tensor:
    return vector_similarity(per_token(view.stats.input_sum, view.stats), metric=metric)


def feature_abs(view: LayerView, metric: Metric) -> Tensor:
    return vector_similarity(per_token(view.stats.input_abs_sum, view.stats), metric=metric)


def weight_feature(view: LayerView, metric: Metric) -> Tensor:
    """The input matrices scaled by the norm of each input column over the expert's tokens (the Wanda product)."""
    norms = view.stats.input_square_sum.sqrt().float()
    scaled = (expert.front * norm for expert, norm in zip(view.experts(), norms, strict=True))
    return gram_similarity(streamed_gram(scaled, view.num_experts), metric=metric)


def router_weight_feature(view: LayerView, metric: Metric) -> Tensor:
    return vector_similarity(view.asked.rows.double() * view.stats.input_square_sum.sum(0).sqrt(), metric=metric)


def gradient(view: LayerView, metric: Metric) -> Tensor:
    return gram_similarity(gradient_gram(view.stats.gradient_gram), metric=metric)


def weight_gradient(view: LayerView, metric: Metric) -> Tensor:
    return gram_similarity(gradient_gram(view.stats.weight_gradient_gram), metric=metric)


def expert_output(view: LayerView, metric: Metric) -> Tensor:
    """Mean output of every expert over the same sampled tokens (HC-SMoE)."""
    return vector_similarity(view.outputs.mean, metric=metric)


def expert_output_token(view: LayerView, metric: Metric) -> Tensor:
    """Cosine of two experts' outputs at the same token, averaged over tokens (Sub-MoE)."""
    return finish((1 + view.outputs.token_cosine) / 2)


def ream(view: LayerView, metric: Metric) -> Tensor:
    """Mean of the similarity of gate-weighted mean outputs and that of the router's logits (REAM).

    The latter by the distance of the experts' logits, each of unit norm over the tokens, relative to the largest.
    """
    outputs = vector_similarity(view.outputs.gated_mean, metric=metric)
    gram = view.stats.router_logits_gram
    norm = gram.diagonal().clamp(min=TINY).sqrt()
    return finish((outputs + gram_similarity(gram / (norm[:, None] * norm), metric="euclidean")) / 2)


def input_weight(view: LayerView, metric: Metric) -> Tensor:
    """Inner products of the input matrices as they are, neurons not matched (MergeMoE)."""
    return gram_similarity(streamed_gram((e.front for e in view.experts()), view.num_experts), metric=metric)


def mse(view: LayerView, metric: Metric) -> Tensor:
    """Average a pair, compare it with each of the two on its own tokens: 1 / (1 + mean relative error).

    Pairwise by nature: E (E - 1) / 2 forward passes over two experts' tokens.
    """
    sample, num_experts = view.stats.tokens(), view.num_experts
    experts = list(view.experts())
    inputs = [sample.inputs[sample.of(e)[0]] for e in range(num_experts)]
    outputs = [expert(x) for expert, x in zip(experts, inputs, strict=True)]
    similarity = torch.zeros(num_experts, num_experts, dtype=torch.float64)
    for i in range(num_experts):
        for j in range(i):
            pairs = zip(experts[i].tensors, experts[j].tensors, strict=True)
            average = experts[i].like([(a + b) / 2 for a, b in pairs])
            errors = [relative_error(average(inputs[e]), outputs[e]) for e in (i, j) if len(inputs[e])]
            similarity[i, j] = similarity[j, i] = 1 / (1 + sum(errors) / 2) if len(errors) == 2 else 0.0
    return finish(similarity)


def feature_correlation_lsa(view: LayerView, metric: Metric) -> Tensor:
    """Mean hidden-unit correlation of a pair under the best one-to-one match of neurons."""

    def value(correlation: Tensor) -> float:
        rows, columns = linear_sum_assignment(correlation.numpy(), maximize=True)
        return float((correlation.numpy()[rows, columns].mean() + 1) / 2)

    return hidden_correlation(view, value)


def feature_correlation_max(view: LayerView, metric: Metric) -> Tensor:
    """Mean hidden-unit correlation of a pair, each neuron with its best partner, both ways."""

    def value(correlation: Tensor) -> float:
        return float((correlation.amax(0).mean() + correlation.amax(1).mean()) / 4 + 0.5)

    return hidden_correlation(view, value)


def hidden_correlation(view: LayerView, value: Callable[[Tensor], float]) -> Tensor:
    """Apply `value` to the correlation (F, F) of each pair's hidden units over the token sample."""
    sample, num_experts = view.stats.tokens(), view.num_experts
    hidden = [standardise(expert.hidden(sample.inputs)) for expert in view.experts()]
    similarity = torch.zeros(num_experts, num_experts, dtype=torch.float64)
    for i in range(num_experts):
        for j in range(i):
            similarity[i, j] = similarity[j, i] = value(hidden[i].T @ hidden[j])
    return finish(similarity)


def random(view: LayerView, metric: Metric) -> Tensor:
    rng = np.random.default_rng([view.seed, *view.stats.input_sum.shape])
    return finish(torch.from_numpy(np.tril(rng.random((view.num_experts,) * 2)) * 2))


BASES: dict[str, Callable[[LayerView, Metric], Tensor]] = {
    "router-logits": router_logits,
    "router-weight": router_weight,
    "weight": weight,
    "feature": feature,
    "feature.abs": feature_abs,
    "weight-feature": weight_feature,
    "router-weight-feature": router_weight_feature,
    "gradient": gradient,
    "weight-gradient": weight_gradient,
    "mse": mse,
    "feature-correlation.lsa": feature_correlation_lsa,
    "feature-correlation.max": feature_correlation_max,
    "expert-output": expert_output,
    "expert-output-token": expert_output_token,
    "ream": ream,
    "input-weight": input_weight,
    "random": random,
}


def similarity(view: LayerView, *, base: str = "router-logits", metric: Metric = "cosine") -> Tensor:
    """Similarity (E, E) of a layer's experts, float64, symmetric, diagonal 1, in [0, 1].

    Experts whose vector is zero under the base (they saw no token) are compared by their router rows, where there are
    any.

    Args:
        base: a key of `BASES`.
        metric: `cosine`, `distance` or `euclidean`; the pair-valued bases (mse, feature-correlation,
            expert-output-token, random) have their own.

    Raises:
        UserError: if the base needs statistics that were not recorded.
    """
    if (base, metric) in view.cache:
        return view.cache[base, metric]
    result = BASES[base](view, metric)
    undefined = (result - torch.eye(len(result))).abs().sum(1) == 0
    if undefined.any() and len(result) > 1 and base != "router-weight" and view.router is not None:
        fallback = router_weight(view, metric)
        either = undefined[:, None] | undefined[None, :]
        result = torch.where(either, fallback, result)
    if base != "random":
        view.cache[base, metric] = result
    return result


def per_token(sums: Tensor, stats: LayerStats) -> Tensor:
    return sums / stats.routed.clamp(min=1).double()[:, None]


def gradient_gram(gram: Tensor | None) -> Tensor:
    if gram is None:
        raise UserError("the statistics hold no gradients: profile with --gradients to use this similarity")
    return gram


def relative_error(output: Tensor, target: Tensor) -> float:
    """|output - target|^2 / |target|^2."""
    return float((output - target).double().square().sum() / target.double().square().sum().clamp(min=TINY))
