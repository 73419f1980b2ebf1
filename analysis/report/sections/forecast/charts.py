"""Curves of a forecast: by layer, for the model, and against what was measured."""

import altair as alt
import numpy as np
import pandas as pd
from msmoe.analysis.report.charts import BLUE, COLOURS, GREY, ORANGE, choice, slider
from msmoe.analysis.report.document import ERROR_MEANING, Column, Figure, Table
from msmoe.analysis.report.sections.forecast.data import WHOLE, has_divergence

from msmoe.forecasting import Forecast

HEIGHT = 320  # pixels
TOLERANCES = (0.01, 0.05, 0.1, 0.2)
DASHES = ([1, 0], [6, 4], [2, 3])
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right")
EXPERTS = "experts kept per layer"


def layer_figure(curves: pd.DataFrame, bounded: str) -> Figure:
    """One line per layer; the tolerance moves a rule and the marks of the smallest sizes within it.

    Args:
        bounded: what was left out, a sentence; may be empty.
    """
    layers, stacks = list(dict.fromkeys(curves.layer)), list(dict.fromkeys(curves["stack"]))
    few = len(layers) <= len(COLOURS)
    field, domain = ("layer", layers) if few else ("stack", stacks)
    scale = choice("scale", "Scale", ["linear", "log"])
    tolerance = slider("tolerance", "Tolerated error in %", 1, 20, value=5)
    picked = alt.selection_point(name="picked", fields=[field], bind="legend")
    hovered = alt.selection_point(name="hovered", fields=["layer"], on="pointerover", clear="pointerout", nearest=True)
    shown = "scale === 'log' ? (datum.error > 0 ? log(datum.error) / LN10 : null) : datum.error"
    base = alt.Chart(curves).transform_calculate(shown=shown)
    x = alt.X("size:Q", title=EXPERTS, scale=alt.Scale(nice=False), axis=alt.Axis(tickMinStep=1))
    axis = alt.Axis(
        labelExpr="scale === 'log' ? format(pow(10, datum.value), '.2~p') : format(datum.value, '.3~p')", tickCount=6
    )
    y = alt.Y("shown:Q", title="predicted relative output error", axis=axis, scale=alt.Scale(zero=False))
    legend = alt.Legend(orient="top", title=None, columns=4, symbolOpacity=1)
    colour = alt.Color(f"{field}:N", sort=None, scale=alt.Scale(domain=domain, range=list(COLOURS)), legend=legend)
    dash = alt.StrokeDash(
        "stack:N", title=None, scale=alt.Scale(domain=stacks[:3], range=list(DASHES)),
        legend=None if few else alt.Legend(orient="top", columns=4, symbolType="stroke"),
    )  # fmt: skip
    opacity = alt.when(picked & hovered).then(alt.value(0.95)).otherwise(alt.value(0.15))
    lines = base.mark_line(strokeWidth=2).encode(
        x=x, y=y, color=colour, strokeDash=dash, detail="layer:N", opacity=opacity
    )
    tooltip = [
        alt.Tooltip("name:N", title="layer"), alt.Tooltip("size:Q", title="experts kept"),
        alt.Tooltip("error:Q", title="output error", format=".3%"),
        alt.Tooltip("kl:Q", title="KL, nats per target token", format=".4g"),
    ]  # fmt: skip
    # Vega-Lite 6.4 loses texts in tooltips of marks that a nearest-point selection is on: it has marks of its own.
    nearest = base.mark_point(opacity=0).encode(x=x, y=y).add_params(hovered)
    shape = alt.Shape(f"{field}:N", scale=alt.Scale(domain=domain, range=list(SHAPES[: len(domain)])), legend=legend)
    points = base.mark_point(filled=True, size=60).encode(
        x=x, y=y, color=colour, shape=shape, opacity=opacity, tooltip=tooltip
    )
    within = (
        base.transform_filter("datum.needed !== null && 100 * datum.needed <= tolerance")
        .transform_joinaggregate(least="min(size)", groupby=["layer"])
        .transform_filter("datum.size === datum.least")
        .mark_point(shape="circle", filled=False, size=260, strokeWidth=2, opacity=1)
        .encode(x=x, y=y, color=colour, tooltip=tooltip)
    )
    rule = (
        alt.Chart(pd.DataFrame({"one": [1]}))
        .transform_calculate(
            shown="scale === 'log' ? log(tolerance / 100) / LN10 : tolerance / 100",
            text="'tolerated: ' + tolerance + ' %'",
        )
        .encode(y="shown:Q")
    )
    text = rule.mark_text(align="right", dx=-4, dy=-7).encode(x=alt.value("width"), text="text:N")
    return Figure(
        "forecast-layers",
        "Predicted error by experts kept",
        "Relative output error of a layer, if it keeps so many experts, on records that the compression does not see; "
        "rings are around the smallest sizes within the tolerated error. Look for where a line turns steep. "
        f"{ERROR_MEANING} {bounded}".strip(),
        alt.layer(lines, nearest, points, rule.mark_rule(strokeDash=[4, 3]), text, within)
        .add_params(scale, tolerance, picked)
        .properties(width="container", height=HEIGHT),
    )


def whole_figure(found: Forecast, *, is_whole: bool) -> Figure:
    """The model's curve: divergence where it is known for all layers, else the mean error."""
    whole = found.whole()
    shows_kl = is_whole and whole.kl is not None
    values = whole.kl if shows_kl else whole.output_error
    frame = pd.DataFrame({"size": whole.sizes, "value": values})
    title, number = (
        ("KL divergence, nats per target token", ".3~g") if shows_kl else ("mean relative output error", ".3~%")
    )
    base = alt.Chart(frame).encode(
        x=alt.X("size:Q", title=EXPERTS, scale=alt.Scale(nice=False), axis=alt.Axis(tickMinStep=1)),
        y=alt.Y("value:Q", title=title, axis=alt.Axis(format=number, tickCount=6)),
        tooltip=[alt.Tooltip("size:Q", title="experts kept"), alt.Tooltip("value:Q", title=title, format=".4g")],
    )
    reading = (
        "Predicted KL divergence of the compressed model's answers from the original's, in nats per target token, if "
        "every layer of the curves above keeps so many experts. It is a second-order estimate: read the shape more "
        "than the value."
        if shows_kl
        else "Mean over the layers of the curves above of the predicted relative output error, if each keeps so many "
        "experts. Errors that one layer hands to the next are not in it."
    )
    return Figure(
        "forecast-model",
        "Predicted change of the whole model",
        reading,
        (base.mark_line(color=BLUE, strokeWidth=2) + base.mark_circle(color=BLUE, size=45, opacity=1)).properties(
            width="container", height=HEIGHT - 80
        ),
    )


def measured_figure(frame: pd.DataFrame, found: Forecast, *, name: str, short: dict[str, str]) -> Figure:
    """Predictions against losses that a comparison measured."""
    shown = frame.assign(
        kind=np.where(frame.what == WHOLE, WHOLE, "one layer alone"),
        text=[
            f"{size:g} experts" if what == WHOLE else "" for what, size in zip(frame.what, frame["size"], strict=True)
        ],
        label=[short.get(what, what) for what in frame.what],
    )
    title, number = (
        ("predicted KL divergence, nats per target token", ".3~g")
        if has_divergence(found)
        else ("predicted relative output error", ".3~%")
    )
    kinds = [WHOLE, "one layer alone"]
    room = alt.Scale(
        domain=[0, 1.25 * float(frame.predicted.max()) or 1.0], nice=False
    )  # for text beside the last point
    colours = alt.Scale(domain=kinds, range=[BLUE, ORANGE])
    base = alt.Chart(shown).encode(
        x=alt.X("predicted:Q", title=title, scale=room, axis=alt.Axis(format=number, tickCount=6)),
        y=alt.Y("measured:Q", title="measured loss increase, nats per token", axis=alt.Axis(tickCount=6)),
    )
    points = base.mark_point(filled=True, size=80, opacity=0.9).encode(
        color=alt.Color("kind:N", title=None, scale=colours, legend=alt.Legend(orient="top")),
        shape=alt.Shape("kind:N", title=None, scale=alt.Scale(domain=kinds, range=["circle", "triangle-up"])),
        tooltip=[
            alt.Tooltip("label:N", title="what"), alt.Tooltip("size:Q", title="experts kept"),
            alt.Tooltip("predicted:Q", format=".4g"), alt.Tooltip("measured:Q", format=".4g"),
        ],
    )  # fmt: skip
    texts = base.mark_text(align="left", dx=8, dy=-6).encode(text="text:N")
    zero = alt.Chart(pd.DataFrame({"zero": [0]})).mark_rule(color=GREY).encode(y="zero:Q")
    return Figure(
        name,
        "Predicted against measured",
        "Loss that a comparison measured above the full model (mean over its tasks and seeds) against the "
        f"prediction at the same sizes of the layers, method {found.method}. A useful forecast rises from left to "
        "right; points below 0 improved.",
        (zero + points + texts).properties(width="container", height=HEIGHT - 40),
    )


def suggestion_table(found: Forecast, experts: dict[str, int], bounded: str) -> Table:
    """Experts per layer at some tolerances, and where the cliff is.

    Args:
        experts: of each layer of the original.
        bounded: what was left out, in words.
    """
    columns = {f"at{int(100 * t)}": found.suggest(t) for t in TOLERANCES}
    rows = [
        {
            "layer": name,
            "experts": experts[name],
            **{key: sizes[name] for key, sizes in columns.items()},
            "cliff": found.cliff(name),
        }
        for name in found.layers
    ]
    return Table(
        "forecast-sizes",
        "Suggested experts per layer",
        "The smallest size tried from which on every larger one stays within the tolerated error, and the size below "
        f"which the error takes off (a dash: nowhere). {bounded}".rstrip(),
        pd.DataFrame(rows),
        (
            Column("layer", "layer"),
            Column("experts", "experts", "integer", "of the original"),
            *(Column(f"at{int(100 * t)}", f"within {t:.0%}", "integer") for t in TOLERANCES),
            Column("cliff", "cliff at", "integer"),
        ),
        is_essential=True,
    )


def bytes_table(found: Forecast, stored: dict[float, int], source_bytes: int, bounded: str) -> Table:
    """Bytes of the checkpoint at each tolerance.

    Args:
        stored: tolerance -> bytes; bounded: what was left out, in words.
    """
    rows = [
        {
            "tolerance": t,
            "experts": sum(found.suggest(t).values()),
            "bytes": stored[t],
            "share": stored[t] / source_bytes,
        }
        for t in stored
    ]
    return Table(
        "forecast-bytes",
        "What it would weigh",
        "Bytes of weights of an exact export with the suggested experts; layers without a forecast stay as they are. "
        f"{bounded}".rstrip(),
        pd.DataFrame(rows),
        (
            Column("tolerance", "tolerated error", "share"),
            Column("experts", "experts of forecast layers", "integer"),
            Column("bytes", "bytes", "bytes"),
            Column("share", "of the original", "share"),
        ),
    )
