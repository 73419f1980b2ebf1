"""What compression did inside of each layer: output errors, refits, stable ranks, dropped tokens."""

from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd
from msmoe.analysis.report.charts import BLUE, COLOURS, GREY, choice
from msmoe.analysis.report.document import ERROR, ERROR_MEANING, Column, Figure, Table
from msmoe.analysis.report.sections.cost.data import Cost

from msmoe.families import drops_tokens

ROW = 18  # pixels
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right")
PANEL = 300  # pixels
WHEN = {"before": GREY, "after": BLUE}
SAME = 1e-9


def error_figure(layers: pd.DataFrame) -> Figure:
    """Measured error of each layer, one mark per checkpoint."""
    known: Any = layers[layers.error.notna()]
    frame = known[["checkpoint", "layer", "name", "experts", "stored", "error", "rerouted", "tokens"]]
    labels, names = list(dict.fromkeys(frame.checkpoint)), list(dict.fromkeys(layers.layer))
    scale = choice("scale", "Scale", ["linear", "log"])
    legend = alt.Legend(orient="top", columns=4) if len(labels) > 1 else None
    colours = alt.Scale(domain=labels, range=list(COLOURS[: len(labels)]))
    shapes = alt.Scale(domain=labels, range=list(SHAPES[: len(labels)]))
    picked = alt.selection_point(name="picked", fields=["checkpoint"], bind="legend")
    axis = alt.Axis(
        labelExpr="scale === 'log' ? format(pow(10, datum.value), '.2~p') : format(datum.value, '.3~p')", tickCount=6
    )
    marks = (
        alt.Chart(frame)
        .transform_calculate(
            shown="scale === 'log' ? (datum.error > 0 ? log(datum.error) / LN10 : null) : datum.error"
        )
        .mark_point(filled=True, size=70)
        .encode(
            x=alt.X("shown:Q", title="relative output error", axis=axis, scale=alt.Scale(zero=False)),
            y=alt.Y("layer:N", sort=names, title=None, scale=alt.Scale(domain=names), axis=alt.Axis(grid=True)),
            color=alt.Color("checkpoint:N", title=None, scale=colours, legend=legend),
            shape=alt.Shape("checkpoint:N", title=None, scale=shapes, legend=legend),
            opacity=alt.condition(picked, alt.value(1), alt.value(0.12)),
            tooltip=[
                "checkpoint:N", alt.Tooltip("name:N", title="layer"), alt.Tooltip("experts:Q", title="experts before"),
                alt.Tooltip("stored:Q", title="after"), alt.Tooltip("error:Q", format=".3%"),
                alt.Tooltip("rerouted:Q", title="tokens rerouted", format=".1%"),
                alt.Tooltip("tokens:Q", title="measured on tokens"),
            ],
        )
    )  # fmt: skip
    return Figure(
        "cost-layer-errors",
        "Output error of each layer",
        f"{ERROR_MEANING} Look for the layers farthest right; those kept as they are do not show on the log scale.",
        marks.add_params(scale, picked).properties(width="container", height=ROW * len(names)),
    )


def dumbbells(
    frame: pd.DataFrame,
    costs: Sequence[Cost],
    *,
    name: str,
    title: str,
    reading: str,
    axis: str,
    number: str,
    panel: str | None = None,
) -> Figure:
    """A line from before to after for each layer; several checkpoints one at a time.

    Args:
        frame: index, checkpoint, layer, before, after, and `panel` if there are panels side by side.
        axis: title of the values; number: their format, of d3.
    """
    present = [cost for cost in costs if cost.index in set(frame["index"])]
    base = alt.Chart(frame).encode(y=alt.Y("layer:N", sort=list(dict.fromkeys(frame.layer)), title=None))
    tooltip = [
        "checkpoint:N", "layer:N", alt.Tooltip("before:Q", format=number), alt.Tooltip("after:Q", format=number),
    ]  # fmt: skip
    x = lambda field: alt.X(f"{field}:Q", title=axis, axis=alt.Axis(format=number, tickCount=5))
    rules = base.mark_rule(strokeWidth=2, color=GREY, opacity=0.6).encode(x=x("before"), x2="after:Q", tooltip=tooltip)
    legend = alt.Legend(orient="top")
    colours = alt.Scale(domain=list(WHEN), range=list(WHEN.values()))
    shapes = alt.Scale(domain=list(WHEN), range=["circle", "diamond"])
    points = (
        base.transform_fold(["before", "after"], as_=["when", "value"])
        .mark_point(filled=True, size=65, opacity=1)
        .encode(
            x=x("value"),
            color=alt.Color("when:N", title=None, scale=colours, legend=legend),
            shape=alt.Shape("when:N", title=None, scale=shapes, legend=legend),
            tooltip=tooltip,
        )
    )  # fmt: skip
    height = ROW * frame.layer.nunique()
    layered = alt.layer(rules, points, data=frame)
    column = alt.Column(f"{panel}:N", title=None) if panel else alt.Undefined
    row = alt.Row("checkpoint:N", sort=[c.label for c in present], title=None, header=alt.Header(orient="top"))
    still = layered.properties(width=PANEL if panel else 2 * PANEL, height=height).facet(
        row=row if len(present) > 1 else alt.Undefined, column=column
    )
    chart: Any = (
        layered.properties(width=PANEL, height=height).facet(column=column)
        if panel
        else layered.properties(width="container", height=height)
    )
    if len(present) > 1:
        which = choice("which", "Checkpoint", [c.index for c in present], [c.label for c in present])
        chart = chart.transform_filter("datum.index === which").add_params(which)
    return Figure(name, title, reading, chart, still if panel or len(present) > 1 else None)


def pairs(layers: Any, prefix: str) -> pd.DataFrame:
    """Before and after of one measure, where both are known."""
    columns = {f"{prefix}_before": "before", f"{prefix}_after": "after"}
    return layers[["index", "checkpoint", "layer", *columns]].rename(columns=columns).dropna(subset=["before", "after"])


def refit_figure(layers: pd.DataFrame, costs: Sequence[Cost]) -> Figure | None:
    frame = pairs(layers, "refit")
    if frame.empty:
        return None
    return dumbbells(
        frame, costs, name="cost-refit", title="What the refit repaired", axis="relative output error", number=".3~%",
        reading="Relative output error of the refitted groups of a layer, on their held-out tokens, before and after "
        "their output matrices were solved again. Long lines are much repaired; a short one far right is not.",
    )  # fmt: skip


def matrix_names(costs: Sequence[Cost]) -> tuple[str, str]:
    """What the two matrices of an expert are called: `wi` and `wo` where all checkpoints have them."""
    are_switch = all(drops_tokens(cost.folder.summary.model_type) for cost in costs)
    return ("wi", "wo") if are_switch else ("front", "output")


def rank_figure(layers: pd.DataFrame, costs: Sequence[Cost]) -> Figure | None:
    """Stable ranks of either matrix, side by side."""
    named = dict(zip(("wi", "wo"), matrix_names(costs), strict=True))
    frame = pd.concat([pairs(layers, m).assign(matrix=name) for m, name in named.items()], ignore_index=True)
    if frame.empty:
        return None
    return dumbbells(
        frame, costs, name="cost-stable-rank", title="Stable rank of the experts", axis="stable rank", number=".3~s",
        panel="matrix",
        reading="Squared Frobenius over squared spectral norm of the experts' matrices, mean over a layer: those of "
        "the original, and those stored (before factorising, where only the checkpoint's own report is known). A "
        "smaller one bears a lower rank.",
    )  # fmt: skip


def drop_figure(layers: pd.DataFrame, costs: Sequence[Cost]) -> Figure | None:
    """Dropped tokens; None where nothing changed."""
    frame: Any = pairs(layers, "drop")
    changed = set(frame.loc[(frame.after - frame.before).abs() > SAME, "index"])
    frame = frame[frame["index"].isin(changed)]
    if frame.empty:
        return None
    return dumbbells(
        frame, costs, name="cost-dropped", title="Dropped tokens", axis="tokens over capacity", number=".3~%",
        reading="Share of a layer's calibration tokens over the capacity of their expert before and after, if routing "
        "follows the plan; checkpoints where nothing changed are left out. Look for lines to the right: new losses.",
    )  # fmt: skip


def layer_table(layers: pd.DataFrame, costs: Sequence[Cost]) -> Table:
    front, output = matrix_names(costs)
    drop_columns = (
        Column("drop_before", "dropped", "share", "tokens over capacity"),
        Column("drop_after", "dropped after", "share"),
    )
    return Table(
        "cost-layers",
        "Cost by layer",
        "One row per checkpoint and MoE layer; a dash is not known.",
        layers,
        (
            Column("checkpoint", "checkpoint"),
            Column("name", "layer"),
            Column("experts", "experts", "integer", "of the original"),
            Column("stored", "stored", "integer"),
            Column("error", "error", "share", ERROR),
            Column("rerouted", "rerouted", "share", "tokens that meet another gate value or expert than their own's"),
            Column("refit_before", "before refit", "share", f"{ERROR}; of its refitted groups"),
            Column("refit_after", "after refit", "share", f"{ERROR}; of its refitted groups"),
            Column("wi_before", f"stable rank {front}", "number", "of the original experts, mean"),
            Column("wi_after", f"{front} after", "number", "of the stored ones"),
            Column("wo_before", f"stable rank {output}", "number", "of the original experts, mean"),
            Column("wo_after", f"{output} after", "number", "of the stored ones"),
            *(drop_columns if front == "wi" else ()),
        ),
    )


def expert_table(lost: pd.DataFrame, count: int) -> Table:
    return Table(
        "cost-experts",
        "The experts that lost most",
        f"Relative output error over the tokens of one original expert, the {count} largest of each checkpoint; the "
        "share of the layer's tokens says how much it matters.",
        lost,
        (
            Column("checkpoint", "checkpoint"),
            Column("layer", "layer"),
            Column("expert", "expert", "integer", "of the original"),
            Column("usage", "tokens", "share", "of the layer's routed tokens"),
            Column("error", "error", "share"),
        ),
    )
