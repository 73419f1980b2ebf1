"""Fisher-weighted averaging (arXiv 2111.09832): W* = sum_e F_e W_e / sum_e F_e, entry by entry.

F_e is the diagonal Fisher information of an expert's weights: squared gradients of the log-likelihood, summed
over single tokens taken as independent examples. Squares come before the sum: the square of a summed gradient is
another quantity, and far from it. The gradient carries the gate and the sum carries the traffic, so usage does not
enter a second time.

Shapes: T tokens, F d_ff, D d_model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from msmoe.layer.expert import BIAS, Expert

BLOCK = 512
TINY = 1e-300


def expert_fisher(expert: Expert, inputs: Tensor, gate: Tensor, output_gradient: Tensor, weights: Tensor) -> Expert:
    """Sum the squared per-token gradients of an expert's weights.

    The layer's output is g wo h with h = act(z), z = wi x. With delta the gradient of the log-likelihood with respect
    to it, a token has gradients g delta h^T in wo and dz x^T in wi, where dz = g (wo^T delta) dh/dz, [z > 0] for ReLU.
    Both are outer products: their squares sum up in one matrix product per matrix. Biases have the gradients dz and
    g delta. The gate is taken as a constant.

    Args:
        expert: float32.
        inputs: (T, D) tokens that the layer gives to this expert.
        gate: (T,) what the expert's output is multiplied by.
        output_gradient: (T, D) delta, per token and not averaged over the batch.
        weights: (T,) tokens that each one stands for.

    Returns:
        The Fisher of every weight, float64, in the neuron order of `expert`; zeros without tokens.
    """
    fisher = expert.map(lambda weight: torch.zeros_like(weight, dtype=torch.float64))
    scale = (gate * weights.sqrt()).to(inputs.dtype)
    blocks = (tensor.split(BLOCK) for tensor in (inputs, output_gradient, scale))
    for x_TD, gradient_TD, scale_T in zip(*blocks, strict=True):
        delta_TD = gradient_TD * scale_T[:, None]
        z = expert.pre_activations(x_TD)
        slopes = expert.activation.pull_back(z, delta_TD @ expert.output)
        fisher.output.add_(delta_TD.square().T @ expert.activation.function(*z).square())
        if fisher.output_bias is not None:
            fisher.output_bias.add_(delta_TD.square().sum(0))
        for role, dz_TF in zip(expert.matrices, slopes, strict=True):
            square_TF = dz_TF.square()
            fisher.inputs[role].add_(square_TF.T @ x_TD.square())
            if role + BIAS in fisher.inputs:
                fisher.inputs[role + BIAS].add_(square_TF.sum(0))
    return fisher


def fisher_average(
    members: Sequence[Expert], fishers: Sequence[Expert], weights: Sequence[float], *, floor: float = 1e-6
) -> tuple[Expert, float]:
    """Average aligned experts, each entry by the members' Fisher information.

    A floor pulls every entry to the weighted average: W* = (sum F_e W_e + c sum w_e W_e) / (sum F_e + c), where c is
    `floor` times the mean, over the entries of the weight, of sum F_e. Where no member has any Fisher the result is
    the weighted average; elsewhere `weights` hardly count, and the scale of the Fishers never does.

    Args:
        members: experts in one neuron order.
        fishers: their Fishers, permuted and scaled with them.
        weights: their weights, summing to 1.

    Returns:
        The merged expert, in the members' dtype, and the share of its entries whose summed Fisher is at most c.
    """
    stacks = (zip(*(expert.tensors for expert in experts), strict=True) for experts in (members, fishers))
    averaged = [_average_matrix(*tensors, weights, floor) for tensors in zip(*stacks, strict=True)]
    num_entries = sum(at_floor.numel() for _, at_floor in averaged)
    num_at_floor = sum(int(at_floor.sum()) for _, at_floor in averaged)
    return members[0].like([tensor for tensor, _ in averaged]), num_at_floor / num_entries


def _average_matrix(
    matrices: Sequence[Tensor], fishers: Sequence[Tensor], weights: Sequence[float], floor: float
) -> tuple[Tensor, Tensor]:
    """The average of one of the weights, and a mask of its entries at the floor."""
    average = weighted_average(matrices, weights)
    total, moved = torch.zeros_like(average), torch.zeros_like(average)
    for matrix, fisher in zip(matrices, fishers, strict=True):
        total += fisher
        moved.addcmul_(fisher.double(), matrix.double() - average)
    least = floor * total.mean()
    merged = average + moved / (total + least).clamp(min=TINY)
    return merged.to(matrices[0].dtype), total <= least


def weighted_average(matrices: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Sum of w_e W_e, float64."""
    total = torch.zeros_like(matrices[0], dtype=torch.float64)
    for matrix, weight in zip(matrices, weights, strict=True):
        total.add_(matrix, alpha=weight)
    return total
