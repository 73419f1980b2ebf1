"""Merge rules: what a group of experts becomes."""

from msmoe.merge.average import MergedGroup, merge_group
from msmoe.merge.refit import Refit, refit_output

__all__ = ["MergedGroup", "Refit", "merge_group", "refit_output"]
