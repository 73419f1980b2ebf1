"""What it cost: bytes, output errors, stable ranks and dropped tokens of compressed checkpoints."""

from msmoe.analysis.report.sections.cost.chapter import section

__all__ = ["section"]
