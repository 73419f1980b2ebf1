"""The drawing of a similarity matrix: dendrogram, matrix, groups of the plan below, distribution beside it.

All panels of a layer share the axis along which its experts stand, from 0 to 1.
"""

from dataclasses import dataclass

import altair as alt
import pandas as pd
from msmoe.analysis.report.charts import BLUE, GREY, ORANGE, SEQUENTIAL, SKY, choice

CONTROL = "similarity_layer"
STEP, SMALLEST, LARGEST = 20, 320, 520  # pixels: an expert, the side of a matrix
TREE, BESIDE, SMALL = 90, 190, 180  # pixels: height of the dendrogram, width of the distribution, side in the still
MARGIN = 0.17  # of a cell, around pairs of different groups
KINDS = {"one group": ORANGE, "other pairs": GREY, "all pairs": BLUE}
LONGEST = 48  # experts whose numbers stand on the diagonal


@dataclass(frozen=True)
class Drawing:
    """What is drawn; frames are those of `similarity`, one of `cells` and `images` is None.

    Attributes:
        title: base and metric.
        low, high: similarities of the first and the last colour.
        num_experts: of the largest layer.
    """

    title: str
    low: float
    high: float
    num_experts: int
    cells: pd.DataFrame | None
    images: pd.DataFrame | None
    experts: pd.DataFrame
    joins: pd.DataFrame
    pairs: pd.DataFrame

    @property
    def side(self) -> int:
        return min(max(STEP * self.num_experts, SMALLEST), LARGEST)

    @property
    def layers(self) -> list[str]:
        return list(dict.fromkeys(self.experts.layer))


def interactive(drawing: Drawing) -> alt.TopLevelMixin:
    """One layer at a time."""
    side = drawing.side
    panels = [
        tree(drawing).properties(width=side, height=TREE),
        matrix(drawing, side=side).properties(width=side, height=side),
    ]
    if drawing.experts.g.ne("").any():
        panels.append(strip(drawing).properties(width=side, height=strip_height(drawing.experts)))
    left = alt.vconcat(*panels, spacing=6).resolve_scale(color="independent")
    right = distribution(drawing).properties(width=BESIDE, height=side + TREE)
    whole = alt.hconcat(left, right, spacing=24).resolve_scale(color="independent")
    return whole.add_params(control(drawing))


def control(drawing: Drawing) -> alt.Parameter:
    """A list of the layers, at first at one that the plan changes."""
    planned = drawing.experts.layer[drawing.experts.g != ""]
    first = planned.iloc[0] if len(planned) else drawing.layers[0]
    return choice(CONTROL, "Layer", drawing.layers, value=first)


def chosen(frame: pd.DataFrame) -> alt.Chart:
    """A chart of the layer that the control names."""
    return alt.Chart(frame).transform_filter(f"datum.layer == {CONTROL}")


def across(field: str, title: str | None = None) -> alt.X:
    return alt.X(f"{field}:Q", title=title, axis=None, scale=alt.Scale(domain=[0, 1], nice=False, zero=False))


def down(field: str) -> alt.Y:
    return alt.Y(f"{field}:Q", axis=None, scale=alt.Scale(domain=[0, 1], nice=False, zero=False, reverse=True))


def colour(drawing: Drawing, *, legend: alt.Legend | None) -> alt.Color:
    scale = alt.Scale(scheme=SEQUENTIAL, domain=[drawing.low, drawing.high], clamp=True)
    return alt.Color("s:Q", scale=scale, legend=legend)


def tree(drawing: Drawing) -> alt.LayerChart:
    """The dendrogram, and the legend of the matrix below it."""
    y = alt.Y("h:Q", title="1 - similarity", axis=alt.Axis(tickCount=3, grid=False))
    tooltip = [alt.Tooltip("h:Q", title="joined at 1 - similarity", format=".4f")]
    base = chosen(drawing.joins).encode(tooltip=tooltip)
    line = {"color": GREY, "strokeWidth": 1.2}
    bars = base.mark_rule(**line).encode(x=across("x1"), x2="x2:Q", y=y)
    sides = [base.mark_rule(**line).encode(x=across(f"x{i}"), y=y, y2=alt.Y2(f"h{i}:Q")) for i in (1, 2)]
    legend = alt.Legend(
        title=f"similarity ({drawing.title})", orient="top", gradientLength=200, titleLimit=300, format=".3~f"
    )
    ends = alt.Chart(pd.DataFrame({"s": [drawing.low, drawing.high]})).mark_point(opacity=0, size=0)
    return alt.LayerChart(layer=[bars, *sides, ends.encode(color=colour(drawing, legend=legend))])


def matrix(drawing: Drawing, *, side: int) -> alt.LayerChart:
    """The matrix; numbers or diamonds on the diagonal are the experts, orange ones dominate a group."""
    picture = cells(drawing, chosen(drawing.cells)) if drawing.cells is not None else image(drawing.images, side)
    return alt.LayerChart(layer=[picture, *diagonal(drawing, side=side)])


def image(images: pd.DataFrame | None, side: int) -> alt.Chart:
    assert images is not None
    return image_marks(chosen(images), side)


def image_marks(base: alt.Chart, side: int) -> alt.Chart:
    centred = base.transform_calculate(middle="0.5").encode(x=across("middle"), y=down("middle"), url="url:N")
    return centred.mark_image(width=side, height=side, aspect=False, smooth=False)


def cells(drawing: Drawing, base: alt.Chart, *, legend: alt.Legend | None = None) -> alt.Chart:
    edges = {}
    for axis in ("x", "y"):
        edges[axis] = f"(datum.{axis} + (datum.k == 'no' ? {MARGIN} : 0)) / datum.n"
        edges[f"{axis}2"] = f"(datum.{axis} + 1 - (datum.k == 'no' ? {MARGIN} : 0)) / datum.n"
    placed = base.transform_calculate(left=edges["x"], right=edges["x2"], top=edges["y"], bottom=edges["y2"])
    return placed.mark_rect().encode(
        x=across("left"), x2="right:Q", y=down("top"), y2="bottom:Q",
        color=colour(drawing, legend=legend),
        tooltip=[alt.Tooltip("a:Q", title="expert"), alt.Tooltip("b:Q", title="and expert"),
                 alt.Tooltip("s:Q", title="similarity", format=".4f"), alt.Tooltip("k:N", title="one group")],
    )  # fmt: skip


def diagonal(drawing: Drawing, *, side: int) -> list[alt.Chart]:
    base = chosen(drawing.experts)
    step = side / drawing.num_experts
    if drawing.num_experts > LONGEST:
        return [diamonds(base, step)]
    placed = base.encode(x=across("at"), y=down("at"), text="expert:Q", tooltip=expert_tooltip())
    size = round(max(min(0.5 * step, 11), 7))
    others = placed.transform_filter("datum.d == 0").mark_text(fontSize=size)
    return [
        others,
        placed.transform_filter("datum.d == 1").mark_text(fontSize=size + 1, fontWeight="bold", color=ORANGE),
    ]


def diamonds(base: alt.Chart, step: float) -> alt.Chart:
    """Dominant experts on the diagonal; `step` is the pixels of an expert."""
    size = max(min(0.5 * step, 9), 4) ** 2
    marked = base.transform_filter("datum.d == 1").encode(x=across("at"), y=down("at"), tooltip=expert_tooltip())
    return marked.mark_point(shape="diamond", size=size, color=ORANGE, filled=True, opacity=1)


def expert_tooltip() -> list[alt.Tooltip]:
    return [alt.Tooltip("expert:Q"), alt.Tooltip("g:N", title="group of expert")]


def strip_height(experts: pd.DataFrame) -> int:
    largest = experts[experts.g != ""].groupby("layer").g.nunique().max()
    return int(min(max(13 * largest, 26), 260))


def strip(drawing: Drawing) -> alt.LayerChart:
    """Which experts are of which group: a row for each group, below the columns of the matrix."""
    order = alt.EncodingSortField(field="r", op="min")
    y = alt.Y("g:N", sort=order, title="group of expert", axis=alt.Axis(labelOverlap=True, grid=True, labelFontSize=10))
    base = (
        chosen(drawing.experts).transform_filter("datum.g != ''").encode(x=across("at"), y=y, tooltip=expert_tooltip())
    )
    wide = drawing.side / drawing.num_experts
    members = base.transform_filter("datum.d == 0").mark_tick(
        orient="vertical", thickness=max(min(wide - 2, 12), 1.5), size=9, color=SKY
    )
    dominant = base.transform_filter("datum.d == 1").mark_point(
        shape="diamond", size=90, color=ORANGE, filled=True, opacity=1
    )
    unplanned = pd.DataFrame({"layer": drawing.experts.layer[drawing.experts.g == ""].unique()})
    note = chosen(unplanned).mark_text(text="the plan leaves this layer as it is", fontSize=11)
    return alt.LayerChart(layer=[members, dominant, note])


def distribution(drawing: Drawing) -> alt.Chart:
    """Shares of pairs by similarity."""
    kinds = [kind for kind in KINDS if (drawing.pairs.kind == kind).any()]
    return (
        chosen(drawing.pairs)
        .mark_rect()
        .encode(
            y=alt.Y("y:Q", title="similarity", scale=alt.Scale(domain=[drawing.low, drawing.high], nice=False)),
            y2="y2:Q",
            x=alt.X("share:Q", title="share of pairs", axis=alt.Axis(format="%", tickCount=3)),
            x2=alt.X2Datum(0),
            color=alt.Color(
                "kind:N",
                title=None,
                scale=alt.Scale(domain=kinds, range=[KINDS[kind] for kind in kinds]),
                legend=alt.Legend(orient="top"),
            ),
            tooltip=[
                alt.Tooltip("kind:N", title="pairs"),
                alt.Tooltip("from:Q", title="similarity from", format=".4f"),
                alt.Tooltip("to:Q", format=".4f"),
                alt.Tooltip("share:Q", title="share of these pairs", format=".1%"),
            ],
        )
    )


def small_multiples(drawing: Drawing) -> alt.TopLevelMixin:
    """The matrices of all layers."""
    pictures = drawing.cells if drawing.cells is not None else drawing.images
    assert pictures is not None
    base = alt.Chart(pd.concat([pictures, drawing.experts[drawing.experts.d == 1]], ignore_index=True))
    legend = alt.Legend(title=f"similarity ({drawing.title})", orient="top", gradientLength=200, format=".3~f")
    picture = base.transform_filter("!isValid(datum.d)")
    if drawing.cells is not None:
        layers = [cells(drawing, picture, legend=legend)]
    else:
        key = picture.transform_calculate(s=f"{drawing.low}").mark_point(opacity=0, size=0)
        layers = [image_marks(picture, SMALL), key.encode(color=colour(drawing, legend=legend))]
    panel = alt.layer(*layers, diamonds(base, SMALL / drawing.num_experts)).properties(width=SMALL, height=SMALL)
    facet = alt.Facet("layer:N", sort=drawing.layers, title=None, header=alt.Header(labelAnchor="start"))
    return panel.facet(facet=facet, columns=4, spacing=14)
