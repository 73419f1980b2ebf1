"""Domains: how texts of different kinds use the experts."""

from msmoe.analysis.report.sections.domains.chapter import section

__all__ = ["section"]
