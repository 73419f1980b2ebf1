"""Pruning: which experts of a layer stay. Scores (a table), subset search, and a progressive schedule."""

from msmoe.prune.progressive import progressive_subset
from msmoe.prune.scores import SCORES, score_experts
from msmoe.prune.subset import Subset, best_subset

__all__ = ["SCORES", "Subset", "best_subset", "progressive_subset", "score_experts"]
