"""The table of merge rules: aligned members, their weights and the tokens of their group -> one expert.

Shapes: T tokens, n members, F d_ff, D d_model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from msmoe.layer.expert import Expert
from msmoe.merge.fisher import expert_fisher, fisher_average, weighted_average
from msmoe.merge.least_squares import least_squares_output
from msmoe.merge.repair import repair
from msmoe.merge.union_svd import union_svd
from msmoe.merge.zipit import zip_experts


@dataclass(frozen=True)
class GroupTokens:
    """What a rule may see of the calibration data.

    Attributes:
        inputs: (T, D) sampled tokens routed to a member; weights: (T,) tokens that each stands for.
        routed: (T, n) bool, to which members; gate: (T, n) what their outputs are multiplied by, 0 elsewhere.
        output_gradient: (T, D) gradient at the layer's output; known: (T,) bool, where it was recorded.
        layer_inputs: (N, D) tokens of the whole layer; layer_weights: (N,).
    """

    inputs: Tensor
    routed: Tensor
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
        mine = tokens.routed[:, i] & tokens.known
        scale = float(tokens.weights[tokens.routed[:, i]].sum() / tokens.weights[mine].sum()) if mine.any() else 1.0
        seen = tokens.inputs[mine], tokens.gate[mine, i], tokens.output_gradient[mine], tokens.weights[mine] * scale
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
    """Average, its output solved for the weighted sum of the members on tokens of the whole layer."""
    merged = mean_expert(members, weights)
    output = least_squares_output(
        merged, members, weights, tokens.layer_inputs, tokens.layer_weights, ridge=LEAST_SQUARES_RIDGE
    )
    return merged.with_output(output), {}


def union(members: Sequence[Expert], weights: Sequence[float], tokens: GroupTokens) -> tuple[Expert, dict]:
    merged, ranks = union_svd(members, weights)
    return merged, {"ranks": ranks}


def mean_expert(members: Sequence[Expert], weights: Sequence[float]) -> Expert:
    """Weighted average of every weight, float32."""
    stacks = zip(*(member.tensors for member in members), strict=True)
    return members[0].like([weighted_average(tensors, weights).float() for tensors in stacks])


RULES = {
    "average": MergeRule(average, needs_tokens=False),
    "fisher": MergeRule(fisher, needs_gradients=True),
    "zipit": MergeRule(zipit),
    "repair": MergeRule(repaired),
    "least-squares": MergeRule(least_squares),
    "union-svd": MergeRule(union, needs_tokens=False),
}
