"""Expert similarity: matrices, clusters, and what lining up neurons gains."""

from analysis.report.sections.similarity.chapter import section

__all__ = ["section"]
