"""How far can I go: predicted error against experts kept."""

from msmoe.analysis.report.sections.forecast.chapter import section

__all__ = ["section"]
