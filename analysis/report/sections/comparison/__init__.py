"""Comparison: results of `msmoe compare` and `msmoe evaluate`."""

from msmoe.analysis.report.sections.comparison.chapter import section

__all__ = ["section"]
