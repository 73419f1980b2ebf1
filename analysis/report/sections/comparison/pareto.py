"""Mean score against stored bytes: every method, the front, references."""

import json
from collections.abc import Callable, Sequence
from typing import Any, Literal

import altair as alt
import numpy as np
import pandas as pd
from msmoe.analysis.comparison_points import SAME_BYTES, Point, pareto_front, points, references, spread, value_range
from msmoe.analysis.report.charts import GREY, ORANGE
from msmoe.analysis.report.document import Figure
from msmoe.analysis.report.sections.comparison.looks import controls, kind_of, kind_scales, short_texts, steps_control

from msmoe.comparison.summary import Row, Summary, count
from msmoe.units import human_bytes

Channel = Callable[[str], Any]  # field -> its channel on a shared axis
HEIGHT, LINE = 440, 15  # pixels: of the chart, of a label
STRIP = 0.16  # share of the width that is left free for the names of references
SIDES: tuple[tuple[str, Literal["left", "right"]], ...] = (("<=", "left"), (">", "right"))  # of the middle -> names
DIM = 0.12  # opacity of what is not picked
TOOLTIP = [
    alt.Tooltip("method:N"), alt.Tooltip("kind:N"), alt.Tooltip("experts:N", title="experts per layer"),
    alt.Tooltip("stored:N", title="stored"), alt.Tooltip("text:N", title="mean, 95 % interval"),
    alt.Tooltip("rank:Q", format=".1f"), alt.Tooltip("seeds:N"),
]  # fmt: skip


def pareto_figure(summary: Summary, name: str) -> Figure | None:
    """None without any mean."""
    frame = method_frame(summary)
    if frame.empty:
        return None
    pick = pick_control(frame)
    kinds = alt.selection_point(name="of_kind", fields=["kind"], bind="legend")
    params, chosen = controls(steps_control(summary))
    x, y = axes(summary, frame)
    layers = [
        *reference_layers(summary, y),
        *method_layers(frame, x, y, pick, kinds),
        *front_layers(frame, x, y),
    ]
    chart = alt.layer(*[layer.transform_filter(chosen) for layer in layers])
    metric = "loss per token, lower is better, drawn upwards" if summary.mean_metric == "loss" else "exact match"
    return Figure(
        name,
        "Score against size",
        f"Mean over {count(len(summary.mean_tasks), 'task')} ({metric}) of every method against its stored bytes, with "
        "95 % intervals; orange is the Pareto front: no model scores more without more bytes (differences under "
        f"{SAME_BYTES:.0%} count as equal). Methods of one size stand side by side, the best on the right; click a "
        "point or a kind to pick it out, twice to let go.",
        chart.add_params(*params).properties(width="container", height=HEIGHT),
    )


def method_frame(summary: Summary) -> pd.DataFrame:
    """One row per method, size and recovery; `label` is the height of its name if it is on the front."""
    rows = {(row.method, i): row for i, size in enumerate(summary.sizes) for row in size.methods}
    short = short_texts(method for method, _ in rows)
    ids = {method: str(i) for i, method in enumerate(short)}
    records = []
    for steps in summary.recover_steps:
        found = points(summary, steps)
        front = pareto_front(found, lower_is_better=summary.mean_metric == "loss")
        for point in found:
            row = rows[point.method, point.size]
            place = {"id": ids[row.method], "method": short[row.method], "steps": str(steps)}
            records.append(place | point_record(summary, point, row, steps) | {"front": point in front})
    frame = pd.DataFrame(records)
    return frame if frame.empty else frame.assign(label=label_heights(summary, frame))


def point_record(summary: Summary, point: Point, row: Row, steps: int) -> dict[str, object]:
    measured = row.measurements[steps]
    return {
        "kind": kind_of(row),
        "experts": f"{summary.sizes[point.size].experts:g}",
        "x": point.x,
        "bytes": point.num_bytes,
        "stored": human_bytes(point.num_bytes),
        "score": point.score.value,
        "low": point.score.low,
        "high": point.score.high,
        "text": f"{point.score.with_interval} {point.score.marks}".strip(),
        "rank": measured.rank,
        "seeds": len(measured.seeds),
    }


def label_heights(summary: Summary, frame: pd.DataFrame) -> pd.Series:
    """Scores at which the names on the front stand: above the interval, and clear of each other."""
    bottom, top = score_domain(summary)
    upper = frame.low if summary.mean_metric == "loss" else frame.high
    wanted = (upper - bottom) / (top - bottom) + 0.6 * LINE / HEIGHT
    heights = pd.Series(np.nan, index=frame.index)
    for _, part in frame[frame.front].groupby("steps"):
        heights[part.index] = bottom + spread(wanted[part.index].to_numpy(), LINE / HEIGHT) * (top - bottom)
    return heights


def score_domain(summary: Summary) -> tuple[float, float]:
    """Scores at the bottom and the top."""
    scores = [point.score for steps in summary.recover_steps for point in points(summary, steps)]
    low, high = value_range(summary, scores)
    return (high, low) if summary.mean_metric == "loss" else (low, high)


def byte_domain(frame: pd.DataFrame) -> tuple[float, float]:
    """Bytes at the left and the right, with room on the left for names."""
    first, last = np.log10(frame.x.min()), np.log10(frame.x.max())
    margin = max(0.04 * (last - first), 0.01)
    reach = (last - first + 2 * margin) / (1 - STRIP)
    return float(10 ** (last + margin - reach)), float(10 ** (last + margin))


def axes(summary: Summary, frame: pd.DataFrame) -> tuple[Channel, Channel]:
    """Channels of a field in bytes, and of one in scores."""
    places = frame.groupby("experts", sort=False).bytes.median().round().astype(int)
    sizes = json.dumps({str(place): f"{experts} experts" for experts, place in places.items()})
    text = f"[format(datum.value / 1e6, ',.3~r') + ' MB', {sizes}[datum.value]]"
    x_axis = alt.Axis(values=sorted(set(places)), labelExpr=text, labelOverlap=True, grid=False)
    x_scale = alt.Scale(type="log", domain=byte_domain(frame), nice=False)
    bottom, top = score_domain(summary)
    y_scale = alt.Scale(domain=sorted((bottom, top)), reverse=bottom > top, nice=False, zero=False)
    y_title = f"{summary.mean_title} of {count(len(summary.mean_tasks), 'task')}"
    return (
        lambda field: alt.X(
            f"{field}:Q", title="stored bytes (log scale), methods of one size side by side", axis=x_axis, scale=x_scale
        ),
        lambda field: alt.Y(f"{field}:Q", title=y_title, scale=y_scale, axis=alt.Axis(tickCount=8)),
    )


def pick_control(frame: pd.DataFrame) -> alt.Parameter:
    """A list of the methods; a click on a point picks too."""
    names = dict(zip(frame["id"], frame.method, strict=True))
    order = sorted(names, key=lambda key: names[key].lower())
    options = alt.binding_select(
        options=[None, *order], labels=["all", *[names[key] for key in order]], name="Method: "
    )
    on_point = "event.item && event.item.datum && isValid(event.item.datum.id)"  # the legend has data too
    click: Any = {"source": "view", "type": "click", "filter": on_point}
    return alt.selection_point(name="pick", fields=["id"], bind=options, on=click, clear="dblclick")


def method_layers(
    frame: pd.DataFrame, x: Channel, y: Channel, pick: alt.Parameter, kinds: alt.Parameter
) -> Sequence[alt.Chart]:
    """Intervals, points, and what is picked: a line through its sizes, its name and scores."""
    colours, shapes = kind_scales(frame.kind)
    legend = alt.Legend(orient="top", title=None, symbolOpacity=1)
    colour = alt.Color("kind:N", scale=colours, legend=legend)
    shape = alt.Shape("kind:N", scale=shapes, legend=legend)
    base = alt.Chart(frame).encode(x=x("x"), color=colour)
    seen = pick & kinds
    picked = base.transform_filter(alt.ParameterPredicate(param="pick", empty=False))
    return (
        base.mark_rule(strokeWidth=1).encode(
            y=y("low"), y2="high:Q", opacity=alt.condition(seen, alt.value(0.4), alt.value(DIM))
        ),
        picked.mark_line(strokeWidth=1.5).encode(y=y("score")),
        base.mark_point(filled=True, size=56)
        .encode(y=y("score"), shape=shape, tooltip=TOOLTIP, opacity=alt.condition(seen, alt.value(1), alt.value(DIM)))
        .add_params(pick, kinds),
        picked.mark_text(dy=14, fontWeight="bold").encode(y=y("score"), text=alt.Text("score:Q", format=".3f")),
    )


def front_layers(frame: pd.DataFrame, x: Channel, y: Channel) -> list[alt.Chart]:
    """The front as steps, a ring around its points, and their names: towards the middle, so that none is cut off."""
    base = alt.Chart(frame).transform_filter("datum.front").encode(x=x("x"))
    left, right = byte_domain(frame)
    middle = left**0.4 * right**0.6
    names = [
        base.transform_filter(f"datum.x {side} {middle}")
        .mark_text(align=align, dx=-8 if align == "left" else 8, fontWeight="bold")
        .encode(y=y("label"), text="method:N")
        for side, align in SIDES
    ]
    line = base.mark_line(interpolate="step-after", color=ORANGE, strokeWidth=1.5).encode(y=y("score"), order="bytes:Q")
    ring = base.mark_point(size=150, color=ORANGE, strokeWidth=2).encode(y=y("score"), tooltip=TOOLTIP)
    return [line, ring, *names]


def reference_frame(summary: Summary) -> pd.DataFrame:
    """One row per reference and recovery; the full model stands for itself untrained where it was not trained."""
    records = []
    bottom, top = score_domain(summary)
    for steps in summary.recover_steps:
        found = references(summary, steps)
        short = short_texts((row.method for row, _ in found), 18)
        wanted = [(score.value - bottom) / (top - bottom) + 0.5 * LINE / HEIGHT for _, score in found]
        for (row, score), height in zip(found, spread(wanted, LINE / HEIGHT), strict=True):
            untrained = "" if steps in row.measurements else ", untrained"
            records.append(
                {
                    "method": short[row.method],
                    "name": f"{short[row.method]} {score.value:.3f}{untrained}",
                    "steps": str(steps),
                    "score": score.value,
                    "low": score.low,
                    "high": score.high,
                    "label": bottom + height * (top - bottom),
                    "stored": human_bytes(row.num_bytes),
                    "text": score.with_interval,
                }
            )
    return pd.DataFrame(records)


def reference_layers(summary: Summary, y: Channel) -> list[alt.Chart]:
    """Rules with their interval as a band, named on the left."""
    frame = reference_frame(summary)
    if frame.empty:
        return []
    tooltip = [
        alt.Tooltip("method:N", title="reference"), alt.Tooltip("stored:N"),
        alt.Tooltip("text:N", title="mean, 95 % interval"),
    ]  # fmt: skip
    base = alt.Chart(frame).encode(tooltip=tooltip)
    return [
        base.mark_rect(color=GREY, opacity=0.13).encode(y=y("low"), y2="high:Q"),
        base.mark_rule(color=GREY, strokeDash=[6, 4], strokeWidth=1.5).encode(y=y("score")),
        base.mark_text(align="left").encode(x=alt.value(4), y=y("label"), text="name:N"),
    ]
