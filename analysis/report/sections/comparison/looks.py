"""What the charts of a comparison share: names that are short and apart, the look of kinds, controls with a choice."""

from collections.abc import Iterable, Sequence

import altair as alt
from msmoe.analysis.report.charts import BLUE, GREEN, GREY, PINK, SKY, YELLOW, choice
from msmoe.analysis.report.document import distinct, shorten

from msmoe.comparison.summary import Row, Summary

MAX_METHODS = 40  # in a chart, the best ones
MAX_NAME = 28  # characters
NO_KIND = "other"
KINDS = {"pruning": (BLUE, "circle"), "merging": (GREEN, "square"), "clustering": (PINK, "triangle-up")}
OTHER_LOOKS = ((YELLOW, "diamond"), (SKY, "triangle-down"), (GREY, "cross"))
Control = tuple[str, str, Sequence[str], Sequence[str]]  # field that it filters by, label, values, names of these


def short_texts(names: Iterable[str], length: int = MAX_NAME) -> dict[str, str]:
    """Names -> labels that tell them apart."""
    once = list(dict.fromkeys(names))
    return dict(zip(once, distinct(once, length), strict=True))


def kind_of(row: Row) -> str:
    return shorten(row.kind, MAX_NAME) or NO_KIND


def kind_scales(kinds: Iterable[str]) -> tuple[alt.Scale, alt.Scale]:
    """Colour and shape of kinds: the known ones look the same in every chart."""
    found = set(kinds)
    names = [kind for kind in KINDS if kind in found] + sorted(found - KINDS.keys())
    others = (OTHER_LOOKS[i % len(OTHER_LOOKS)] for i in range(len(names)))
    looks = [KINDS[kind] if kind in KINDS else next(others) for kind in names]
    colours, shapes = [colour for colour, _ in looks], [shape for _, shape in looks]
    return alt.Scale(domain=names, range=colours), alt.Scale(domain=names, range=shapes)


def controls(*wanted: Control) -> tuple[list[alt.Parameter], str]:
    """Controls with more than one choice, and the expression for the rows that they choose.

    The rows hold the values as text in a field of the control's name.
    """
    real = [control for control in wanted if len(control[2]) > 1]
    params = [choice(f"of_{field}", label, values, names) for field, label, values, names in real]
    return params, " && ".join(f"datum.{field} == of_{field}" for field, *_ in real) or "true"


def steps_control(summary: Summary) -> Control:
    steps = summary.recover_steps
    return "steps", "Recovery", [str(n) for n in steps], [f"{n:,} steps" if n else "none" for n in steps]


def size_control(summary: Summary) -> Control:
    sizes = [f"{size.experts:g}" for size in summary.sizes]
    return "size", "Experts per layer", sizes, sizes


def bounded(num_methods: int, most: int = MAX_METHODS) -> str:
    """A sentence on methods that a chart leaves out, to add to its reading aid."""
    return f" Of {num_methods} methods, the best {most} are drawn." if num_methods > most else ""
