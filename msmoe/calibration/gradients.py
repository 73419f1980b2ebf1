"""Inner products between the experts' gradients of the loss: what the gradient similarities are made of.

Shapes: E experts.
"""

from typing import Any

import torch
from torch import Tensor

from msmoe.calibration.batches import IGNORE
from msmoe.checkpoint import Checkpoint
from msmoe.families import Family


def gradient_grams(
    family: Family, checkpoint: Checkpoint, model: Any, batches: list[dict[str, Tensor]], *, device: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Inner products between the experts' gradients of the summed loss, per layer.

    Returns:
        layer -> (gram of flat gradients, gram of gradient times weight), both (E, E) float64. An expert without
        gradient has zero rows.
    """
    parameters = dict(model.named_parameters())
    expert_names = {
        part.key
        for layer in family.layers(checkpoint)
        for e in range(layer.num_experts)
        for part in family.memory_parts(checkpoint, layer.name, e)
    }
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in expert_names)
    for batch in batches:
        batch = {name: t.to(device) for name, t in batch.items()}
        num_targets = (batch["labels"] != IGNORE).sum()
        (model(**batch).loss * num_targets).backward()

    grams = {}
    for layer in family.layers(checkpoint):
        gram = torch.zeros(2, layer.num_experts, layer.num_experts, dtype=torch.float64)
        parts = [family.memory_parts(checkpoint, layer.name, e) for e in range(layer.num_experts)]
        for same in zip(*parts, strict=True):  # the matrices add up
            weights = [parameters[part.key] for part in same]
            grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
            gradient = torch.stack([p.place_in(g) for p, g in zip(same, grads, strict=True)]).flatten(1).float()
            values = torch.stack([p.place_in(w.detach()) for p, w in zip(same, weights, strict=True)])
            scaled = gradient * values.flatten(1).float()
            gram += torch.stack([gradient @ gradient.T, scaled @ scaled.T]).cpu().double()
        grams[layer.name] = gram[0], gram[1]
    model.zero_grad(set_to_none=True)
    return grams
