"""The plan: who becomes part of whom."""

from analysis.report.sections.plan.chapter import section

__all__ = ["section"]
