"""Figures of a comparison as files: mean score against bytes, every task, and the loss of each layer.

They are the report's charts with all that its controls choose from side by side. Labels stand beside what they name;
colours and shapes of methods say the same.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
from msmoe.analysis.comparison_points import SAME_BYTES, Point, pareto_front, points, references, spread, standing
from msmoe.analysis.report.charts import COLOURS, DIVERGING, GREY, short_names
from msmoe.analysis.report.document import distinct
from msmoe.analysis.report.files import draw_images
from msmoe.analysis.report.sections.comparison.looks import MAX_NAME
from msmoe.analysis.report.sections.comparison.pareto import score_domain

from msmoe.comparison.summary import FULL, Row, Summary, Task, count, megabytes

BRIGHT = COLOURS[:6]
CROSSED = "M-1,-.5L-.5,-1L0,-.5L.5,-1L1,-.5L.5,0L1,.5L.5,1L0,.5L-.5,1L-1,.5L-.5,0Z"
STAR = "M0,-1L.22,-.31L.95,-.31L.36,.12L.59,.81L0,.38L-.59,.81L-.36,.12L-.95,-.31L-.22,-.31Z"
HEXAGON = "M-.5,-.87L.5,-.87L1,0L.5,.87L-.5,.87L-1,0Z"
SHAPES = (
    "circle", "square", "triangle-up", "diamond", "triangle-down", "cross", CROSSED, STAR, "triangle-left",
    "triangle-right", HEXAGON, "wedge",
)  # fmt: skip
DARK, PALE, BLANK = "#333333", "#F3F3F3", "#DDDDDD"
DASHED, DOTTED, DOT_DASHED = [6, 4], [2, 3], [6, 3, 2, 3]
LINE, LETTER = 15, 6.3  # pixels from one label to the next; of a letter, on average
MAX_COLOURED = len(SHAPES)  # methods; of more, the best six are coloured and the others grey
MAX_COLUMNS = 4  # of tasks
MAX_CELLS = 24  # of layers beside one another
MAP_WIDTH = 960  # pixels of the cells in a row
AXES_WIDTH = {1: 820, 2: 560}  # pixels of a panel, by the number of columns


@dataclass(frozen=True)
class Look:
    """How a method is drawn."""

    colour: str
    shape: str
    dash: tuple[int, ...]
    is_coloured: bool


def write_figures(summary: Summary, out: Path) -> list[Path]:
    """Draw every figure that there is data for, as PNG and SVG; the same summary gives the same bytes."""
    written = []
    for name, draw in FIGURES.items():
        found = draw(summary)
        if found is not None:
            chart, title, reading = found
            written += draw_images(chart, out / name, title=title, reading=reading)
    return written


Drawn = tuple[alt.TopLevelMixin, str, str]  # chart, title, what to know to read it


def pareto(summary: Summary) -> Drawn | None:
    """Mean score against stored bytes, one panel for each number of recovery steps; None without any mean."""
    panels = {steps: found for steps in summary.recover_steps if (found := points(summary, steps))}
    if not panels:
        return None
    looks, columns = assign_looks(standing(summary)), min(len(panels), 2)
    width, height = AXES_WIDTH[columns], max(420, (LINE + 2) * len(looks))
    charts = [pareto_panel(summary, steps, found, looks, width=width, height=height) for steps, found in panels.items()]
    metric = "loss per token, lower is better" if summary.mean_metric == "loss" else "exact match"
    return (
        alt.concat(*charts, columns=columns, spacing=40),
        f"Mean over {count(len(summary.mean_tasks), 'task')}: {metric}",
        f"Circled: the Pareto front (bytes within {100 * SAME_BYTES:g} % count as equal). Vertical lines: 95 % "
        "intervals over examples and seeds. Methods of one size stand side by side.",
    )


def pareto_panel(
    summary: Summary, steps: int, found: Sequence[Point], looks: dict[str, Look], *, width: int, height: int
) -> alt.LayerChart:
    """Names on the left, references on the right, sizes below."""
    short = short_texts(looks)
    bottom, top = score_domain(summary)
    first, last = (f(np.log10([point.x for point in found])) for f in (min, max))
    margin = max(0.06 * (last - first), 0.01)
    strip = (LETTER * max(len(short[point.method]) for point in found) + 45) / width
    reach = (last - first + 2 * margin) / (1 - strip)
    left = last + margin - reach
    frame = pd.DataFrame([point_record(point, looks[point.method]) for point in sorted(found, key=lambda p: p.x)])
    names = frame.drop_duplicates("method").assign(name=lambda f: f.method.map(short))
    levels = spread((names.score - bottom) / (top - bottom), LINE / height)
    names = names.assign(level=bottom + levels * (top - bottom), at=10 ** (left + reach * (strip - 30 / width)))

    x_scale = alt.Scale(type="log", domain=[10**left, 10 ** (last + margin)], nice=False)
    y_scale = alt.Scale(domain=sorted((bottom, top)), reverse=bottom > top, nice=False, zero=False)
    x_axis = size_axis(summary, found)
    x = lambda field: alt.X(f"{field}:Q", title=None, scale=x_scale, axis=x_axis)
    y = lambda field: alt.Y(f"{field}:Q", title=None, scale=y_scale, axis=alt.Axis(tickCount=8))
    colour = alt.Color("colour:N", scale=None)
    base = alt.Chart(frame).encode(x=x("x"), color=colour)
    front = pareto_front(found, lower_is_better=summary.mean_metric == "loss")
    edge = alt.Chart(pd.DataFrame([(point.x, point.score.value) for point in front], columns=pd.Index(["x", "score"])))
    edge = edge.encode(x=x("x"), y=y("score"))
    layers = [
        *reference_layers(summary, steps, x, y, start=10 ** (left + reach * (strip - 20 / width)), height=height),
        alt.Chart(names).mark_rule(strokeWidth=0.6, opacity=0.7).encode(
            x=x("at"), y=y("level"), x2="x:Q", y2="score:Q", color=colour
        ),
        base.mark_rule(strokeWidth=1.1).encode(y=y("low"), y2="high:Q"),
        base.transform_filter("datum.coloured").mark_line(strokeWidth=1.1).encode(
            y=y("score"), detail="method:N", strokeDash=alt.StrokeDash("dash:N", scale=None)
        ),
        edge.mark_line(color=DARK, strokeWidth=1.1, interpolate="step-after"),
        base.mark_point(filled=True, opacity=1, stroke="white", strokeWidth=0.4).encode(
            y=y("score"), shape=alt.Shape("shape:N", scale=None), size=alt.Size("size:Q", scale=None)
        ),
        edge.mark_point(color=DARK, size=170, shape="circle", strokeWidth=1.2, opacity=1),
        alt.Chart(names).mark_text(align="right", dx=-4).encode(
            x=x("at"), y=y("level"), text="name:N",
            color=alt.condition("datum.coloured", colour, alt.value(DARK)),
        ),
    ]  # fmt: skip
    title = f"after {steps:,} steps of recovery" if steps else "without training"
    return alt.layer(*layers).properties(width=width, height=height, title=title)


def point_record(point: Point, look: Look) -> dict[str, Any]:
    score = point.score
    return {
        "method": point.method, "x": point.x, "score": score.value, "low": score.low, "high": score.high,
        "colour": look.colour, "shape": look.shape, "dash": list(look.dash), "coloured": look.is_coloured,
        "size": 80 if look.is_coloured else 22,
    }  # fmt: skip


def reference_layers(
    summary: Summary, steps: int, x: Callable, y: Callable, *, start: float, height: int
) -> list[alt.Chart]:
    """Horizontal lines with intervals, right of the names; references are named on the right."""
    found = references(summary, steps)
    if not found:
        return []
    bottom, top = score_domain(summary)
    levels = spread([(score.value - bottom) / (top - bottom) for _, score in found], 2.2 * LINE / height)
    names = short_texts(row.method for row, _ in found)
    records = [
        {
            "start": start, "score": score.value, "low": score.low, "high": score.high,
            "level": bottom + level * (top - bottom), "dash": dashes(row),
            "name": f"{names[row.method]}{'' if steps in row.measurements else ' untrained'}\n"
                    f"{score.value:.3f}, {megabytes(row.num_bytes)} MB",
        }
        for (row, score), level in zip(found, levels, strict=True)
    ]  # fmt: skip
    base = alt.Chart(pd.DataFrame(records))
    right: Any = alt.value("width")
    return [
        base.mark_rect(color=GREY, opacity=0.14).encode(x=x("start"), x2=right, y=y("low"), y2="high:Q"),
        base.mark_rule(color=DARK).encode(
            x=x("start"), x2=right, y=y("score"), strokeDash=alt.StrokeDash("dash:N", scale=None)
        ),
        base.mark_text(align="left", dx=8, lineBreak="\n", baseline="middle", dy=-5, color=DARK).encode(
            x=right, y=y("level"), text="name:N"
        ),
    ]


def size_axis(summary: Summary, found: Sequence[Point]) -> alt.Axis:
    """Ticks at the sizes' stored bytes, in words."""
    texts = {}
    for size in sorted({point.size for point in found}):
        mine = [point for point in found if point.size == size]
        stored = round(float(np.median([point.num_bytes for point in mine])))
        middle = float(10 ** np.median([np.log10(point.x) for point in mine]))
        texts[middle] = [f"{summary.sizes[size].experts:g} experts", f"{megabytes(stored)} MB"]
    nearest = " : ".join(
        f"abs(datum.value - {middle!r}) < 1e-9 * {middle!r} ? {json.dumps(lines)}" for middle, lines in texts.items()
    )
    return alt.Axis(values=list(texts), labelExpr=f"{nearest} : ''", labelOverlap=True, grid=False)


def tasks(summary: Summary) -> Drawn | None:
    """A panel per task: a line per method, a marker with its interval per size; None without methods."""
    methods = standing(summary)
    if not methods or not summary.tasks:
        return None
    columns = -(-len(summary.tasks) // -(-len(summary.tasks) // MAX_COLUMNS))
    charts = [
        task_panel(summary, task, methods, is_first=i % columns == 0, width=max(200, 620 // columns))
        for i, task in enumerate(summary.tasks)
    ]
    chart = alt.concat(*charts, columns=columns, spacing=18)
    reading = (
        "Better is to the right. Lines: 95 % intervals over examples and seeds; the grey band is the full model's."
    )
    if any(task.majority_share is not None for task in summary.tasks):
        reading += " Grey, dashes and dots: always the most frequent answer."
    return chart.resolve_scale(color="shared", shape="shared", fillOpacity="shared", strokeDash="shared"), (
        "Scores of every task"
    ), reading  # fmt: skip


def task_panel(summary: Summary, task: Task, methods: Sequence[str], *, is_first: bool, width: int) -> alt.LayerChart:
    """One panel; better is to the right."""
    short, sizes = short_texts(methods), [f"{size.experts:g} experts" for size in summary.sizes]
    step = min(0.26, 0.8 / len(sizes))
    axis = alt.Axis(
        values=list(range(len(methods))), labelExpr=f"{json.dumps([short[m] for m in methods])}[datum.value]",
        ticks=False, domain=False, grid=False, labels=is_first,
    )  # fmt: skip
    y_scale = alt.Scale(domain=[-0.5, len(methods) - 0.5], reverse=True, nice=False, zero=False)
    y = lambda field: alt.Y(f"{field}:Q", title=None, axis=axis, scale=y_scale)
    title = "loss per token (lower to the right)" if task.lower_is_better else "exact match"
    x_scale = alt.Scale(zero=False, nice=False, padding=6, reverse=task.lower_is_better)
    x = lambda field: alt.X(f"{field}:Q", title=title, scale=x_scale, axis=alt.Axis(tickCount=5, grid=False))
    records = [
        {
            "place": methods.index(row.method) + (i - (len(sizes) - 1) / 2) * step, "size": sizes[i],
            "recovery": recovery(steps), "value": score.value, "low": score.low, "high": score.high,
        }
        for i, size in enumerate(summary.sizes)
        for row in size.methods
        for steps, measured in row.measurements.items()
        if (score := measured.scores.get(task.name)) is not None
    ]  # fmt: skip
    known = [recovery(steps) for steps in summary.recover_steps]
    colour = alt.Color(
        "size:N", title=None, legend=alt.Legend(orient="bottom"),
        scale=alt.Scale(domain=sizes, range=[BRIGHT[i % len(BRIGHT)] for i in range(len(sizes))]),
    )  # fmt: skip
    shape = alt.Shape(
        "size:N", title=None, legend=alt.Legend(orient="bottom"),
        scale=alt.Scale(domain=sizes, range=[SHAPES[i % len(SHAPES)] for i in range(len(sizes))]),
    )  # fmt: skip
    filled = alt.FillOpacity(
        "recovery:N", title=None, legend=alt.Legend(orient="bottom") if len(known) > 1 else None,
        scale=alt.Scale(domain=known, range=[filling(summary, steps) for steps in summary.recover_steps]),
    )  # fmt: skip
    base = alt.Chart(pd.DataFrame(records, columns=pd.Index(["place", "size", "recovery", "value", "low", "high"])))
    bands = pd.DataFrame({"from": np.arange(0, len(methods), 2) - 0.5, "to": np.arange(0, len(methods), 2) + 0.5})
    layers = [
        alt.Chart(bands).mark_rect(color=PALE).encode(y=y("from"), y2="to:Q"),
        *task_references(summary, task, x),
        base.mark_rule(opacity=0.75, strokeWidth=1.1).encode(x=x("low"), x2="high:Q", y=y("place"), color=colour),
        base.mark_point(size=26, strokeWidth=1, opacity=1).encode(
            x=x("value"), y=y("place"), color=colour, fill=colour_of_fill(colour), shape=shape, fillOpacity=filled
        ),
    ]
    height = max(14, 6 * len(sizes)) * len(methods)
    name = next(iter(short_texts([task.name]).values()))
    return alt.layer(*layers).properties(width=width, height=height, title=name)


def colour_of_fill(colour: alt.Color) -> alt.Fill:
    """The same colour inside; the outline's legend stands for both."""
    return alt.Fill(colour["shorthand"], title=None, scale=colour["scale"], legend=None)


def task_references(summary: Summary, task: Task, x: Callable) -> list[alt.Chart]:
    """Vertical lines of the references, a band around the full model, and the share of the most frequent answer."""
    found = references(summary, summary.recover_steps[-1], task=task.name)
    named = short_texts(row.method for size in summary.sizes for row in size.rows if row.is_reference)
    records = [
        {"reference": named[row.method], "value": score.value, "low": score.low, "high": score.high,
         "band": row.method == FULL}
        for row, score in found
    ]  # fmt: skip
    layers = []
    if records:
        rows = {row.method: row for size in summary.sizes for row in size.rows if row.is_reference}
        dash = alt.StrokeDash(
            "reference:N", title=None, legend=alt.Legend(orient="bottom"),
            scale=alt.Scale(domain=list(named.values()), range=[dashes(rows[method]) for method in named]),
        )  # fmt: skip
        base = alt.Chart(pd.DataFrame(records))
        full = base.transform_filter("datum.band").mark_rect(color=GREY, opacity=0.14)
        layers = [
            full.encode(x=x("low"), x2="high:Q"),
            base.mark_rule(color=DARK).encode(x=x("value"), strokeDash=dash),
        ]
    if task.majority_share is not None:
        share = alt.Chart(pd.DataFrame({"value": [task.majority_share]}))
        layers.append(share.mark_rule(color=GREY, strokeDash=DOT_DASHED).encode(x=x("value")))
    return layers


def layer_loss(summary: Summary) -> Drawn | None:
    """Heat map of the loss added by each layer alone, methods by layers, one panel per size; None if not measured.

    Colours follow the square root of the loss, so that small ones are told apart; light is no change.
    """
    sizes = [size for size in summary.sizes if any(row.layer_loss for row in size.rows)]
    if not sizes:
        return None
    rows = [row for size in sizes for row in size.rows if row.layer_loss]
    measured = dict.fromkeys(row.method for row in rows)
    methods = [method for method in standing(summary) if method in measured]
    methods += [method for method in measured if method not in methods]  # references
    short, layers = short_texts(methods), short_names(list(dict.fromkeys(n for row in rows for n in row.layer_loss)))
    limit = max(1e-6, *(abs(loss) for row in rows for loss in row.layer_loss.values()))
    columns = len(sizes) if len(sizes) * len(layers) <= MAX_CELLS else 1
    cell = max(MAP_WIDTH / columns / len(layers), 14)
    charts = []
    for i, size in enumerate(sizes):
        records = [
            {"method": short[row.method], "layer": layers[name], "loss": loss,
             "colour": float(np.sign(loss) * np.sqrt(abs(loss) / limit))}
            for row in size.rows
            for name, loss in row.layer_loss.items()
        ]  # fmt: skip
        chart = heat_map(records, [short[m] for m in methods], list(layers.values()), limit=limit, cell=cell,
                         is_first=i % columns == 0)  # fmt: skip
        charts.append(chart.properties(title=size.title))
    return (
        alt.concat(*charts, columns=columns, spacing=18).resolve_scale(color="shared"),
        "One layer compressed at a time",
        "Loss per token above the full model with only this layer compressed, mean over seeds; grey was not measured.",
    )


def heat_map(
    records: list[dict], methods: list[str], layers: list[str], *, limit: float, cell: float, is_first: bool
) -> alt.LayerChart:
    """Cells with their numbers where there is room."""
    is_tight = LETTER * max(map(len, layers)) > cell
    x = alt.X("layer:N", title=None, scale=alt.Scale(domain=layers), axis=alt.Axis(labelAngle=-60 if is_tight else 0))
    axis = alt.Axis(ticks=False, domain=False, labels=is_first)
    y = alt.Y("method:N", title=None, scale=alt.Scale(domain=methods), axis=axis)
    legend = alt.Legend(
        title="loss above the full model", orient="bottom", gradientLength=300, titleLimit=400,
        values=[-1, -0.5, 0, 0.5, 1], labelExpr=f"format(datum.value * abs(datum.value) * {limit}, '+.2~g')",
    )  # fmt: skip
    colour = alt.Color("colour:Q", scale=alt.Scale(domain=[-1, 0, 1], range=list(DIVERGING)), legend=legend)
    base = alt.Chart(pd.DataFrame(records)).encode(x=x, y=y)
    parts = [base.mark_rect().encode(color=colour)]
    if cell > 36:
        text = "format(datum.loss, abs(datum.loss) < 0.01 ? '+.4f' : '+.3f')"
        parts.append(
            base.transform_calculate(text=text).mark_text(fontSize=10).encode(
                text="text:N", color=alt.condition("abs(datum.colour) > 0.8", alt.value("white"), alt.value("black"))
            )
        )  # fmt: skip
    size = {"width": cell * len(layers), "height": (LINE + 5) * len(methods)}
    return alt.layer(*parts).properties(view=alt.ViewBackground(fill=BLANK), **size)


def short_texts(names: Iterable[str]) -> dict[str, str]:
    """Names -> labels on one line that tell them apart."""
    once = list(dict.fromkeys(names))
    return dict(zip(once, distinct([" ".join(name.split()) for name in once], MAX_NAME), strict=True))


def recovery(steps: int) -> str:
    return f"{steps:,} steps of recovery" if steps else "without training"


def filling(summary: Summary, steps: int) -> float:
    """How full a marker is: hollow for the fewest recovery steps of several, full for the most."""
    last = len(summary.recover_steps) - 1
    return summary.recover_steps.index(steps) / last if last else 1.0


def assign_looks(methods: Sequence[str]) -> dict[str, Look]:
    """Colour, shape and line of methods given from the best to the worst."""
    num_coloured = len(methods) if len(methods) <= MAX_COLOURED else len(BRIGHT)
    looks = {}
    for i, method in enumerate(methods):
        if i < num_coloured:
            dash = () if i < len(BRIGHT) else (5, 3)
            looks[method] = Look(BRIGHT[i % len(BRIGHT)], SHAPES[i], dash, is_coloured=True)
        else:
            looks[method] = Look(GREY, "circle", (), is_coloured=False)
    return looks


def dashes(row: Row) -> list[int]:
    return DASHED if row.method == FULL else DOTTED


FIGURES: dict[str, Callable[[Summary], Drawn | None]] = {"pareto": pareto, "tasks": tasks, "layer_loss": layer_loss}
