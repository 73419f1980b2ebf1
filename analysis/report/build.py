"""Artefacts -> report."""

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path

import pandas as pd
from msmoe.analysis.report.artefacts import Artefacts, gather
from msmoe.analysis.report.document import Document
from msmoe.analysis.report.files import write_files
from msmoe.analysis.report.page import to_html
from msmoe.analysis.report.sections import CHAPTERS, make_chapter

from msmoe.errors import UserError
from msmoe.files import write_whole

Tell = Callable[[int, int, str], None]  # (steps done, steps in all, what is being done)
FRAME_HEIGHT = 800  # pixels of a report in a notebook


@dataclass(frozen=True)
class Report:
    """A report; a notebook shows it as it is."""

    document: Document
    artefacts: Artefacts

    def __repr__(self) -> str:
        return f"Report({self.document.title!r}, {len(self.document.sections)} chapters of {self.document.subtitle})"

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """Name -> data of every table."""
        return {table.name: table.frame for table in self.document.tables()}

    def to_html(self) -> str:
        """One page that needs nothing else."""
        return to_html(self.document)

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write the page.

        Raises:
            UserError: if the file exists and `force` is not given, or cannot be written.
        """
        path = Path(path)
        if path.exists() and not force:
            raise UserError(f"{path} exists; use --force to replace it")
        if not path.parent.is_dir():
            raise UserError(f"cannot write {path}: {path.parent} is no folder")
        write_whole(path, self.to_html())

    def save_figures(self, folder: str | Path, *, force: bool = False, tell: Tell | None = None) -> list[Path]:
        """Write every figure as PNG and SVG and every table as CSV.

        Raises:
            UserError: if one exists and `force` is not given, or cannot be written.
        """
        return write_files(self.document, Path(folder), force=force, tell=tell or (lambda done, total, note: None))

    def _repr_html_(self) -> str:
        page = escape(self.to_html(), quote=True)
        return (
            f'<iframe srcdoc="{page}" sandbox="allow-scripts allow-downloads" style="width:100%;border:0" '
            f'height="{FRAME_HEIGHT}" title="{escape(self.document.title)}"></iframe>'
        )


def report(*artefacts: object, thorough: bool = False, tell: Tell | None = None) -> Report:
    """Make a report of statistics, plans, checkpoints and results of one model.

    Args:
        artefacts: paths, or objects as `msmoe` returns them: `Stats`, `Plan`, results of `compare` and `evaluate`.
        thorough: forecast every layer at every size and measure all that can be measured, however long it takes; by
            default each of these gets a few seconds, and the report says what was left out.
        tell: called with (steps done, steps in all, what is being done).

    Raises:
        UserError: for something that is no artefact, or artefacts of different checkpoints.
    """
    sections = []
    with pd.option_context("mode.string_storage", "python"):  # names may hold what is no text, which Arrow refuses
        found = gather(artefacts, thorough=thorough)
        for done, name in enumerate(CHAPTERS):
            say = _teller(tell, done, name)
            say("")
            section = make_chapter(name, found, say)
            if section is not None:
                sections.append(section)
    return Report(Document(title_of(found), subtitle_of(found), tuple(sections)), found)


def _teller(tell: Tell | None, done: int, name: str) -> Callable[[str], None]:
    def say(note: str) -> None:
        if tell:
            tell(done, len(CHAPTERS), f"{name}: {note}" if note else name)

    return say


def title_of(found: Artefacts) -> str:
    """What the report is of."""
    if found.original is not None:
        return f"Expert report: {found.original.label}"
    if found.compressed:
        return f"Expert report: {found.compressed[0].label}"
    if found.comparisons:
        return f"Comparison: {found.comparisons[0].label}"
    return "Expert report"


def subtitle_of(found: Artefacts) -> str:
    """The artefacts that it was made from."""
    kinds = (
        ("original", [found.original] if found.original else []),
        ("compressed", found.compressed),
        ("statistics", found.stats),
        ("plan", found.plans),
        ("comparison", found.comparisons),
        ("results", found.evaluations),
    )
    return ", ".join(f"{kind} {item.label}" for kind, items in kinds for item in items)
