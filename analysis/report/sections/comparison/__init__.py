"""Comparison: results of `msmoe compare` and `msmoe evaluate`."""

from analysis.report.sections.comparison.chapter import section

__all__ = ["section"]
