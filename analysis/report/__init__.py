"""A report of any of the project's artefacts, alone or together: one HTML page, and its figures and tables as files."""

from msmoe.analysis.report.build import Report, report

__all__ = ["Report", "report"]
