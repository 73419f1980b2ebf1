"""Expert similarity: matrices, clusters, and what lining up neurons gains."""

from msmoe.analysis.report.sections.similarity.chapter import section

__all__ = ["section"]
