"""Decide, per layer, what becomes of every expert: methods, scores, similarity, grouping, budgets -> a plan."""
