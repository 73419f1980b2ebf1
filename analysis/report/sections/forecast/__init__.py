"""How far can I go: predicted error against experts kept."""

from collections.abc import Callable

from msmoe.analysis.report.artefacts import Artefacts
from msmoe.analysis.report.document import Note, Section

KEY, TITLE = "forecast", "How far can I go"
NEEDS_ORIGINAL = (
    "Give the original checkpoint beside the statistics to see the error that fewer experts would make, by layer."
)
NEEDS_STATISTICS = (
    "Give statistics of the checkpoint (msmoe profile) beside it to see the error that fewer experts would make, by "
    "layer."
)


def section(artefacts: Artefacts, say: Callable[[str], None]) -> Section | None:
    """The chapter; without weights or statistics, what it needs."""
    if artefacts.original is None and artefacts.calibration is None:
        return None
    if artefacts.original is None or artefacts.calibration is None:
        return Section(KEY, TITLE, "", (Note(NEEDS_ORIGINAL if artefacts.original is None else NEEDS_STATISTICS),))
    from msmoe.analysis.report.sections.forecast.chapter import forecast_section

    return forecast_section(artefacts, KEY, TITLE, say)


__all__ = ["section"]
