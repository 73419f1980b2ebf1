"""Tasks, metrics and confidence intervals: what a checkpoint is worth after compression."""
