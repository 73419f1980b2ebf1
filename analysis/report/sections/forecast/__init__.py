"""How far can I go: predicted error against experts kept."""

from analysis.report.sections.forecast.chapter import section

__all__ = ["section"]
