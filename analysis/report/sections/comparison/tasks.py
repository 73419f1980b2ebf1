"""What each task and each layer says about the methods: differences to the full model, losses of one layer alone."""

import altair as alt
import numpy as np
import pandas as pd
from msmoe.analysis.comparison_points import references, standing
from msmoe.analysis.report.charts import DIVERGING, GREY, INK, short_names
from msmoe.analysis.report.document import Figure, shorten
from msmoe.analysis.report.sections.comparison.looks import (
    MAX_METHODS,
    bounded,
    controls,
    kind_of,
    kind_scales,
    short_texts,
    size_control,
    steps_control,
)

from msmoe.comparison.summary import ALPHA, FULL, SAME_AS_FULL, Column, Score, Summary

ROW, CELL = 19, 17  # pixels: of a method in the dots, in the map
SAME, UNLIKE, UNTESTED = f"{SAME_AS_FULL} not distinguishable", "different", "not tested"
MAX_POINTS, MIN_METHODS = 1500, 8  # of the dots: in all views together, in each
CLIP = 0.95  # share of losses that the colours tell apart before they may be clipped
MAX_LABELS = 3  # layers that are named on a level line


def task_figure(summary: Summary, name: str) -> Figure | None:
    """None if the full model was not measured, or nothing else."""
    frame = task_frame(summary)
    if frame.empty:
        return None
    params, chosen = controls(task_control(summary), size_control(summary), steps_control(summary))
    chart = alt.layer(*dots(frame), data=frame).transform_filter(chosen).add_params(*params)
    rows = max(len(part) for _, part in frame.groupby(["task", "size", "steps"]))
    return Figure(
        name,
        "Differences to the full model",
        "Score of every method less that of the full model, for losses the other way round: better is to the right, "
        "methods are sorted by their mean. Lines are 95 % intervals of the method's score, the grey band is that of "
        f"the full model; hollow with {SAME_AS_FULL}: not significantly different from it (p ≥ {ALPHA} after Holm's "
        "correction; with one seed, of these checkpoints alone)."
        + bounded(len(standing(summary)), max_methods(summary)),
        chart.properties(width="container", height=ROW * rows),
    )


def task_control(summary: Summary) -> tuple[str, str, list[str], list[str]]:
    titles = list(short_texts(["", *(task.name for task in summary.tasks)], 40).values())
    titles[0] = summary.mean_title
    return "task", "Task", [str(i) for i in range(len(titles))], titles


def max_methods(summary: Summary) -> int:
    """Methods that are drawn in all tasks, sizes and recoveries together."""
    views = (1 + len(summary.tasks)) * len(summary.sizes) * len(summary.recover_steps)
    return max(MAX_POINTS // views, MIN_METHODS)


def task_frame(summary: Summary) -> pd.DataFrame:
    """One row per method, size, recovery and task (0 is the mean): `gain` over the full model, `order` by the mean."""
    short = short_texts(standing(summary)[: max_methods(summary)])
    sign = -1 if summary.mean_metric == "loss" else 1
    records = []
    for steps in summary.recover_steps:
        columns = [Column("mean", "", None, steps), *(Column("task", "", task.name, steps) for task in summary.tasks)]
        for i, column in enumerate(columns):
            found = {row.method: score for row, score in references(summary, steps, task=column.task)}
            if FULL not in found:
                continue
            lower = summary.mean_metric == "loss" if i == 0 else summary.tasks[i - 1].lower_is_better
            for size in summary.sizes:
                for row in (row for row in size.methods if row.method in short):
                    score, mean = row.score(column), row.score(columns[0])
                    if score is None:
                        continue
                    chosen = {"task": str(i), "size": f"{size.experts:g}", "steps": str(steps)}
                    place = {
                        "method": short[row.method],
                        "kind": kind_of(row),
                        "order": sign * mean.value if mean else None,
                    }
                    records.append(chosen | place | difference(score, found[FULL], lower=lower))
    return pd.DataFrame(records)


def difference(score: Score, full: Score, *, lower: bool) -> dict[str, object]:
    """How much better than the full model, and where both intervals end on that scale."""
    sign = -1 if lower else 1
    test = UNTESTED if score.p_full is None else SAME if score.p_full >= ALPHA else UNLIKE
    return {
        "gain": sign * (score.value - full.value),
        "low": sign * (score.low - full.value),
        "high": sign * (score.high - full.value),
        "full_low": sign * (full.low - full.value),
        "full_high": sign * (full.high - full.value),
        "score": score.value,
        "full": full.with_interval,
        "test": test,
        "p": score.p_full,
        "mark": SAME_AS_FULL if test == SAME else "",
    }


def dots(frame: pd.DataFrame) -> list[alt.Chart]:
    """Band of the full model, intervals, points, marks; the data stand above the layers, so that all sort alike."""
    y = alt.Y("method:N", title=None, sort=alt.EncodingSortField("order", op="max", order="descending"))
    tooltip = [
        alt.Tooltip("method:N"), alt.Tooltip("kind:N"), alt.Tooltip("score:Q", format=".4f"),
        alt.Tooltip("full:N", title="full model"), alt.Tooltip("gain:Q", format="+.4f"),
        alt.Tooltip("low:Q", title="one end of its interval", format="+.4f"),
        alt.Tooltip("high:Q", title="the other", format="+.4f"),
        alt.Tooltip("test:N", title="from the full model"), alt.Tooltip("p:Q", format=".2g"),
    ]  # fmt: skip
    colours, shapes = kind_scales(frame.kind)
    legend = alt.Legend(orient="top", title=None, symbolOpacity=1)
    base = alt.Chart().encode(y=y, tooltip=tooltip)
    coloured = base.encode(color=alt.Color("kind:N", scale=colours, legend=legend))
    title = "gain over the full model"
    axis = alt.Axis(tickCount=8)
    return [
        base.mark_rect(color=GREY, opacity=0.16).encode(x=alt.X("full_low:Q", title=title), x2="full_high:Q"),
        alt.Chart().mark_rule(color=GREY, strokeWidth=1.5).encode(x=alt.datum(0)),
        coloured.mark_rule(strokeWidth=1.5, opacity=0.6).encode(x=alt.X("low:Q", title=title), x2="high:Q"),
        coloured.mark_point(size=56, strokeWidth=1.8, opacity=1).encode(
            x=alt.X("gain:Q", title=title, axis=axis),
            shape=alt.Shape("kind:N", scale=shapes, legend=legend),
            fill=alt.condition("datum.mark == ''", alt.Fill("kind:N", scale=colours, legend=legend), alt.value(None)),
        ),
        base.mark_text(align="left", dx=5, color=INK).encode(x=alt.X("right:Q", title=title), text="mark:N")
        .transform_calculate(right="max(datum.low, datum.high)"),
    ]  # fmt: skip


def layer_figure(summary: Summary, name: str) -> Figure | None:
    """None if no layer was compressed alone."""
    frame = layer_frame(summary)
    if frame.empty:
        return None
    limit = colour_limit(frame.loss)
    clipped = int((frame.loss.abs() > limit).sum())
    layers, methods = ordered(frame, "layer", "place"), ordered(frame, "method", "standing")
    frame = frame.drop(columns=["place", "standing"]).assign(
        colour=np.sign(frame.loss) * np.sqrt(np.minimum(frame.loss.abs() / limit, 1))
    )
    params, chosen = controls(size_control(summary))
    legend = alt.Legend(
        title="loss above the full model", orient="top", gradientLength=180, titleLimit=400,
        values=[-1, -0.5, 0, 0.5, 1], labelExpr=f"format(datum.value * abs(datum.value) * {limit}, '+.2~g')",
    )  # fmt: skip
    colour = alt.Scale(domain=[-1, 0, 1], range=list(DIVERGING))
    chart = (
        alt.Chart(frame)
        .transform_filter(chosen)
        .mark_rect()
        .encode(
            x=alt.X(
                "layer:N", sort=layers, title=None, axis=alt.Axis(labelAngle=0 if len(layers) <= MAX_LABELS else -40)
            ),
            y=alt.Y("method:N", sort=methods, title=None),
            color=alt.Color("colour:Q", scale=colour, legend=legend),
            tooltip=[
                "method:N",
                alt.Tooltip("name:N", title="layer"),
                alt.Tooltip("size:N", title="experts per layer"),
                alt.Tooltip("loss:Q", title="loss above the full model", format="+.5f"),
            ],
        )
        .add_params(*params)
        .properties(width="container", height=CELL * len(methods))
    )
    beyond = f" {clipped} of {len(frame)} cells lie beyond ±{limit:.2g} and have its colour." if clipped else ""
    return Figure(
        name,
        "One layer compressed at a time",
        "Loss per token above the full model's with a single layer compressed, mean over seeds; orange is worse, blue "
        "is better, and colours follow the square root. Look for columns that are orange with every method: layers to "
        f"leave alone.{beyond}" + bounded(len(standing(summary))),
        chart,
    )


def layer_frame(summary: Summary) -> pd.DataFrame:
    """One row per method, size and layer; `standing` sorts methods from the best to the worst, then references."""
    rows = [(size, row) for size in summary.sizes for row in size.rows if row.layer_loss]
    methods = standing(summary)[:MAX_METHODS]
    methods += dict.fromkeys(row.method for _, row in rows if row.is_reference)
    names = short_names(list(dict.fromkeys(layer for _, row in rows for layer in row.layer_loss)))
    short, layers = short_texts(methods), short_texts(names.values())
    places = {layer: i for i, layer in enumerate(names)}
    records = [
        {
            "size": f"{size.experts:g}",
            "method": short[row.method],
            "standing": methods.index(row.method),
            "layer": layers[names[layer]],
            "place": places[layer],
            "name": shorten(layer, 80),
            "loss": loss,
        }
        for size, row in rows
        if row.method in short
        for layer, loss in row.layer_loss.items()
    ]
    return pd.DataFrame(records)


def ordered(frame: pd.DataFrame, field: str, by: str) -> list[str]:
    """Different values of a field, in the order of another."""
    return frame.sort_values(by, kind="stable")[field].drop_duplicates().tolist()


def colour_limit(losses: pd.Series) -> float:
    """The largest loss, but at most four times what most stay under: an outlier leaves the others their colours."""
    found = losses.abs()
    return float(max(min(found.max(), 4 * found.quantile(CLIP)), 1e-6))
