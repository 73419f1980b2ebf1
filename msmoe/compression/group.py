"""One group of a plan: read its members, merge them, refit the result to what the members gave.

Shapes: E experts, S sampled tokens, T tokens of the group, D d_model, F d_ff.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from msmoe.calibration.stats import LayerStats, Stats
from msmoe.checkpoint import Checkpoint
from msmoe.families import Expert, Family
from msmoe.families.protocol import load_expert
from msmoe.formats.layout import Export
from msmoe.layer.tokens import TokenSample
from msmoe.merge import RULES, GroupTokens, MergedGroup, Refit, align_members, merge_group, refit_output
from msmoe.merge.align import Match
from msmoe.merge.rebasin import match_many, objective
from msmoe.planning.plan import Group, Plan

LAYER_TOKENS = 4096  # of the layer, for rules that look beyond the tokens of the group


@dataclass(frozen=True)
class GroupReport:
    """What happened to one merged group."""

    layer: str
    dominant: int
    members: tuple[int, ...]
    matches: dict[int, Match]
    refit: Refit | None
    rule: dict = field(default_factory=dict)

    def describe(self) -> dict:
        """The group's entry in `msmoe.json`."""
        entry: dict = {"layer": self.layer, "dominant": self.dominant, "members": list(self.members)}
        if self.matches:
            entry["alignment"] = {
                str(member): {"share_moved": m.share_moved, "objective_before": m.before, "objective_after": m.after}
                for member, m in self.matches.items()
            }
        if self.refit:
            entry["refit"] = self.refit.describe()
        if self.rule:
            entry["rule"] = self.rule
        return entry


@dataclass(frozen=True)
class Sources:
    """What merging a group reads."""

    family: Family
    checkpoint: Checkpoint
    plan: Plan
    stats: Stats | None
    moved_inputs: dict[str, "MovedInputs"] = field(default_factory=dict)


@dataclass(frozen=True)
class MovedInputs:
    """What the sampled tokens of a layer look like once earlier layers are compressed.

    Attributes:
        inputs: (S, D); expert: (S,) routed expert; gate: (S,) gate value; 0 for a token that is dropped now.
    """

    inputs: Tensor
    expert: Tensor
    gate: Tensor


def merge_one(sources: Sources, layout: Export, layer: str, g: int) -> tuple[Expert, GroupReport]:
    """Merge, and refit if the plan says so, one group of one layer."""
    parameters, group = sources.plan.parameters, sources.plan.layers[layer].groups[g]
    stats = sources.stats.layers[layer] if sources.stats else None
    load = lambda e: load_expert(sources.family, sources.checkpoint, layer, e)
    refits = parameters.refit != "none" and len(group.members) > 1
    targets = GroupTargets(group, stats) if refits and stats else None
    reference = 0 if parameters.align_to == "first" else group.dominant
    to_mean = parameters.align_to == "mean" and parameters.align != "none"
    rule = parameters.rule
    several = len(group.members) > 1
    alignment = {
        "reference": reference,
        "alignment": parameters.align if several and not to_mean else "none",
        "canonical": parameters.canonical and several,
        "inputs": (lambda member: routed_inputs(stats, (member, reference))) if stats else None,
        "visit": targets.visit if targets else None,
    }
    details: dict = {}
    if not several or (rule == "average" and not to_mean):  # one member in memory at a time
        merged = merge_group(group.members, group.weights, load, **alignment)
    else:
        found = list(align_members(group.members, load, **alignment))
        matches = {member: match for member, _, match in found if match is not None}
        experts = [expert for _, expert, _ in found]
        if to_mean:
            experts, matches, details = align_to_mean(group.members, experts)
        tokens = group_tokens(group, stats) if stats else no_tokens(experts[0])
        expert, about = RULES[rule].apply(experts, group.weights, tokens)
        merged, details = MergedGroup(expert, matches), details | about
    expert, refit = merged.expert, None
    if targets:
        moved = sources.moved_inputs.get(layer)
        gate = dense_gate(stats, sources, layer) if layout.kind == "dense" and stats else None
        refit = targets.refit(expert, moved, constant_gate=gate)
        expert = Expert(expert.wi, refit.wo)
    if layout.kind == "dense":
        assert stats is not None
        expert = Expert(expert.wi, expert.wo * dense_gate(stats, sources, layer))
    return expert, GroupReport(layer, group.dominant, group.members, merged.matches, refit, details)


def dense_gate(stats: LayerStats, sources: Sources, layer: str) -> float:
    """What a `dense` export multiplies by: the mean gate value of a layer's routed tokens.

    1 for a layer that saw no token, and where the plan leaves a single router row, whose softmax is 1.
    """
    one_row = len(sources.plan.layers[layer].routes(sources.plan.parameters).rows) == 1
    return 1.0 if one_row or not stats.num_tokens else float(stats.gate_mass.sum() / stats.num_tokens)


def align_to_mean(
    members: tuple[int, ...], experts: list[Expert]
) -> tuple[list[Expert], dict[int, Match], dict[str, int]]:
    """Members aligned to the mean of one another, as matches whose objective is that of the whole group."""
    permutations, rounds = match_many(experts)
    before = objective(experts, [torch.arange(len(e.wi)) for e in experts])
    after = objective(experts, permutations)
    matches = {member: Match(p, before, after) for member, p in zip(members, permutations, strict=True)}
    return [e.permuted(p) for e, p in zip(experts, permutations, strict=True)], matches, {"rounds": rounds}


def no_tokens(expert: Expert) -> GroupTokens:
    """What a rule may see where no statistics are given."""
    empty, inputs = torch.zeros(0), torch.zeros(0, expert.wi.shape[1])
    nothing = torch.zeros(0, dtype=torch.int64)
    return GroupTokens(inputs, nothing, empty, empty.double(), inputs, nothing.bool(), inputs, empty.double())


def group_tokens(group: Group, stats: LayerStats) -> GroupTokens:
    """What a merge rule may see of the calibration data."""
    sample = stats.tokens()
    members = torch.tensor(group.members)
    mine = torch.isin(sample.expert, members)
    chosen, weights = sample.select(mine), sample.weights(stats.dispatched)
    layer = sample.drawn(min(LAYER_TOKENS, len(sample)), stats.num_experts)
    position = torch.zeros(stats.num_experts, dtype=torch.int64)
    position[members] = torch.arange(len(members))
    return GroupTokens(
        chosen.inputs, position[chosen.expert], chosen.gate, weights[mine], chosen.output_gradient,
        chosen.has_gradient, layer.inputs, layer.weights(stats.dispatched),
    )  # fmt: skip


def routed_inputs(stats: LayerStats, experts: tuple[int, ...]) -> Tensor:
    """Inputs (T, D) of the sampled tokens routed to any of the experts."""
    sample = stats.tokens()
    return sample.inputs[torch.isin(sample.expert, torch.tensor(experts))]


class GroupTargets:
    """The sampled tokens of a group, and what the original layer made of them.

    The targets of a member's tokens are computed when the merge visits it.
    """

    def __init__(self, group: Group, stats: LayerStats):
        sample = stats.tokens()
        self.members = torch.tensor(group.members)
        self.chosen = torch.isin(sample.expert, self.members).nonzero().flatten()
        self.sample: TokenSample = sample.select(self.chosen)
        self.weights = sample.weights(stats.dispatched)[self.chosen]
        self.targets = torch.zeros_like(self.sample.inputs)

    def visit(self, member: int, expert: Expert) -> None:
        mine = self.sample.expert == member
        self.targets[mine] = expert(self.sample.inputs[mine]) * self.sample.gate[mine, None]

    def refit(self, merged: Expert, moved: MovedInputs | None, *, constant_gate: float | None) -> Refit:
        """Refit for the gate values that the merged expert will meet: the sample's, the moved ones, or a constant."""
        sample = self.sample
        if moved is None:
            gate = sample.gate if constant_gate is None else torch.full_like(sample.gate, constant_gate)
            return refit_output(merged, sample.inputs, gate, self.targets, self.weights, sample.held_out)
        stays = torch.isin(moved.expert[self.chosen], self.members)
        inputs, gate = moved.inputs[self.chosen][stays], moved.gate[self.chosen][stays]
        return refit_output(merged, inputs, gate, self.targets[stays], self.weights[stays], sample.held_out[stays])
