"""The chapters of a report, in their order: each reads the artefacts and says what they show.

A chapter is None where no artefact is about it. What a part of it lacks, and how to get it, stands there as a note.
"""

from collections.abc import Callable

from msmoe.analysis.report.artefacts import Artefacts
from msmoe.analysis.report.document import Section
from msmoe.analysis.report.sections import comparison, cost, domains, forecast, glance, plan, similarity, usage

Say = Callable[[str], None]  # what is being done
SECTIONS: tuple[Callable[[Artefacts, Say], Section | None], ...] = (
    glance.section,
    usage.section,
    domains.section,
    similarity.section,
    plan.section,
    cost.section,
    forecast.section,
    comparison.section,
)
