"""One group of a plan: read its members, merge them, refit the result to what the original layer gave.

Shapes: E experts, S sampled tokens, K experts of a token, T tokens of the group, D d_model, F d_ff.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from msmoe.calibration.stats import LayerStats, Stats
from msmoe.checkpoint import Checkpoint
from msmoe.errors import UserError
from msmoe.families import Family
from msmoe.formats.layout import Layout
from msmoe.layer.expert import Expert
from msmoe.merge import RULES, GroupTokens, LayerTokens, MergedGroup, Refit, align_members, merge_group, refit_group
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
    """What merging a group reads.

    Attributes:
        tokens: of a layer, for plans with refit; without it nothing is refitted.
    """

    family: Family
    checkpoint: Checkpoint
    plan: Plan
    stats: Stats | None
    tokens: Callable[[str], LayerTokens] | None = None


def merge_one(sources: Sources, layout: Layout, layer: str, g: int) -> tuple[Expert, GroupReport]:
    """Merge, and refit if there are tokens for that, one group of one layer."""
    parameters, plan = sources.plan.parameters, sources.plan.layers[layer]
    group = plan.groups[g]
    stats = sources.stats.layers[layer] if sources.stats else None
    several = len(group.members) > 1
    canonical = parameters.canonical and several

    def load(e: int) -> Expert:
        expert = sources.family.load_expert(sources.checkpoint, layer, e)
        if canonical and not expert.activation.scales:
            raise UserError(f"--canonical needs neurons with a scale of their own; the experts of {layer} have the "
                            f"activation {expert.activation.name}")  # fmt: skip
        return expert

    reference = 0 if parameters.align_to == "first" else group.dominant
    to_mean = parameters.align_to == "mean" and parameters.align != "none"
    rule = parameters.rule
    alignment = {
        "reference": reference,
        "alignment": parameters.align if several and not to_mean else "none",
        "canonical": canonical,
        "inputs": (lambda member: routed_inputs(stats, (member, reference))) if stats else None,
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
    if sources.tokens is not None:
        refit = refit_group(expert, sources.tokens(layer), plan.stored_order.index(g))
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
