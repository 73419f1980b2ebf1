"""`msmoe.report`: the door to `analysis`, which reads artefacts and is imported when a report is asked for."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from msmoe.analysis.report import Report


def report(*artefacts: object, thorough: bool = False, tell: Callable[[int, int, str], None] | None = None) -> "Report":
    """Make a report of statistics, plans, checkpoints and results of one model; a notebook shows it as it is.

    Args:
        artefacts: paths, or objects as `msmoe` returns them: `Stats`, `Plan`, results of `compare` and `evaluate`.
        thorough: forecast every layer at every size and measure all that can be measured, however long it takes; by
            default each of these gets a few seconds, and the report says what was left out.
        tell: called with (steps done, steps in all, what is being done).

    Returns:
        `.save(path)` writes the page, `.save_figures(folder)` figures and tables, `.tables` has their data.

    Raises:
        UserError: for something that is no artefact, or artefacts of different checkpoints.
    """
    from msmoe.analysis.report import report as make

    return make(*artefacts, thorough=thorough, tell=tell)
