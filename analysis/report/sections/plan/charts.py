"""The flow of experts into groups: curves from experts at the left (x = 0) to groups at the right (x = 1)."""

import altair as alt
import pandas as pd
from msmoe.analysis.report.charts import COLOURS, GREY, choice
from msmoe.analysis.report.sections.plan.frames import CLASS

CONTROL = "plan_layer"
HUES = len(COLOURS) - 1  # the last colour is of what is removed
ROW, LOWEST, HIGHEST = 20, 220, 640  # pixels
SMALL = (180, 200)  # width and height of a panel in the still
LINE = 11  # pixels that a label needs
EXPERTS_LABELLED = 40
MOST_CURVES = 1000  # in one picture; of more experts, straight lines take a third of the time and memory
KNOTS = {"k0": 0.0, "k1": 0.1, "k2": 0.9, "k3": 1.0}  # of a curve: flat ends, and a slope between
X = {"domain": [-0.08, 1.5], "nice": False}


def flow(frame: pd.DataFrame) -> alt.TopLevelMixin:
    """One layer at a time."""
    largest = int(frame.layer.value_counts().max())
    height = min(max(ROW * largest, LOWEST), HIGHEST)
    layers = list(dict.fromkeys(frame.layer))
    marked = with_labels(frame, height, experts=largest <= EXPERTS_LABELLED)
    base = alt.Chart(marked).transform_filter(f"datum.layer == {CONTROL}")
    row = height / largest
    return (
        alt.layer(
            *curves(base, widest=min(max(row, 3), 9)),
            *nodes(base, most(frame), smaller=min(row / ROW, 1)),
            *texts(base, size=10),
        )
        .add_params(choice(CONTROL, "Layer", layers))
        .properties(width="container", height=height)
    )


def flow_multiples(frame: pd.DataFrame) -> alt.TopLevelMixin:
    """All layers."""
    width, height = SMALL
    largest = int(frame.layer.value_counts().max())
    marked = with_labels(frame, height, experts=largest * LINE <= height)
    base = alt.Chart(marked)
    row = height / largest
    draw = curves if len(frame) <= MOST_CURVES else lines
    marks = draw(base, widest=min(max(row, 1.5), 5)), nodes(base, most(frame), smaller=min(row / ROW, 0.4))
    panel = alt.layer(*marks[0], *marks[1], *texts(base, size=9))
    return panel.properties(width=width, height=height).facet(
        facet=alt.Facet("layer:N", sort=list(dict.fromkeys(frame.layer)), title=None), columns=4
    )


def with_labels(frame: pd.DataFrame, height: int, *, experts: bool) -> pd.DataFrame:
    """The frame with `hue`, a colour class, and `label`, `left`: texts that find room, at the right and at the left."""
    hue = (frame.g % HUES).where(frame.kind != CLASS["removed"], HUES)
    label: list[str] = []
    last: dict[str, float] = {}
    named: set[tuple[str, str]] = set()
    for layer, kind, goal, to, size in zip(
        *(frame[name] for name in ("layer", "kind", "goal", "to", "size")), strict=True
    ):
        has_name = kind == CLASS["dominant"] or (kind == CLASS["removed"] and (layer, goal) not in named)
        fits = has_name and (to - last.get(layer, -1.0)) * height >= LINE
        label.append(goal_text(goal, size) if fits else "")
        if fits:
            last[layer] = to
            named.add((layer, goal))
    return frame.assign(hue=hue, label=label, left=frame.expert.astype(str) if experts else "")


def goal_text(goal: str, size: int) -> str:
    return goal if size == 1 and goal.startswith("expert") else f"{goal} ({size})"


def tooltip() -> list[alt.Tooltip]:
    return [
        alt.Tooltip("layer:N"),
        alt.Tooltip("expert:Q"),
        alt.Tooltip("goal:N", title="becomes"),
        alt.Tooltip("kind:N", title="as"),
        alt.Tooltip("weight:Q", format=".3f"),
        alt.Tooltip("size:Q", title="experts there"),
        alt.Tooltip("tokens:Q", title="share of tokens", format=".2%"),
    ]


def across(field: str) -> alt.X:
    return alt.X(f"{field}:Q", axis=None, scale=alt.Scale(**X))


def down(field: str) -> alt.Y:
    return alt.Y(f"{field}:Q", axis=None, scale=alt.Scale(domain=[0, 1], nice=False, reverse=True))


def colour() -> alt.Color:
    scale = alt.Scale(domain=list(range(HUES + 1)), range=[*COLOURS[:HUES], GREY])
    return alt.Color("hue:O", scale=scale, legend=None)


def curves(base: alt.Chart, *, widest: float) -> list[alt.Chart]:
    """Solid ones for members with weight, dashed ones for the others."""
    first, last = list(KNOTS)[:2], list(KNOTS)[2:]
    heights = dict.fromkeys(first, "datum.y") | dict.fromkeys(last, "datum.to")
    place = " : ".join([*(f"datum.knot == '{name}' ? {x}" for name, x in KNOTS.items()), "0"])
    folded = base.transform_calculate(**heights).transform_fold(list(KNOTS), as_=["knot", "height"])
    drawn = folded.transform_calculate(x=place).encode(
        x=across("x"), y=down("height"), color=colour(), detail=["expert:N"], order="x:Q", tooltip=tooltip()
    )
    width = alt.StrokeWidth("weight:Q", legend=None, scale=alt.Scale(domain=[0, 1], range=[1, widest]))
    solid = drawn.transform_filter("datum.weight > 0").mark_line(interpolate="monotone", opacity=0.7, strokeCap="butt")
    dashed = drawn.transform_filter("datum.weight == 0").mark_line(
        interpolate="monotone", opacity=0.7, strokeDash=[4, 3], strokeWidth=1
    )
    return [solid.encode(strokeWidth=width), dashed]


def lines(base: alt.Chart, *, widest: float) -> list[alt.Chart]:
    """Straight ones, as `curves`."""
    drawn = base.encode(
        x=alt.XDatum(0, axis=None, scale=alt.Scale(**X)),
        x2=alt.X2Datum(1),
        y=down("y"),
        y2="to:Q",
        color=colour(),
        tooltip=tooltip(),
    )
    width = alt.StrokeWidth("weight:Q", legend=None, scale=alt.Scale(domain=[0, 1], range=[0.7, widest]))
    solid = drawn.transform_filter("datum.weight > 0").mark_rule(opacity=0.7)
    dashed = drawn.transform_filter("datum.weight == 0").mark_rule(opacity=0.7, strokeDash=[4, 3], strokeWidth=0.7)
    return [solid.encode(strokeWidth=width), dashed]


def most(frame: pd.DataFrame) -> float:
    """The largest share of tokens, 1 if none is known."""
    return float(frame.tokens.max()) if frame.tokens.max() > 0 else 1.0


def nodes(base: alt.Chart, largest: float, *, smaller: float) -> list[alt.Chart]:
    """Experts at the left, sized by their tokens up to `largest`; diamonds dominate. Ends at the right."""
    sized = base.transform_calculate(area=f"isValid(datum.tokens) ? datum.tokens : {0.15 * largest}").encode(
        x=alt.XDatum(0), y=down("y"), color=colour(), tooltip=tooltip()
    )
    area = alt.Size(
        "area:Q", legend=None, scale=alt.Scale(domain=[0, largest], range=[max(14 * smaller, 5), 220 * smaller])
    )
    other = sized.transform_filter(f"datum.kind != '{CLASS['dominant']}'").mark_point(filled=True, opacity=1)
    dominant = sized.transform_filter(f"datum.kind == '{CLASS['dominant']}'").mark_point(
        filled=True, opacity=1, shape="diamond"
    )
    ends = base.transform_filter(
        f"datum.kind == '{CLASS['dominant']}' || datum.kind == '{CLASS['removed']}'"
    ).mark_square(size=max(50 * smaller, 14), opacity=1)
    return [
        other.encode(size=area),
        dominant.encode(size=area),
        ends.encode(x=alt.XDatum(1), y=down("to"), color=colour(), tooltip=tooltip()),
    ]


def texts(base: alt.Chart, *, size: int) -> list[alt.Chart]:
    right = base.transform_filter("datum.label != ''").mark_text(align="left", dx=8, fontSize=size + 1)
    left = base.transform_filter("datum.left != ''").mark_text(align="right", dx=-9, fontSize=size)
    return [
        right.encode(x=alt.XDatum(1), y=down("to"), text="label:N"),
        left.encode(x=alt.XDatum(0), y=down("y"), text="left:N"),
    ]
