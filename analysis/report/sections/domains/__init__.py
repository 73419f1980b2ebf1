"""Domains: how texts of different kinds use the experts."""

from analysis.report.sections.domains.chapter import section

__all__ = ["section"]
