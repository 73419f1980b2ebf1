"""The look of all charts. They are Vega-Lite, written with Altair: one definition for page, PNG and SVG.

Colours are those of Okabe and Ito and the map `cividis`: distinct with any colour vision, on white and on black. Text
and axes take the colour of the text around them.
"""

from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd
from msmoe.analysis.report.document import distinct

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C")
BLUE, ORANGE, GREEN, PINK, YELLOW, SKY, GREY = COLOURS
SEQUENTIAL = "cividis"
DIVERGING = ("#0072B2", "#F2F2F2", "#D55E00")
INK = "currentColor"
FONT = "system-ui, 'Segoe UI', 'Helvetica Neue', 'Liberation Sans', 'DejaVu Sans', sans-serif"
STILL_WIDTH = 860  # pixels, where the page gives a chart the width it has

AXIS = {
    "labelColor": INK, "titleColor": INK, "domainColor": "#8C8C8C", "tickColor": "#8C8C8C", "gridColor": "#8C8C8C",
    "gridOpacity": 0.25, "labelLimit": 260, "titleFontWeight": "normal", "labelFontSize": 11, "titleFontSize": 12,
}  # fmt: skip
THEME: dict[str, Any] = {
    "background": None,
    "font": FONT,
    "view": {"stroke": None},
    "axis": AXIS,
    "legend": {"labelColor": INK, "titleColor": INK, "titleFontWeight": "normal", "labelLimit": 260},
    "header": {"labelColor": INK, "titleColor": INK, "labelFontSize": 11, "labelLimit": 260},
    "title": {"color": INK, "fontSize": 12, "fontWeight": "normal", "anchor": "start"},
    "text": {"color": INK},
    "rule": {"color": INK},
    "range": {"category": list(COLOURS)},
}


def choice(
    name: str, label: str, options: Sequence[str], labels: Sequence[str] | None = None, *, value: str | None = None
) -> alt.Parameter:
    """A control that picks one of a few options: radio buttons, or a list from five on.

    Args:
        value: the option at the beginning; default: the first.
    """
    kind = alt.binding_radio if len(options) < 5 else alt.binding_select
    return alt.param(
        name=name, value=options[0] if value is None else value,
        bind=kind(options=list(options), labels=list(labels or options), name=f"{label}: "),
    )  # fmt: skip


def slider(name: str, label: str, low: float, high: float, *, value: float, step: float = 1) -> alt.Parameter:
    """A control for a number."""
    return alt.param(name=name, value=value, bind=alt.binding_range(min=low, max=high, step=step, name=f"{label}: "))


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Layer names as short as they can be told apart: `encoder.block.1.layer.1.mlp` -> `encoder 1`.

    Parts of the module path that all layers share are left out, then from the right those that tell nothing new; where
    a number alone is left, as of a decoder, it is that of a `layer`. Long names are cut; all stay distinct.
    """
    paths = [name.split(".") for name in names]
    if len(set(names)) < 2 or len({len(path) for path in paths}) > 1:
        return dict(zip(names, distinct(names), strict=True))
    kept = [i for i in range(len(paths[0])) if len({path[i] for path in paths}) > 1]
    for i in reversed(kept.copy()):
        fewer = [j for j in kept if j != i]
        if fewer and len({tuple(path[j] for j in fewer) for path in paths}) == len(paths):
            kept = fewer
    labels = distinct([" ".join(path[j] for j in kept) for path in paths])
    if all(label.isdigit() for label in labels):
        labels = [f"layer {label}" for label in labels]
    return dict(zip(names, labels, strict=True))


def stack_of(name: str) -> str:
    """The part of the model that a layer stands in: the first part of its module path, such as encoder."""
    return name.partition(".")[0]


def stack_legend(stacks: pd.Series) -> alt.Legend | None:
    """The legend of a chart in the colours of the stacks; none where there is one stack alone."""
    return alt.Legend(orient="top") if stacks.nunique() > 1 else None


def to_spec(chart: alt.TopLevelMixin, *, title: str = "", reading: str = "") -> dict[str, Any]:
    """The Vega-Lite specification with the look of the house.

    Args:
        title: for a file: it stands above with the settings of the controls, on white, and a fixed width takes the
            place of the page's.
        reading: what stands below the title in place of the settings.
    """
    with alt.data_transformers.enable(consolidate_datasets=True, max_rows=None):
        spec = chart.to_dict(validate=False)  # Vega-Lite itself will say what is wrong
    spec["config"] = THEME
    if title:
        spec["config"] = THEME | {"background": "white"}
        below = reading or settings(spec)
        spec["title"] = {"text": title, "subtitle": below, "subtitleColor": INK, "fontSize": 14, "offset": 12}
        if spec.get("width") == "container":
            spec["width"] = STILL_WIDTH
    return spec


def settings(spec: dict[str, Any]) -> str:
    """What the controls of a chart say at first."""
    found = []
    for param in spec.get("params", ()):
        bind = param.get("bind")
        if isinstance(bind, dict) and "name" in bind:
            labels = dict(zip(bind.get("options", ()), bind.get("labels", ()), strict=False))
            found.append(f"{bind['name']}{labels.get(param.get('value'), param.get('value'))}")
    return "; ".join(found)
