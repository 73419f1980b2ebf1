"""The plan: who becomes part of whom."""

from msmoe.analysis.report.sections.plan.chapter import section

__all__ = ["section"]
