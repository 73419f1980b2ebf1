"""What lining up neurons did before experts were averaged, as compressed checkpoints remember it."""

import math
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
from msmoe.analysis.report.artefacts import Artefacts, CheckpointFolder
from msmoe.analysis.report.charts import BLUE, GREY, ORANGE, choice, short_names
from msmoe.analysis.report.document import Block, Column, Figure, Table, distinct

CONTROL = "alignment_checkpoint"
MAX_POINTS = 4000  # members drawn, of all checkpoints together
ROW = 20  # pixels
FIELDS = {"before": "objective_before", "after": "objective_after", "moved": "share_moved"}


def alignment_blocks(artefacts: Artefacts) -> list[Block]:
    """Nothing where no checkpoint aligned anything."""
    members = member_frame(artefacts.compressed)
    if members.empty:
        return []
    layers = layer_frame(members)
    return [alignment_figure(members, layers), alignment_table(layers)]


def member_frame(folders: tuple[CheckpointFolder, ...]) -> pd.DataFrame:
    """One row per aligned expert: objective before and after, share (0 to 1) of its neurons that moved."""
    names = distinct([folder.label for folder in folders])
    labels = {str(place): name for place, name in enumerate(names)}
    rows = []
    for place, folder in enumerate(folders):
        for group in folder.provenance.get("groups", ()):
            for member, match in group.get("alignment", {}).items():
                row = {"checkpoint": labels[str(place)], "name": str(group["layer"])}
                row |= {"dominant": group["dominant"], "expert": int(member)}
                rows.append(row | {field: as_number(match.get(key)) for field, key in FIELDS.items()})
    frame = pd.DataFrame(rows, columns=["checkpoint", "name", "dominant", "expert", *FIELDS])
    frame["layer"] = frame.name.map(short_names(list(dict.fromkeys(frame.name)))) if len(frame) else ""
    frame["gain"] = frame.after - frame.before
    return frame


def as_number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else float("nan")


def layer_frame(members: pd.DataFrame) -> pd.DataFrame:
    """Means over the aligned experts of each layer."""
    return (
        members.groupby(["checkpoint", "name", "layer"], sort=False)
        .agg(members=("expert", "size"), **{name: (name, "mean") for name in (*FIELDS, "gain")}, least=("gain", "min"))
        .reset_index()
    )


def alignment_figure(members: pd.DataFrame, layers: pd.DataFrame) -> Figure:
    checkpoints = list(dict.fromkeys(members.checkpoint))
    step = math.ceil(len(members) / MAX_POINTS)
    shown = members.iloc[np.arange(0, len(members), step)]
    thinned = f" One in {step} experts is drawn; the means are of all." if step > 1 else ""
    return Figure(
        "similarity-alignment",
        "Gain of lining up neurons",
        "Left: the objective of matching each expert's neurons with those of its group's reference (for weights their "
        f"inner product), as stored and reordered; right: the share of neurons that moved; ticks are means.{thinned} "
        "Look for layers where both clouds touch: there lining up gains little.",
        panels(shown, layers, checkpoints),
        panels(shown, layers, checkpoints, still=True) if len(checkpoints) > 1 else None,
    )


def panels(
    members: pd.DataFrame, layers: pd.DataFrame, checkpoints: list[str], *, still: bool = False
) -> alt.TopLevelMixin:
    """Objectives and shares side by side; a still shows the first checkpoint."""
    if still:
        members, layers = (pd.DataFrame(f[f.checkpoint == checkpoints[0]]) for f in (members, layers))
    order = list(dict.fromkeys(members.layer))
    height = ROW * len(order)
    several = len(checkpoints) > 1 and not still

    def base(frame: pd.DataFrame) -> alt.Chart:
        chart = alt.Chart(frame)
        return chart.transform_filter(f"datum.checkpoint == {CONTROL}") if several else chart

    left = objectives(base(members), base(layers), order).properties(width=300, height=height)
    right = shares(base(members), base(layers), order).properties(width=180, height=height)
    whole = alt.hconcat(left, right, spacing=16).resolve_scale(color="independent", shape="independent")
    if still:
        return whole.properties(title=checkpoints[0])
    return whole.add_params(choice(CONTROL, "Checkpoint", checkpoints)) if several else whole


def objectives(members: alt.Chart, layers: alt.Chart, order: list[str]) -> alt.LayerChart:
    y = alt.Y("layer:N", sort=order, title=None)
    values: dict[str, Any] = {"fold": ["before", "after"], "as_": ["when", "value"]}
    when, legend = ["before", "after"], alt.Legend(orient="top")
    colour = alt.Color("when:N", title=None, scale=alt.Scale(domain=when, range=[GREY, BLUE]), legend=legend)
    shape = alt.Shape(
        "when:N", title=None, scale=alt.Scale(domain=when, range=["circle", "triangle-up"]), legend=legend
    )
    x = alt.X("value:Q", title="objective of the match", axis=alt.Axis(tickCount=6))
    points = members.transform_fold(**values).mark_point(size=28, opacity=0.55, strokeWidth=1.5)
    means = layers.transform_fold(**values).mark_tick(thickness=2.5, size=ROW - 4, color=ORANGE)
    mean_tooltip = [alt.Tooltip("name:N", title="layer"), "when:N", alt.Tooltip("value:Q", title="mean", format=".4~g")]
    marks = points.encode(x=x, y=y, color=colour, shape=shape, tooltip=member_tooltip())
    return alt.LayerChart(layer=[marks, means.encode(x=x, y=y, tooltip=mean_tooltip)])


def shares(members: alt.Chart, layers: alt.Chart, order: list[str]) -> alt.LayerChart:
    y = alt.Y("layer:N", sort=order, title=None, axis=alt.Axis(labels=False, ticks=False))
    x = alt.X(
        "moved:Q", title="neurons moved", axis=alt.Axis(format="%", values=[0, 0.5, 1]), scale=alt.Scale(domain=[0, 1])
    )
    points = members.mark_point(size=28, opacity=0.55, strokeWidth=1.5, color=BLUE)
    means = layers.mark_tick(thickness=2.5, size=ROW - 4, color=ORANGE)
    mean_tooltip = [alt.Tooltip("name:N", title="layer"), alt.Tooltip("moved:Q", title="mean", format=".1%")]
    marks = points.encode(x=x, y=y, tooltip=member_tooltip())
    return alt.LayerChart(layer=[marks, means.encode(x=x, y=y, tooltip=mean_tooltip)])


def member_tooltip() -> list[alt.Tooltip]:
    return [
        alt.Tooltip("name:N", title="layer"),
        alt.Tooltip("expert:Q"),
        alt.Tooltip("dominant:Q", title="group of expert"),
        alt.Tooltip("before:Q", format=".4~g"),
        alt.Tooltip("after:Q", format=".4~g"),
        alt.Tooltip("moved:Q", title="neurons moved", format=".1%"),
    ]


def alignment_table(layers: pd.DataFrame) -> Table:
    return Table(
        "similarity-alignment-layers",
        "Lining up neurons, by layer",
        "Means over the aligned experts of a layer. The objective before is often near or below 0, so the gain is a "
        "difference, not a ratio.",
        layers,
        (
            Column("checkpoint", "checkpoint"),
            Column("name", "layer"),
            Column("members", "aligned", "integer", "experts that were aligned to the reference of their group"),
            Column("before", "before", "number", "objective as stored"),
            Column("after", "after", "number", "objective after reordering neurons"),
            Column("gain", "gain", "number", "after minus before"),
            Column("least", "least gain", "number", "of an expert of the layer"),
            Column("moved", "moved", "share", "neurons whose place changed"),
        ),
    )
