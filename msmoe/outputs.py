"""What every expert of a layer makes of a capped sample of its tokens: computed once, read by many methods.

Shapes: E experts, T tokens, D d_model.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from msmoe.calibration.stats import LayerStats
from msmoe.families import Expert

MAX_TOKENS = 1024  # all experts run on these: E times the arithmetic of a routed token
MAX_VALUES = 2**27  # of all outputs at once, 512 MB


@dataclass(frozen=True)
class LayerOutputs:
    """Outputs of all experts on the same tokens, summarised.

    Attributes:
        mean: (E, D) float64 mean output; gated_mean: (E, D) mean of softmax probability times output.
        token_cosine: (E, E) float64 mean over tokens of the cosine between two experts' outputs.
        logits: (T, E) float64 router logits; inner: (T, E) <y, f_e> with the layer's output y; square: (T, E) |f_e|^2;
            target: (T,) |y|^2.
        weights: (T,) float64 calibration tokens that each one stands for.
    """

    mean: Tensor
    gated_mean: Tensor
    token_cosine: Tensor
    logits: Tensor
    inner: Tensor
    square: Tensor
    target: Tensor
    weights: Tensor


def layer_outputs(
    stats: LayerStats, router: Callable[[Tensor], Tensor], expert: Callable[[int], Expert]
) -> LayerOutputs:
    """Run every expert on at most `MAX_TOKENS` sampled tokens, fewer where their outputs would not fit.

    Args:
        router: logits (T, E) of tokens (T, D); expert: loads one expert, float32.
    """
    num_experts, sample = stats.num_experts, stats.tokens()
    d_model = sample.inputs.shape[1]
    sample = sample.drawn(max(1, min(MAX_TOKENS, MAX_VALUES // (num_experts * d_model))), num_experts)
    weights = sample.weights(stats.dispatched)
    share = (weights / weights.sum().clamp(min=1e-30)).float()
    logits = router(sample.inputs).double()
    probability = logits.softmax(-1).float()
    outputs_TED = torch.empty(len(sample), num_experts, d_model)
    for e in range(num_experts):
        outputs_TED[:, e] = expert(e)(sample.inputs)
    chosen = outputs_TED[torch.arange(len(sample)), sample.expert] * sample.gate[:, None]
    inner = torch.einsum("ted,td->te", outputs_TED, chosen).double()
    square = outputs_TED.square().sum(-1).double()
    mean = torch.einsum("t,ted->ed", share, outputs_TED).double()
    gated_mean = torch.einsum("te,ted->ed", share[:, None] * probability, outputs_TED).double()
    outputs_TED /= square.sqrt().clamp(min=1e-30)[..., None]
    token_cosine = torch.zeros(num_experts, num_experts, dtype=torch.float64)
    for block, part in zip(outputs_TED.split(64), share.split(64), strict=True):
        token_cosine += (part[:, None, None] * (block @ block.mT)).sum(0)
    return LayerOutputs(
        mean, gated_mean, token_cosine, logits, inner, square, chosen.double().square().sum(-1), weights
    )
