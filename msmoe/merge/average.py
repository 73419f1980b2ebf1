"""Weighted average of the aligned members of a group (M-SMoE, arXiv 2310.01334, equation 2).

Members are loaded one at a time: a group costs the memory of three experts, whatever its size.

Shapes: F d_ff, D d_model, T tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msmoe.align import Alignment, Match, canonical_scale, match
from msmoe.families import Expert


@dataclass(frozen=True)
class MergedGroup:
    """A merged expert, float32, and how its members were aligned."""

    expert: Expert
    matches: dict[int, Match]  # member -> its match to the reference


def merge_group(
    members: Sequence[int],
    weights: Sequence[float],
    load: Callable[[int], Expert],
    *,
    reference: int,
    alignment: Alignment = "weight",
    canonical: bool = False,
    inputs: Callable[[int], Tensor] | None = None,
    visit: Callable[[int, Expert], None] | None = None,
) -> MergedGroup:
    """Average the members of a group, each aligned to a reference expert.

    Args:
        members: expert indices.
        weights: their weights, summing to 1.
        load: reads one expert, float32.
        reference: the expert whose neuron order the others take; need not be a member.
        alignment: `weight`, `activation` or `none`.
        canonical: scale neurons to equal input and output norm before matching and averaging.
        inputs: tokens (T, D) of a member and the reference, for activation alignment.
        visit: called with every member as it was loaded, so that nobody reads it a second time.
    """
    prepare = canonical_scale if canonical else (lambda expert: expert)
    loaded_reference = load(reference)
    prepared_reference = prepare(loaded_reference)
    total = Expert(torch.zeros_like(prepared_reference.wi), torch.zeros_like(prepared_reference.wo))
    matches = {}
    for member, weight in zip(members, weights, strict=True):
        expert = loaded_reference if member == reference else load(member)
        if visit:
            visit(member, expert)
        aligned = prepare(expert)
        if member != reference and alignment != "none":
            matches[member] = match(
                prepared_reference, aligned, alignment=alignment, inputs=inputs(member) if inputs else None
            )
            aligned = aligned.permuted(matches[member].permutation)
        total.wi.add_(aligned.wi, alpha=weight)
        total.wo.add_(aligned.wo, alpha=weight)
    return MergedGroup(total, matches)
