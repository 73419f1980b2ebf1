"""Quality beside size: what scores and stored bytes of checkpoints are together, or how to get the scores."""

from collections.abc import Sequence

import altair as alt
import pandas as pd
from msmoe.analysis.report.artefacts import Artefacts, Comparison
from msmoe.analysis.report.charts import COLOURS
from msmoe.analysis.report.document import Block, Column, Figure, Table, shorten
from msmoe.analysis.report.sections.comparison.evaluations import (
    MAX_CHECKPOINTS,
    SHAPES,
    evaluation_frame,
    main_metrics,
    metric_title,
)
from msmoe.analysis.report.sections.comparison.looks import controls

from msmoe.comparison.summary import FULL, Row, Size
from msmoe.comparison.summary import Column as Measure
from msmoe.units import human_bytes

MAX_TASKS = 8  # columns of the table
HEIGHT = 240  # pixels
BYTES = "format(datum.value, '.3~s') + 'B'"


def quality(artefacts: Artefacts) -> tuple[str, list[Block]]:
    """The finding in a sentence, and what shows it: evaluations, else the best methods of the first comparison."""
    frame = quality_frame(artefacts)
    if len(frame):
        figures = [quality_figure(frame)] if frame["bytes"].notna().any() else []
        return lead(frame), [*figures, quality_table(frame)]
    tables = [best_table(item) for item in artefacts.comparisons[:1]]
    return "", [table for table in tables if table is not None]


def quality_frame(artefacts: Artefacts) -> pd.DataFrame:
    """One row per evaluated checkpoint and task, by the task's first metric, the largest checkpoint first.

    `share` is of the bytes of the original where it is known, else of the largest checkpoint.
    """
    frame = evaluation_frame(artefacts.evaluations)
    if frame.empty:
        return frame
    frame = frame[frame.metric == main_metrics(frame).reindex(frame.task).to_numpy()]
    stored = frame["bytes"].astype(float)
    whole = artefacts.original.summary.num_bytes if artefacts.original else stored.max()
    frame = frame.assign(bytes=stored, share=stored / whole)
    order: pd.DataFrame = frame.sort_values("bytes", ascending=False, kind="stable")
    return order.reset_index(drop=True)


def lead(frame: pd.DataFrame) -> str:
    """The smallest checkpoint beside the largest, on the tasks that both were scored on by shares."""
    sizes = frame.drop_duplicates("checkpoint").dropna(subset=["bytes"])
    if len(sizes) < 2:
        return ""
    largest, smallest = sizes.iloc[0], sizes.iloc[-1]
    table = frame[frame.metric != "loss"].drop_duplicates(["checkpoint", "task"])
    wide = table.pivot(index="task", columns="checkpoint", values="value")
    names = [smallest.checkpoint, largest.checkpoint]
    size = (
        f"{smallest.checkpoint} stores {human_bytes(int(smallest['bytes']))}, {smallest['share']:.0%} of the original"
    )
    both = wide.reindex(columns=names).dropna()
    if both.empty:
        return f"{size}."
    own, other = both.mean()
    tasks = f"over {len(both)} tasks" if len(both) > 1 else f"on {both.index[0]}"
    return f"{size}, and scores {own:.3f} where {largest.checkpoint} scores {other:.3f} (mean {tasks})."


def quality_figure(frame: pd.DataFrame) -> Figure:
    """Score against stored bytes, a task at a time."""
    checkpoints = list(dict.fromkeys(frame.checkpoint))[:MAX_CHECKPOINTS]
    shown = frame.loc[frame.checkpoint.isin(checkpoints) & frame["bytes"].notna()]
    shown = shown[["checkpoint", "task", "metric", "value", "low", "high", "text", "bytes", "share"]]
    tasks = list(dict.fromkeys(shown.task))
    titles = [f"{t} ({metric_title(shown.metric[shown.task == t].iloc[0])})" for t in tasks]
    params, chosen = controls(("task", "Task", tasks, titles))
    colours = alt.Scale(domain=checkpoints, range=[COLOURS[i % len(COLOURS)] for i in range(len(checkpoints))])
    shapes = alt.Scale(domain=checkpoints, range=[SHAPES[i % len(SHAPES)] for i in range(len(checkpoints))])
    legend = alt.Legend(orient="top", title=None, columns=2, symbolOpacity=1)
    tooltip = [
        alt.Tooltip("checkpoint:N"), alt.Tooltip("text:N", title="score, 95 % interval"),
        alt.Tooltip("bytes:Q", title="stored bytes", format=","),
        alt.Tooltip("share:Q", title="of the original", format=".1%"),
    ]  # fmt: skip
    room = alt.Scale(domain=[0, 1.1 * float(shown["bytes"].max())], nice=False)
    base = alt.Chart(shown).encode(
        x=alt.X("bytes:Q", title="stored bytes", scale=room, axis=alt.Axis(labelExpr=BYTES, tickCount=5)),
        color=alt.Color("checkpoint:N", scale=colours, legend=legend),
        tooltip=tooltip,
    )
    rules = base.mark_rule(strokeWidth=2, opacity=0.6).encode(y=alt.Y("low:Q", title="score"), y2="high:Q")
    points = base.mark_point(filled=True, size=90, opacity=1).encode(
        y=alt.Y("value:Q", title="score", scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=6)),
        shape=alt.Shape("checkpoint:N", scale=shapes, legend=legend),
    )
    return Figure(
        "glance-quality-size",
        "Quality beside size",
        "Score of every evaluated checkpoint against its bytes on disk, with the 95 % interval over examples: left is "
        "smaller; up is better, but down for losses. Look for the checkpoint farthest left that has not fallen.",
        (rules + points).transform_filter(chosen).add_params(*params).properties(width="container", height=HEIGHT),
    )


def quality_table(frame: pd.DataFrame) -> Table:
    """One row per checkpoint, tasks side by side."""
    tasks = list(dict.fromkeys(frame.task))[:MAX_TASKS]
    rows = []
    for name, own in frame.groupby("checkpoint", sort=False):
        scores = own.drop_duplicates("task").set_index("task")
        row = {"checkpoint": name, "bytes": own["bytes"].iloc[0], "share": own["share"].iloc[0]}
        for i, task in enumerate(tasks):
            known = task in scores.index
            row |= {f"text {i}": scores.text[task] if known else None}
            row |= {f"value {i}": scores.value[task] if known else None}
        rows.append(row)
    metric = {task: metric_title(frame.metric[frame.task == task].iloc[0]) for task in tasks}
    return Table(
        "glance-quality",
        "Scores",
        "One row per evaluated checkpoint, the largest first; scores with 95 % intervals over examples."
        + (
            f" The first {MAX_TASKS} tasks; all are in the chapter Comparison."
            if frame.task.nunique() > MAX_TASKS
            else ""
        )
        + (LOSS_NOTE if "loss" in set(frame.metric) else ""),
        pd.DataFrame(rows),
        (
            Column("checkpoint", "checkpoint"),
            Column("bytes", "stored", "bytes"),
            Column("share", "of the original", "share"),
            *(Column(f"text {i}", f"{shorten(task)}, {metric[task]}", by=f"value {i}") for i, task in enumerate(tasks)),
        ),
        is_essential=True,
    )


LOSS_NOTE = (
    " A loss can be lower than the original's: recovery trains on text, and a checkpoint that saw more text of a kind "
    "predicts it better, whatever became of its answers."
)


def best_table(item: Comparison) -> Table | None:
    """The full model, and at each size the best method; None without any mean."""
    summary = item.summary
    column = Measure("mean", summary.mean_title, None, summary.recover_steps[0])
    rows = [
        best_record(row, size, column, summary.num_bytes)
        for place, size in enumerate(summary.sizes)
        for row in [*full_rows(size.rows if place == 0 else ()), *best_rows(size, column)]
    ]
    if not rows:
        return None
    return Table(
        "glance-quality",
        "Quality beside size",
        f"The full model, and the method with the best {summary.mean_title} at each size of {item.label}; all methods "
        "are in the chapter Comparison.",
        pd.DataFrame(rows),
        (
            Column("method", "method"),
            Column("size", "size", "number", "experts per layer that the methods were given the bytes of"),
            Column("bytes", "stored", "bytes"),
            Column("share", "of the original", "share"),
            Column("text", summary.mean_title, by="value"),
            Column("seeds", "seeds", "integer"),
        ),
        is_essential=True,
    )


def full_rows(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.method == FULL]


def best_rows(size: Size, column: Measure) -> list[Row]:
    return [row for row in size.methods if (score := row.score(column)) and score.is_best]


def best_record(row: Row, size: Size, column: Measure, original: int) -> dict[str, object]:
    score = row.score(column)
    return {
        "method": shorten(row.method),
        "size": row.average_kept if row.method == FULL else size.experts,
        "bytes": row.num_bytes,
        "share": row.num_bytes / original if original else None,
        "text": row.cell(column).text,
        "value": score.value if score else None,
        "seeds": row.num_seeds,
    }
