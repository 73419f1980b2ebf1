"""Weighted average of the aligned members of a group (M-SMoE, arXiv 2310.01334, equation 2).

Members are loaded one at a time: a group costs the memory of three experts, whatever its size.

Shapes: F d_ff, D d_model, T tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msmoe.layer.expert import Expert
from msmoe.merge.align import Alignment, Match, canonical_scale, match


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
        alignment: `weight`, `activation`, `ream` or `none`.
        canonical: scale neurons to equal input and output norm before matching and averaging.
        inputs: tokens (T, D) of a member and the reference, for alignment by activations.
        visit: called with every member as it was loaded, so that nobody reads it a second time.
    """
    total, matches = None, {}
    aligned_members = align_members(
        members, load, reference=reference, alignment=alignment, canonical=canonical, inputs=inputs, visit=visit
    )
    for (member, aligned, found), weight in zip(aligned_members, weights, strict=True):
        if total is None:
            total = aligned.map(torch.zeros_like)
        if found is not None:
            matches[member] = found
        for tensor, added in zip(total.tensors, aligned.tensors, strict=True):
            tensor.add_(added, alpha=weight)
    assert total is not None
    return MergedGroup(total, matches)


def align_members(
    members: Sequence[int],
    load: Callable[[int], Expert],
    *,
    reference: int,
    alignment: Alignment = "weight",
    canonical: bool = False,
    inputs: Callable[[int], Tensor] | None = None,
    visit: Callable[[int, Expert], None] | None = None,
) -> Iterator[tuple[int, Expert, Match | None]]:
    """The members of a group one at a time, each aligned to a reference expert; arguments as of `merge_group`.

    Yields:
        member, the aligned expert, and its match; None for the reference, and for all without alignment.
    """
    prepare = canonical_scale if canonical else (lambda expert: expert)
    loaded_reference = load(reference)
    prepared_reference = prepare(loaded_reference)
    for member in members:
        expert = loaded_reference if member == reference else load(member)
        if visit:
            visit(member, expert)
        aligned, found = prepare(expert), None
        if member != reference and alignment != "none":
            found = match(prepared_reference, aligned, alignment=alignment, inputs=inputs(member) if inputs else None)
            aligned = aligned.permuted(found.permutation)
        yield member, aligned, found
