"""One group of a plan: read its members, merge them, refit the result to what the members gave.

Shapes: E experts, S sampled tokens, K experts of a token, T tokens of the group, D d_model, F d_ff.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from msmoe.calibration.stats import LayerStats, Stats
from msmoe.checkpoint import Checkpoint
from msmoe.errors import UserError
from msmoe.families import Family
from msmoe.families.protocol import load_expert
from msmoe.formats.layout import Export
from msmoe.layer.expert import Expert
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
        inputs: (S, D); expert: (S, K) routed experts; gate: (S, K) gate values; 0 for a choice that is dropped now.
    """

    inputs: Tensor
    expert: Tensor
    gate: Tensor


def merge_one(sources: Sources, layout: Export, layer: str, g: int) -> tuple[Expert, GroupReport]:
    """Merge, and refit if the plan says so, one group of one layer."""
    parameters, group = sources.plan.parameters, sources.plan.layers[layer].groups[g]
    stats = sources.stats.layers[layer] if sources.stats else None
    several = len(group.members) > 1
    canonical = parameters.get("canonical", False) and several

    def load(e: int) -> Expert:
        expert = load_expert(sources.family, sources.checkpoint, layer, e)
        if canonical and not expert.activation.scales:
            raise UserError(f"--canonical needs neurons with a scale of their own; the experts of {layer} have the "
                            f"activation {expert.activation.name}")  # fmt: skip
        return expert

    refits = parameters.get("refit", "none") != "none" and len(group.members) > 1
    targets = GroupTargets(group, stats) if refits and stats else None
    reference = 0 if parameters.get("align_to") == "first" else group.dominant
    to_mean = parameters.get("align_to") == "mean" and parameters.get("align") != "none"
    rule = parameters.get("rule", "average")
    alignment = {
        "reference": reference,
        "alignment": parameters.get("align", "weight") if several and not to_mean else "none",
        "canonical": canonical,
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
        expert = expert.with_output(refit.output)
    if layout.kind == "dense":
        assert stats is not None
        expert = scaled(expert, dense_gate(stats, sources, layer))
    return expert, GroupReport(layer, group.dominant, group.members, merged.matches, refit, details)


def scaled(expert: Expert, factor: float) -> Expert:
    """The expert whose outputs are `factor` times as large."""
    bias = None if expert.output_bias is None else expert.output_bias * factor
    return expert.with_output(expert.output * factor, bias)


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
    before = objective(experts, [torch.arange(e.num_neurons) for e in experts])
    after = objective(experts, permutations)
    matches = {member: Match(p, before, after) for member, p in zip(members, permutations, strict=True)}
    return [e.permuted(p) for e, p in zip(experts, permutations, strict=True)], matches, {"rounds": rounds}


def no_tokens(expert: Expert) -> GroupTokens:
    """What a rule may see where no statistics are given."""
    empty, inputs = torch.zeros(0), torch.zeros(0, len(expert.output))
    nobody = torch.zeros(0, 1)
    return GroupTokens(inputs, nobody.bool(), nobody, empty.double(), inputs, empty.bool(), inputs, empty.double())


def group_tokens(group: Group, stats: LayerStats) -> GroupTokens:
    """What a merge rule may see of the calibration data."""
    sample = stats.tokens()
    members = torch.tensor(group.members)
    routed, gate = sample.among(members)
    mine = routed.any(1)
    chosen, weights = sample.select(mine), sample.weights(stats.dispatched)
    layer = sample.drawn(min(LAYER_TOKENS, len(sample)), stats.num_experts)
    return GroupTokens(
        chosen.inputs, routed[mine], gate[mine], weights[mine], chosen.output_gradient,
        chosen.has_gradient, layer.inputs, layer.weights(stats.dispatched),
    )  # fmt: skip


def routed_inputs(stats: LayerStats, experts: tuple[int, ...]) -> Tensor:
    """Inputs (T, D) of the sampled tokens routed to any of the experts."""
    sample = stats.tokens()
    return sample.inputs[torch.isin(sample.expert, torch.tensor(experts)).any(1)]


class GroupTargets:
    """The sampled tokens of a group, and what its members made of them together.

    What a member adds to the targets is computed when the merge visits it.
    """

    def __init__(self, group: Group, stats: LayerStats):
        sample = stats.tokens()
        self.members = torch.tensor(group.members)
        self.chosen = torch.isin(sample.expert, self.members).any(1).nonzero().flatten()
        self.sample: TokenSample = sample.select(self.chosen)
        self.weights = sample.weights(stats.dispatched)[self.chosen]
        self.targets = torch.zeros_like(self.sample.inputs)

    def visit(self, member: int, expert: Expert) -> None:
        rows, gate = self.sample.of(member)
        self.targets.index_add_(0, rows, expert(self.sample.inputs[rows]) * gate[:, None])

    def refit(self, merged: Expert, moved: MovedInputs | None, *, constant_gate: float | None) -> Refit:
        """Refit for the gate values that the merged expert will meet: the sample's, the moved ones, or a constant."""
        sample = self.sample
        if moved is None:
            gate = sample.among(self.members)[1].sum(1)
            gate = gate if constant_gate is None else torch.full_like(gate, constant_gate)
            return refit_output(merged, sample.inputs, gate, self.targets, self.weights, sample.held_out)
        now = replace(sample, expert=moved.expert[self.chosen], gate=moved.gate[self.chosen])
        routed, gates = now.among(self.members)
        stays = routed.any(1)
        inputs, gate = moved.inputs[self.chosen][stays], gates[stays].sum(1)
        return refit_output(merged, inputs, gate, self.targets[stays], self.weights[stays], sample.held_out[stays])
