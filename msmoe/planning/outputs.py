"""What every expert of a layer makes of a capped sample of its tokens: computed once, read by many methods.

Shapes: E experts, T tokens, D d_model.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from msmoe.calibration.stats import LayerStats
from msmoe.layer.expert import Expert
from msmoe.layer.routing import Router

MAX_TOKENS = 1024  # all experts run on these: E times the arithmetic of a routed token
MAX_VALUES = 2**27  # of all outputs at once, 512 MB
TOKENS_AT_ONCE = 64  # whose inner products are summed in float32


@dataclass(frozen=True)
class LayerOutputs:
    """Outputs of all experts on the same tokens, summarised.

    Attributes:
        mean: (E, D) float64 mean output; gated_mean: (E, D) mean of softmax probability times output; with several
            experts per token, of the router's weight times output.
        token_cosine: (E, E) float64 mean over tokens of the cosine between two experts' outputs.
        logits: (T, E) float64 router logits; inner: (T, E) <y, f_e> with the layer's output y; square: (T, E) |f_e|^2;
            target: (T,) |y|^2.
        weights: (T,) float64 calibration tokens that each one stands for.
        routed_on: (T, D') what the router saw.
        products: (T, E, E) <f_e, f_e'>, of layers that give a token several experts; (0, E, E) of others.
    """

    mean: Tensor
    gated_mean: Tensor
    token_cosine: Tensor
    logits: Tensor
    inner: Tensor
    square: Tensor
    target: Tensor
    weights: Tensor
    routed_on: Tensor
    products: Tensor


def layer_outputs(stats: LayerStats, router: Router, expert: Callable[[int], Expert]) -> LayerOutputs:
    """Run every expert on at most `MAX_TOKENS` sampled tokens, fewer where their outputs would not fit.

    Args:
        expert: loads one expert, float32.
    """
    num_experts, sample = stats.num_experts, stats.tokens()
    d_model = sample.inputs.shape[1]
    sample = sample.drawn(max(1, min(MAX_TOKENS, MAX_VALUES // (num_experts * d_model))), num_experts)
    weights = sample.weights(stats.dispatched)
    share = (weights / weights.sum().clamp(min=1e-30)).float()
    logits = router.logits(sample.routed_on).double()
    probability_TE = logits.softmax(-1).float()
    if sample.top_k > 1:
        probability_TE = torch.zeros_like(probability_TE).scatter_(1, *router(sample.routed_on))
    outputs_ETD = torch.empty(num_experts, len(sample), d_model)
    means = torch.empty(num_experts, 2, d_model, dtype=torch.float64)
    for e in range(num_experts):
        outputs_ETD[e] = expert(e)(sample.inputs)
        means[e] = torch.stack([share, share * probability_TE[:, e]]) @ outputs_ETD[e]
    tokens = torch.arange(len(sample))
    chosen_TD = outputs_ETD[sample.expert[:, 0], tokens] * sample.gate[:, :1]
    for k in range(1, sample.top_k):
        chosen_TD += outputs_ETD[sample.expert[:, k], tokens] * sample.gate[:, k, None]
    inner_TE = torch.stack([(output_TD * chosen_TD).sum(-1) for output_TD in outputs_ETD], dim=1).double()
    square_TE = torch.stack([output_TD.square().sum(-1) for output_TD in outputs_ETD], dim=1).double()
    products = torch.empty(0, num_experts, num_experts)
    if sample.top_k > 1:
        products = torch.einsum("etd,ftd->tef", outputs_ETD, outputs_ETD)
    outputs_ETD *= (share.sqrt() / square_TE.T.sqrt().clamp(min=1e-30)).float()[..., None]
    token_cosine = torch.zeros(num_experts, num_experts, dtype=torch.float64)
    for block_ETD in outputs_ETD.split(TOKENS_AT_ONCE, dim=1):
        flat = block_ETD.flatten(1)
        token_cosine += flat @ flat.T
    return LayerOutputs(
        means[:, 0], means[:, 1], token_cosine, logits, inner_TE, square_TE, chosen_TD.double().square().sum(-1),
        weights, sample.routed_on, products,
    )  # fmt: skip
