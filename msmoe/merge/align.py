"""Neuron alignment: find the order of an expert's hidden neurons that lines it up with a reference, and apply it.

Weight matching is Git Re-Basin's (arXiv 2209.04836, section 3.2), exact here because an expert has one hidden axis;
activation matching correlates hidden units over tokens. Where an activation allows it, neurons can also be scaled to a
canonical form first.

Shapes: M members, T tokens, F d_ff, D d_model.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from msmoe.layer.expert import BIAS, Expert

TINY = 1e-30
Alignment = Literal["weight", "activation", "ream", "none"]
NUM_COMPONENTS = 64  # of the neurons' weights, in REAM's cost


@dataclass(frozen=True)
class Match:
    """Result of matching one expert to a reference.

    Attributes:
        permutation: (F,) int64; `target.permuted(permutation)` lines up with the reference.
        before, after: the objective under the identity and under the permutation; after >= before.
    """

    permutation: Tensor
    before: float
    after: float

    @property
    def share_moved(self) -> float:
        return float((self.permutation != torch.arange(len(self.permutation))).double().mean())


def match_cost(cost: Tensor) -> Match:
    """Maximise the summed cost of a one-to-one match of rows with columns.

    If the best columns of all rows differ, they are the optimum and no assignment is solved: so it is for experts
    that differ by a permutation and some noise.

    Args:
        cost: (F, F) float32 or float64.
    """
    best = cost.argmax(1)
    if len(best.unique()) < len(best):
        _, columns = linear_sum_assignment(cost.numpy(), maximize=True)
        best = torch.from_numpy(columns)
    before = float(cost.diagonal().double().sum())
    after = float(cost.gather(1, best[:, None]).double().sum())
    if after <= before:  # equally good: do not move
        return Match(torch.arange(len(cost)), before, before)
    return Match(best, before, after)


def weight_cost(reference: Expert, target: Expert) -> Tensor:
    """Inner products (F, F) between neurons, over all that belongs to them: wi_ref wi^T + wo_ref^T wo."""
    (first, other), *rest = zip(reference.features, target.features, strict=True)
    cost = first @ other.T
    for one, another in rest:
        cost.addmm_(one, another.T)
    return cost


def match_weights(reference: Expert, target: Expert) -> Match:
    """Find the neuron order of `target` that lines it up best with `reference`.

    Maximises <W_ref, P W_tgt> over permutations P of the hidden axis, over all matrices.

    Raises:
        ValueError: if the two experts differ in form or shape.
    """
    shapes = [{role: tuple(tensor.shape) for role, tensor in expert.weights.items()} for expert in (reference, target)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"experts differ in shape: {shapes[0]} and {shapes[1]}")
    return match_cost(weight_cost(reference, target))


def match_activations(reference: Expert, target: Expert, inputs: Tensor) -> Match:
    """Match hidden units by their correlation over tokens (arXiv 2305.03053).

    Units that are constant on the tokens are matched among the leftovers by weights. With fewer than two tokens
    nothing is moved.

    Args:
        inputs: (T, D) tokens routed to either expert.
    """
    if len(inputs) < 2:
        return Match(torch.arange(reference.num_neurons), 0.0, 0.0)
    hidden = standardise(reference.hidden(inputs)), standardise(target.hidden(inputs))
    correlation = hidden[0].T @ hidden[1]
    match = match_cost(correlation)
    constant_ref, constant_tgt = (h.abs().amax(0) == 0 for h in hidden)
    rows = torch.nonzero(constant_ref | constant_tgt[match.permutation]).flatten()
    if len(rows) < 2:
        return match
    columns = match.permutation[rows]
    left = match_cost(weight_cost(reference, target)[rows][:, columns]).permutation
    permutation = match.permutation.clone()
    permutation[rows] = columns[left]
    after = float(correlation.gather(1, permutation[:, None]).double().sum())
    return Match(permutation, match.before, after) if after >= match.after - 1e-6 * abs(match.after) else match


def match_ream(reference: Expert, target: Expert, inputs: Tensor) -> Match:
    """Match neurons by the sum of two distances (REAM, arXiv 2604.04356): of activations and of weights.

    Activations over the tokens, and the leading principal components of the weights, both of unit norm per neuron.
    Without tokens the weights decide alone. The components are those of the pair; the authors take a layer's.

    Args:
        inputs: (T, D) tokens routed to either expert.
    """
    weights = [expert.neurons for expert in (reference, target)]
    weights = torch.cat([w / w.norm(dim=1, keepdim=True).clamp(min=TINY) for w in weights])
    centred = weights - weights.mean(0)
    _, vectors = torch.linalg.eigh((centred.T @ centred).double())
    components = centred @ vectors[:, -NUM_COMPONENTS:].float()
    components = components / components.norm(dim=1, keepdim=True).clamp(min=TINY)
    num_neurons = reference.num_neurons
    distance = torch.cdist(components[:num_neurons], components[num_neurons:])
    if len(inputs):
        hidden = [expert.hidden(inputs) for expert in (reference, target)]
        first, second = ((h / h.norm(dim=0).clamp(min=TINY)).T.contiguous() for h in hidden)
        distance += torch.cdist(first, second)
    return match_cost(-distance)


def canonical_scale(expert: Expert) -> Expert:
    """Scale every neuron so that its row of an input matrix and its output column have equal norm.

    relu(c z) = c relu(z) for c > 0, so wi_j c and wo_j / c give the same output; likewise for the matrix that the
    activation of other experts is homogeneous in, whose bias is scaled with it. Where it is linear, c has the sign that
    makes the largest entry of the row positive. The function does not change. A neuron with a zero side is left.

    Raises:
        ValueError: if the activation is homogeneous in no matrix.
    """
    role = expert.activation.scales
    if not role:
        raise ValueError(f"neurons with the activation {expert.activation.name} have no scale to make canonical")
    norm_in, norm_out = expert.inputs[role].norm(dim=1), expert.output.norm(dim=0)
    scale = torch.where((norm_in > 0) & (norm_out > 0), (norm_out / norm_in.clamp(min=1e-30)).sqrt(), 1.0)
    scale = torch.where(scale > 0, scale, 1.0)
    if expert.activation.is_linear:
        largest = expert.inputs[role].gather(1, expert.inputs[role].abs().argmax(1, keepdim=True))[:, 0]
        scale = torch.where(largest < 0, -scale, scale)
    scaled = {name: expert.inputs[name] for name in (role, role + BIAS) if name in expert.inputs}
    scaled = {name: tensor * (scale[:, None] if tensor.ndim == 2 else scale) for name, tensor in scaled.items()}
    return replace(expert, inputs={**expert.inputs, **scaled}, output=expert.output / scale)


def match(reference: Expert, target: Expert, *, alignment: Alignment, inputs: Tensor | None = None) -> Match:
    """Match by the named alignment; `none` is the identity."""
    if alignment == "weight":
        return match_weights(reference, target)
    if alignment in ("activation", "ream"):
        assert inputs is not None
        return (match_activations if alignment == "activation" else match_ream)(reference, target, inputs)
    return Match(torch.arange(reference.num_neurons), 0.0, 0.0)


def standardise(hidden: Tensor) -> Tensor:
    """Columns of (T, F) centred and scaled to unit norm; a constant column becomes zero."""
    centred = hidden - hidden.mean(0)
    norm = centred.norm(dim=0)
    constant = norm <= 1e-6 * hidden.norm(dim=0).clamp(min=TINY)
    return (centred / norm.clamp(min=TINY)).masked_fill(constant, 0.0)
