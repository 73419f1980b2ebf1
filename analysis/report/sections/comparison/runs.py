"""Two comparisons side by side: how scores and bytes changed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import pandas as pd
from msmoe.analysis.report.artefacts import Comparison
from msmoe.analysis.report.charts import BLUE, GREY, ORANGE
from msmoe.analysis.report.document import Block, Column, Figure, Note, Table, shorten
from msmoe.analysis.report.sections.comparison.looks import MAX_METHODS, controls, short_texts
from msmoe.analysis.report.sections.comparison.settings import Labels, only_in_one, setting_frame, setting_table

from msmoe.comparison.reading import read
from msmoe.comparison.scoring import resample
from msmoe.comparison.summary import Summary, Task, count
from msmoe.units import human_bytes

ROW = 22  # pixels
NAME = 80  # characters of names and values in tables
MAX_LISTED = 12  # names in a sentence
OVERLAP, APART = "overlap", "apart"
Key = tuple[str, float | None, int]  # method, size, recovery steps


@dataclass(frozen=True)
class Mean:
    """A method's score in one run: its mean over tasks with the 95 % interval over examples and seeds."""

    value: float
    low: float
    high: float
    num_bytes: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def run_blocks(first: Comparison, second: Comparison, labels: Labels, suffix: str) -> list[Block]:
    """What changed from the first to the second."""
    title = f"{labels[0]} and {labels[1]}"
    notes = [Note(text) for text in only_in_one(first.content, second.content, labels)]
    settings = setting_frame(first.content, second.content)
    blocks: list[Block] = [*notes]
    if len(settings):
        blocks.append(setting_table(settings, labels, f"comparison-settings{suffix}", title))
    tasks = shared_tasks(first.summary, second.summary)
    frame = run_frame(means(first.content, tasks), means(second.content, tasks), tasks) if tasks else pd.DataFrame()
    if frame.empty:
        return [*blocks, Note(f"{title} share no task, or no method at the same size: their scores are not compared.")]
    figure = run_figure(frame, tasks, labels, f"comparison-runs{suffix}", title)
    return [*blocks, Note(overlap_text(frame, tasks, labels)), figure,
            run_table(frame, labels, f"comparison-run-table{suffix}", title)]  # fmt: skip


def shared_tasks(first: Summary, second: Summary) -> list[Task]:
    """Tasks that both have with the same metric: those scored by exact match, or all if there are none."""
    metrics = {task.name: task.metric for task in first.tasks}
    shared = [task for task in second.tasks if metrics.get(task.name) == task.metric]
    return [task for task in shared if not task.lower_is_better] or shared


def means(content: Mapping, tasks: Sequence[Task]) -> dict[Key, Mean]:
    """Mean over tasks of every method at every size; references are keyed by their name alone."""
    names = {task.name for task in tasks}
    cells = [cell | {"tasks": {t: v for t, v in cell["tasks"].items() if t in names}} for cell in content["cells"]]
    kept = {name: entry for name, entry in content["tasks"].items() if name in names}
    comparison = read({**content, "tasks": kept, "cells": cells})
    found = {}
    ascending = sorted(resample(comparison)[None].items(), key=lambda item: item[0][1])  # a reference's largest is last
    for (method, experts, steps), resampled in ascending:
        low, high = resampled.interval
        if not tasks[0].lower_is_better:
            low, high = max(low, 0.0), min(high, 1.0)
        size = None if comparison.is_reference(method) else experts
        stored = [run.num_bytes for run in comparison.groups[method, experts, steps]]
        found[method, size, steps] = Mean(resampled.value, low, high, round(sum(stored) / len(stored)))
    return found


def run_frame(first: Mapping[Key, Mean], second: Mapping[Key, Mean], tasks: Sequence[Task]) -> pd.DataFrame:
    """One row per method, size and recovery that both have; references have no size."""
    sign = -1 if tasks[0].lower_is_better else 1
    methods = short_texts((method for method, _, _ in first), NAME)
    records = []
    for key in (key for key in first if key in second):
        a, b = first[key], second[key]
        gain = sign * (b.value - a.value)
        records.append(
            {"method": methods[key[0]], "size": key[1], "steps": key[2], "gain": gain, "change": b.value - a.value}
            | {"change_text": f"{b.value - a.value:+.3f}"}
            | {"first": a.value, "first_low": a.low, "first_high": a.high, "first_text": str(a)}
            | {"second": b.value, "second_low": b.low, "second_high": b.high, "second_text": str(b)}
            | {"overlap": OVERLAP if a.low <= b.high and b.low <= a.high else APART}
            | {"first_bytes": a.num_bytes, "second_bytes": b.num_bytes, "bytes_change": b.num_bytes - a.num_bytes}
        )
    return pd.DataFrame(records)


def overlap_text(frame: pd.DataFrame, tasks: Sequence[Task], labels: Labels) -> str:
    """How many intervals overlap, and which do not: the largest changes first."""
    apart = [row for row in frame.to_dict("records") if row["overlap"] == APART]
    largest = sorted(apart, key=lambda row: -abs(row["change"]))[:MAX_LISTED]
    texts = [f"{row_name(row)} ({row['change_text']})" for row in largest]
    more = f" and {len(apart) - MAX_LISTED} more" if len(apart) > MAX_LISTED else ""
    which = f" Apart, with the change of the mean: {', '.join(texts)}{more}." if texts else ""
    return (
        f"On {count(len(tasks), 'shared task')}, the 95 % intervals of {labels[0]} and {labels[1]} "
        f"overlap for {len(frame) - len(apart)} of {len(frame)} pairs of a method, size and recovery.{which} This is "
        "no paired test: overlapping intervals may still differ, and with many pairs a few stand apart by chance."
    )


def row_name(row: Mapping[Any, Any]) -> str:
    size = "" if pd.isna(row["size"]) else f" at {row['size']:g}"
    return shorten(row["method"]) + size + (f" after {row['steps']} steps" if row["steps"] else "")


def run_table(frame: pd.DataFrame, labels: Labels, name: str, title: str) -> Table:
    order = frame.sort_values("gain", ascending=False, kind="stable")
    return Table(
        name,
        f"{title}: scores of both",
        "One row per method, size and recovery that both have, the largest gain first; references have no size. "
        "Changes are from the first run to the second.",
        order,
        (
            Column("method", "method"),
            Column("size", "size", "number", "experts per layer"),
            Column("steps", "recovery", "integer", "steps of training"),
            Column("first_text", labels[0], by="first"),
            Column("second_text", labels[1], by="second"),
            Column("change_text", "change", by="change"),
            Column("overlap", "intervals"),
            Column("first_bytes", f"stored, {labels[0]}", "bytes"),
            Column("second_bytes", f"stored, {labels[1]}", "bytes"),
            Column("bytes_change", "change of bytes", "bytes"),
        ),
    )


def run_figure(frame: pd.DataFrame, tasks: Sequence[Task], labels: Labels, name: str, title: str) -> Figure:
    """Dumbbells: a method's two scores, one above the other."""
    long = dumbbell_frame(frame, labels)
    sizes = [f"{size:g}" for size in sizes_of(frame)] or [""]
    steps = [str(n) for n in sorted(frame.steps.unique())]
    params, chosen = controls(
        ("size", "Experts per layer", sizes, sizes),
        ("steps", "Recovery", steps, [f"{n} steps" if n != "0" else "none" for n in steps]),
    )
    rows = max(len(part) for _, part in long.groupby(["size", "steps"])) // 2
    metric = "loss per token, lower is better" if tasks[0].lower_is_better else "exact match"
    return Figure(
        name,
        f"{title}: what changed",
        f"Mean over {count(len(tasks), 'shared task')} ({metric}) of every method in both runs, with 95 % "
        "intervals; the largest gain from the first to the second stands on top. A dashed link: the intervals overlap."
        + (f" The {MAX_METHODS} methods that changed most are drawn." if frame.method.nunique() > MAX_METHODS else ""),
        alt.layer(*dumbbells("mean loss" if tasks[0].lower_is_better else "mean", labels), data=long)
        .transform_filter(chosen)
        .add_params(*params)
        .properties(width="container", height=ROW * rows),
    )


def sizes_of(frame: pd.DataFrame) -> list[float]:
    """Sizes of methods, from the largest."""
    return sorted({float(size) for size in frame["size"] if not pd.isna(size)}, reverse=True)


def dumbbell_frame(frame: pd.DataFrame, labels: Labels) -> pd.DataFrame:
    """Two rows per pair, one for each run (0 and 1); references at every size."""
    most = frame.change.abs().groupby(frame.method).max().sort_values(ascending=False, kind="stable")
    shown = frame.loc[frame.method.isin(most.index[:MAX_METHODS])]
    is_reference = shown["size"].isna()
    parts = [shown.loc[is_reference | (shown["size"] == size)].assign(size=f"{size:g}") for size in sizes_of(shown)]
    placed = pd.concat(parts or [shown.assign(size="")], ignore_index=True)
    placed = placed.assign(method=placed.method.map(short_texts(placed.method)), steps=placed.steps.astype(str))
    runs = []
    for run, (own, other) in enumerate((("first", "second"), ("second", "first"))):
        names = {own: "value", f"{own}_low": "low", f"{own}_high": "high", f"{own}_text": "text", other: "other"}
        fields = ["method", "size", "steps", "gain", "change", "overlap", "stored", *names.values()]
        stored = placed[f"{own}_bytes"].map(human_bytes)
        runs.append(placed.rename(columns=names).assign(stored=stored)[fields].assign(run=run, label=labels[run]))
    return pd.concat(runs, ignore_index=True)


def dumbbells(title: str, labels: Labels) -> list[alt.Chart]:
    """Link, intervals, points; the data stand above the layers, so that all sort alike."""
    y = alt.Y("method:N", title=None, sort=alt.EncodingSortField("gain", op="max", order="descending"))
    tooltip = [
        alt.Tooltip("method:N"), alt.Tooltip("label:N", title="run"),
        alt.Tooltip("text:N", title=f"{title}, 95 % interval"),
        alt.Tooltip("stored:N"), alt.Tooltip("change:Q", format="+.4f"), alt.Tooltip("overlap:N", title="intervals"),
    ]  # fmt: skip
    scale, axis = alt.Scale(zero=False), alt.Axis(tickCount=8)
    dash = alt.StrokeDash("overlap:N", scale=alt.Scale(domain=[APART, OVERLAP], range=[[1, 0], [3, 3]]), legend=None)
    colour = alt.Color(
        "label:N",
        scale=alt.Scale(domain=list(labels), range=[BLUE, ORANGE]),
        legend=alt.Legend(orient="top", title=None, symbolOpacity=1),
    )
    shape = alt.Shape("label:N", scale=alt.Scale(domain=list(labels), range=["circle", "square"]))
    base = alt.Chart().encode(y=y, tooltip=tooltip)
    layers = [
        base.transform_filter("datum.run == 0")
        .mark_rule(stroke=GREY, strokeWidth=2)
        .encode(x=alt.X("value:Q", title=title), x2="other:Q", strokeDash=dash)
    ]
    for run, shift in ((0, -4), (1, 4)):
        own = base.transform_filter(f"datum.run == {run}").encode(color=colour)
        layers += [
            own.mark_rule(strokeWidth=1.5, opacity=0.6, yOffset=shift).encode(
                x=alt.X("low:Q", title=title), x2="high:Q"
            ),
            own.mark_point(filled=True, size=55, opacity=1, yOffset=shift).encode(
                x=alt.X("value:Q", title=title, scale=scale, axis=axis), shape=shape
            ),
        ]
    return layers
