"""Merge rules: what a group of experts becomes."""

from msmoe.merge.average import MergedGroup, align_members, merge_group
from msmoe.merge.layer_refit import LayerRefit, LayerTokens, refit_group
from msmoe.merge.refit import Refit, refit_output
from msmoe.merge.rules import RULES, GroupTokens, MergeRule

__all__ = [
    "RULES", "GroupTokens", "LayerRefit", "LayerTokens", "MergeRule", "MergedGroup", "Refit", "align_members",
    "merge_group", "refit_group", "refit_output",
]  # fmt: skip
