"""The table of merge rules: aligned members, their weights and the tokens of their group -> one expert.

Shapes: T tokens, F d_ff, D d_model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from msmoe.families import Expert
from msmoe.merge.fisher import expert_fisher, fisher_average, weighted_average
from msmoe.merge.least_squares import least_squares_output
from msmoe.merge.repair import repair
from msmoe.merge.union_svd import union_svd
from msmoe.merge.zipit import zip_experts


@dataclass(frozen=True)
class GroupTokens:
    """What a rule may see of the calibration data.

    Attributes:
        inputs: (T, D) sampled tokens routed to a member; expert: (T,) position of that member in the group;
            gate: (T,); weights: (T,) tokens that each stands for.
        output_gradient: (T, D) gradient at the layer's output; known: (T,) bool, where it was recorded.
        layer_inputs: (N, D) tokens of the whole layer; layer_weights: (N,).
    """

    inputs: Tensor
    expert: Tensor
    gate: Tensor
    weights: Tensor
    output_gradient: Tensor
    known: Tensor
    layer_inputs: Tensor
    layer_weights: Tensor


LEAST_SQUARES_RIDGE = 0.1  # with about as many tokens as neurons an unregularised solution is worse than the average

Apply = Callable[[Sequence[Expert], Sequence[float], GroupTokens], tuple[Expert, dict]]


@dataclass(frozen=True)
class MergeRule:
    """One row of the table: the rule itself, and what it reads of the calibration data."""

    apply: Apply
    needs_tokens: bool = True
    needs_gradients: bool = False


def average(members: Sequence[Expert], weights: Sequence[float], tokens: GroupTokens) -> tuple[Expert, dict]:
    """Weighted average; `merge_group` computes the same without holding the members."""
    return mean_expert(members, weights), {}


def fisher(members: Sequence[Expert], weights: Sequence[float], tokens: GroupTokens) -> tuple[Expert, dict]:
    """Average by Fisher information; a member none of whose tokens has a gradient drops out."""
    informations = []
    for i, member in enumerate(members):
        mine = (tokens.expert == i) & tokens.known
        scale = float(tokens.weights[tokens.expert == i].sum() / tokens.weights[mine].sum()) if mine.any() else 1.0
        seen = tokens.inputs[mine], tokens.gate[mine], tokens.output_gradient[mine], tokens.weights[mine] * scale
        informations.append(expert_fisher(member, *seen))
    merged, at_floor = fisher_average(members, informations, weights)
    return merged, {"share_at_floor": at_floor}


def zipit(members: Sequence[Expert], weights: Sequence[float], tokens: GroupTokens) -> tuple[Expert, dict]:
    merged, zipped = zip_experts(members, weights, tokens.inputs, tokens.weights)
    return merged, vars(zipped)


def repaired(members: Sequence[Expert], weights: Sequence[float], tokens: GroupTokens) -> tuple[Expert, dict]:
    """Average, then the spread of the hidden units restored."""
    merged, done = repair(mean_expert(members, weights), members, weights, tokens.inputs, tokens.weights)
    return merged, vars(done)


def least_squares(members: Sequence[Expert], weights: Sequence[float], tokens: GroupTokens) -> tuple[Expert, dict]:
    """Average of wi, wo solved for the weighted sum of the members on tokens of the whole layer."""
    front = mean_expert(members, weights).wi
    wo = least_squares_output(
        front, members, weights, tokens.layer_inputs, tokens.layer_weights, ridge=LEAST_SQUARES_RIDGE
    )
    return Expert(front, wo), {}


def union(members: Sequence[Expert], weights: Sequence[float], tokens: GroupTokens) -> tuple[Expert, dict]:
    merged, ranks = union_svd(members, weights)
    return merged, {"ranks": ranks}


def mean_expert(members: Sequence[Expert], weights: Sequence[float]) -> Expert:
    """Weighted average of both matrices, float32."""
    return Expert(*(weighted_average(matrices, weights).float() for matrices in zip(*members, strict=True)))


RULES = {
    "average": MergeRule(average, needs_tokens=False),
    "fisher": MergeRule(fisher, needs_gradients=True),
    "zipit": MergeRule(zipit),
    "repair": MergeRule(repaired),
    "least-squares": MergeRule(least_squares),
    "union-svd": MergeRule(union, needs_tokens=False),
}
