"""Results of `msmoe evaluate`: checkpoints on tasks, side by side."""

from collections.abc import Mapping, Sequence

import altair as alt
import pandas as pd
from msmoe.analysis.report.artefacts import Evaluation
from msmoe.analysis.report.charts import COLOURS, GREY
from msmoe.analysis.report.document import Block, Column, Figure, Note, Table, shorten
from msmoe.analysis.report.sections.comparison.looks import MAX_NAME, controls, short_texts

METRICS = {
    "exact_match": "exact match", "accuracy": "accuracy", "macro_f1": "macro F1", "loss": "loss per token",
}  # fmt: skip
SHARES = ("exact_match", "accuracy")  # that the share of the most frequent answer can be compared with
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left")
MAX_CHECKPOINTS, MAX_TASKS = 12, 30  # in the chart
ROW = 15  # pixels of a checkpoint in a task


def evaluation_blocks(evaluations: Sequence[Evaluation]) -> list[Block]:
    frame = evaluation_frame(evaluations)
    if frame.empty:
        return [Note("The results of `msmoe evaluate` hold no record.")]
    return [evaluation_figure(frame), evaluation_table(frame)]


def evaluation_frame(evaluations: Sequence[Evaluation]) -> pd.DataFrame:
    """One row per checkpoint, task and metric."""
    records = [
        (i, item.label, record)
        for i, item in enumerate(evaluations)
        for found in item.records
        for record in metric_records(found)
    ]
    frame = pd.DataFrame([{"file": i, "label": label} | record for i, label, record in records])
    if frame.empty:
        return frame
    return frame.assign(checkpoint=checkpoint_labels(frame), task=frame.task.map(short_texts(frame.task, 40)))


def metric_records(found: Mapping) -> list[dict[str, object]]:
    """The metrics of a record of `results.json`."""
    shared = {
        "checkpoint": str(found["checkpoint"]),
        "task": str(found["task"]),
        "majority": found["majority_share"],
        "parameters": found["num_parameters"],
        "bytes": found["bytes"],
        "flops": found["flops_per_token"],
        "seconds": found["seconds"],
        "memory": found["peak_memory_bytes"],
    }
    records = []
    for metric, estimate in found["metrics"].items():
        low, high = estimate["ci95"]
        value = float(estimate["value"])
        numbers = {"value": value, "low": float(low), "high": float(high), "examples": int(estimate["num_examples"])}
        text = f"{value:.3f} [{low:.3f}, {high:.3f}]"
        records.append(shared | {"metric": metric, "text": text} | numbers)
    return records


def checkpoint_labels(frame: pd.DataFrame) -> pd.Series:
    """Names of checkpoints, with the file where the same name stands in two."""
    twice = frame.groupby("checkpoint").file.nunique()
    names = [
        (checkpoint, f"{label}: {checkpoint}" if twice[checkpoint] > 1 else checkpoint, file)
        for checkpoint, label, file in zip(frame.checkpoint, frame.label, frame.file, strict=True)
    ]
    numbered = {(name, file): None for _, name, file in names}
    repeated = [name for name, _ in numbered]
    unique = [f"{name} ({file + 1})" if repeated.count(name) > 1 else name for _, name, file in names]
    return pd.Series(unique, index=frame.index).map(short_texts(unique, 40))


def evaluation_lead(evaluations: Sequence[Evaluation]) -> str:
    """On how many tasks the intervals of all checkpoints overlap."""
    frame = evaluation_frame(evaluations)
    if frame.empty:
        return ""
    main = frame[frame.metric == main_metrics(frame).reindex(frame.task).to_numpy()]
    names, tasks = list(dict.fromkeys(main.checkpoint)), main.task.nunique()
    if len(names) == 1:
        return f"{names[0]} was evaluated on {tasks} task{'s' if tasks > 1 else ''}."
    shared = [part for _, part in main.groupby("task") if len(part) == len(names)]
    apart = sum(part.low.max() > part.high.min() for part in shared)
    overlap = (
        f"on {apart} of these some 95 % intervals do not overlap" if apart else "on all of these the intervals overlap"
    )
    return f"{len(names)} checkpoints were evaluated, {len(shared)} of {tasks} tasks with all of them; {overlap}."


def main_metrics(frame: pd.DataFrame) -> pd.Series:
    """Task -> the first metric of `METRICS` that it was scored by, or another one."""
    order = {metric: i for i, metric in enumerate(METRICS)}
    ranked = frame.assign(order=frame.metric.map(order).fillna(len(order))).sort_values("order", kind="stable")
    return ranked.drop_duplicates("task").set_index("task").metric


def evaluation_figure(frame: pd.DataFrame) -> Figure:
    """Dots with intervals: checkpoints beside each other in every task."""
    checkpoints, tasks = list(dict.fromkeys(frame.checkpoint)), list(dict.fromkeys(frame.task))
    is_shown = frame.checkpoint.isin(checkpoints[:MAX_CHECKPOINTS]) & frame.task.isin(tasks[:MAX_TASKS])
    checkpoints, tasks = checkpoints[:MAX_CHECKPOINTS], tasks[:MAX_TASKS]
    fields = ["task", "checkpoint", "metric", "value", "low", "high", "text", "majority", "examples"]
    shown = frame.loc[is_shown, fields].assign(majority=frame.majority.where(frame.metric.isin(SHARES)).astype(float))
    metrics = [metric for metric in dict.fromkeys((*METRICS, *shown.metric)) if metric in set(shown.metric)]
    params, chosen = controls(("metric", "Metric", metrics, [metric_title(m) for m in metrics]))
    left_out = (
        "" if len(shown) == len(frame) else f" The first {MAX_CHECKPOINTS} checkpoints and {MAX_TASKS} tasks are drawn."
    )
    chart = alt.layer(*evaluation_layers(shown, checkpoints, tasks), data=shown)
    return Figure(
        "comparison-evaluations",
        "Checkpoints on tasks",
        "Score of every checkpoint on every task with its 95 % interval over examples; the grey tick is the share of "
        "the most frequent answer, which a model that always says the same would reach. Overlapping intervals may "
        f"still differ: `msmoe compare` tests that example by example.{left_out}",
        chart.transform_filter(chosen)
        .add_params(*params)
        .properties(width="container", height=len(tasks) * (ROW * len(checkpoints) + 14)),
    )


def evaluation_layers(frame: pd.DataFrame, checkpoints: list[str], tasks: list[str]) -> list[alt.Chart]:
    y = alt.Y("task:N", sort=tasks, title=None, scale=alt.Scale(paddingInner=0.15))
    offset = alt.YOffset("checkpoint:N", sort=checkpoints)
    tooltip = [
        alt.Tooltip("checkpoint:N"), alt.Tooltip("task:N"), alt.Tooltip("text:N", title="score, 95 % interval"),
        alt.Tooltip("examples:Q", format=","), alt.Tooltip("majority:Q", title="most frequent answer", format=".3f"),
    ]  # fmt: skip
    colours = alt.Scale(domain=checkpoints, range=[COLOURS[i % len(COLOURS)] for i in range(len(checkpoints))])
    shapes = alt.Scale(domain=checkpoints, range=[SHAPES[i % len(SHAPES)] for i in range(len(checkpoints))])
    legend = alt.Legend(orient="top", title=None, columns=3, symbolOpacity=1)
    base = alt.Chart().encode(y=y, tooltip=tooltip)
    dots = base.encode(yOffset=offset, color=alt.Color("checkpoint:N", scale=colours, legend=legend))
    x = "score"
    return [
        base.mark_tick(color=GREY, thickness=2).encode(x=alt.X("majority:Q", title=x)),
        dots.mark_rule(strokeWidth=2, opacity=0.6).encode(x=alt.X("low:Q", title=x), x2="high:Q"),
        dots.mark_point(filled=True, size=60, opacity=1).encode(
            x=alt.X("value:Q", title=x, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=8)),
            shape=alt.Shape("checkpoint:N", scale=shapes, legend=legend),
        ),
    ]


def metric_title(metric: str) -> str:
    return METRICS.get(metric) or shorten(metric, MAX_NAME)


def evaluation_table(frame: pd.DataFrame) -> Table:
    """One row per checkpoint and task, the metrics side by side."""
    shared = ["checkpoint", "task", "majority", "bytes", "parameters", "flops", "seconds", "memory"]
    metrics = list(dict.fromkeys(frame.metric))
    wide = frame.loc[:, shared].drop_duplicates(["checkpoint", "task"], ignore_index=True)
    for i, metric in enumerate(metrics):
        own = frame.loc[frame.metric == metric, ["checkpoint", "task", "text", "value", "low", "high"]]
        own = own.drop_duplicates(["checkpoint", "task"])
        names = {field: f"{field} {i}" for field in ("text", "value", "low", "high")}
        wide = wide.merge(own.rename(columns=names), on=["checkpoint", "task"], how="left")
    measures = [Column(f"text {i}", metric_title(metric), by=f"value {i}") for i, metric in enumerate(metrics)]
    return Table(
        "comparison-evaluation-table",
        "Evaluations",
        "One row per checkpoint and task, with 95 % intervals over examples. Peak memory is the most that the process "
        "held until then, so that later tasks may show that of earlier ones.",
        wide,
        (
            Column("checkpoint", "checkpoint"),
            Column("task", "task"),
            *measures,
            Column("majority", "majority", "share", "share of the most frequent answer"),
            Column("bytes", "stored", "bytes"),
            Column("parameters", "parameters", "integer"),
            Column("flops", "FLOPs / token", "number", "of one forward pass, multiply-adds counted twice"),
            Column("seconds", "seconds", "number", "time of the evaluation"),
            Column("memory", "peak memory", "bytes"),
        ),
        is_essential=True,
    )
