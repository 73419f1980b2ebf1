"""Git Re-Basin for more than two experts ("merge many", arXiv 2209.04836).

Finds the neuron order of every member that maximises sum_{i<j} <P_i W_i, P_j W_j>: coordinate ascent, each member in
turn aligned by one assignment to the mean of the others, which does not depend on any reference.

Shapes: F d_ff, D d_model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from msmoe.layer.expert import Expert
from msmoe.merge.align import match_weights

TOLERANCE = 1e-9  # relative to |W_i| |sum of the others|, which bounds the gain


def match_many(members: Sequence[Expert], *, max_rounds: int = 100) -> tuple[list[Tensor], int]:
    """Line up the neurons of several experts with one another.

    Members are visited in the order given. A move counts if it raises the objective, computed in float64, by more than
    a relative tolerance: the paper's code stops at an absolute one in float32 and may run for ever. The paper starts
    from the orders as they are; among shuffled members the mean of the others is then a blur. Here a start that aligns
    each member to the mean of those before it is used if its objective is the higher of the two.

    Args:
        members: experts of one shape.
        max_rounds: visits to all members; at 0 the start is returned.

    Returns:
        permutations: (F,) int64 per member, `member.permuted(permutation)` lines up with the others; the first is the
            identity.
        rounds: visits made, the last of which moved nothing unless it is `max_rounds`. Two members take one
            assignment, counted as one round; a single one takes none.
    """
    identity = torch.arange(members[0].num_neurons)
    permutations = [identity.clone() for _ in members]
    if len(members) <= 2:
        for i in range(1, len(members)):
            permutations[i] = match_weights(members[0], members[i]).permutation
        return permutations, len(members) - 1

    shuffled = _aligned_in_sequence(members)
    if objective(members, shuffled) > objective(members, permutations):
        permutations = shuffled
    total = _total(members, permutations)
    rounds, moved = 0, True
    while moved and rounds < max_rounds:
        moved = False
        for i, member in enumerate(members):
            improved = _align_to_others(member, permutations[i], total, len(members) - 1)
            if improved is not None:
                permutations[i], moved = improved, True
        rounds += 1
    frame = permutations[0].argsort()
    return [permutation[frame] for permutation in permutations], rounds


def objective(members: Sequence[Expert], permutations: Sequence[Tensor]) -> float:
    """Summed inner products of all pairs of permuted members, float64: (|sum W_i|^2 - sum |W_i|^2) / 2."""
    own = sum(_inner(member, member) for member in members)
    total = _total(members, permutations)
    return (_inner(total, total) - own) / 2


def _aligned_in_sequence(members: Sequence[Expert]) -> list[Tensor]:
    """Permutations that align each member to the mean of those before it."""
    permutations = [torch.arange(members[0].num_neurons)]
    total = _total(members[:1], permutations)
    for i in range(1, len(members)):
        permutations.append(match_weights(_scaled(total, 1 / i, members[i]), members[i]).permutation)
        _add_(total, members[i].permuted(permutations[i]))
    return permutations


def _align_to_others(member: Expert, permutation: Tensor, total: Expert, num_others: int) -> Tensor | None:
    """A better permutation of a member for the mean of the others, `total` updated; None if there is none."""
    current = member.permuted(permutation)
    _add_(total, current, sign=-1)
    move = match_weights(_scaled(total, 1 / num_others, member), current).permutation
    candidate = current.permuted(move)
    gain = _inner(total, candidate) - _inner(total, current)
    bound = (_inner(total, total) * _inner(current, current)) ** 0.5
    better = gain > TOLERANCE * bound
    _add_(total, candidate if better else current)
    return permutation[move] if better else None


def _total(members: Sequence[Expert], permutations: Sequence[Tensor]) -> Expert:
    total = members[0].map(lambda weight: torch.zeros_like(weight, dtype=torch.float64))
    for member, permutation in zip(members, permutations, strict=True):
        _add_(total, member.permuted(permutation))
    return total


def _add_(total: Expert, expert: Expert, *, sign: int = 1) -> None:
    for tensor, added in zip(total.tensors, expert.tensors, strict=True):
        tensor.add_(added, alpha=sign)


def _scaled(total: Expert, factor: float, like: Expert) -> Expert:
    return total.like([(t * factor).to(w.dtype) for t, w in zip(total.tensors, like.tensors, strict=True)])


def _inner(left: Expert, right: Expert) -> float:
    """Inner product of all that belongs to a neuron; an output bias is nobody's."""
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(left.features, right.features, strict=True))
