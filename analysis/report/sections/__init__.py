"""The chapters of a report, in their order: each reads the artefacts and says what they show.

A chapter is None where no artefact is about it. What a part of it lacks, and how to get it, stands there as a note. The
module of a chapter is imported where there is something for it to read: a report of statistics needs no weights, and
none of the libraries that read them.
"""

from collections.abc import Callable
from importlib import import_module

from msmoe.analysis.report.artefacts import Artefacts
from msmoe.analysis.report.document import Section

Say = Callable[[str], None]  # what is being done
CHAPTERS: dict[str, Callable[[Artefacts], bool]] = {
    "glance": lambda found: True,
    "usage": lambda found: bool(found.stats),
    "domains": lambda found: bool(found.stats),
    "similarity": lambda found: bool(found.stats or found.compressed),
    "plan": lambda found: found.plan is not None,
    "cost": lambda found: bool(found.compressed),
    "forecast": lambda found: bool(found.stats) or found.original is not None,
    "comparison": lambda found: bool(found.comparisons or found.evaluations),
}


def make_chapter(name: str, found: Artefacts, say: Say) -> Section | None:
    """A chapter of `CHAPTERS`; None where there is nothing to show."""
    if not CHAPTERS[name](found):
        return None
    return import_module(f"{__name__}.{name}").section(found, say)
