"""How the router uses the experts: shares by layer and expert, what a budget would cut, how even layers are."""

from collections.abc import Callable

import altair as alt
import numpy as np
import pandas as pd
from msmoe.analysis.report.artefacts import Artefacts
from msmoe.analysis.report.charts import BLUE, GREY, ORANGE, SEQUENTIAL, choice, short_names, stack_legend, stack_of
from msmoe.analysis.report.document import Column, Figure, Note, Section, Table

from msmoe.calibration.stats import Stats
from msmoe.calibration.usage import COLD, layer_frame
from msmoe.families import drops_tokens

MEASURES = {
    "routed": "routed tokens",
    "dispatched": "dispatched tokens",
    "dropped": "dropped tokens",
    "gate": "gate mass",
}
BUDGETS = {"half": 2, "a quarter": 4, "an eighth": 8}
FEW = 20  # tokens per expert: fewer cannot show that one is dead
ROW, SMALL = 18, 150  # pixels: a row of the map, a panel of the bars
COLUMNS = 4


def section(artefacts: Artefacts, say: Callable[[str], None]) -> Section | None:
    stats = artefacts.calibration
    if stats is None:
        return None
    layers, experts = layer_frame(stats), expert_frame(stats)
    blocks = [
        usage_map(experts, measures_of(stats)),
        usage_bars(experts, stats),
        evenness(layers),
        layer_table(layers, drops=drops(stats)),
        *idle_table(stats),
        expert_table(stats),
    ]
    top_k = max(layer.top_k for layer in stats.layers.values())
    if top_k > 1:
        text = f"Each token goes to {top_k} experts and counts once for each: shares are of these choices."
        blocks.append(Note(text))
    unseen = layers.loc[layers.num_tokens == 0, "layer"]
    if len(unseen):
        blocks.append(Note(f"No token of the calibration data reached {', '.join(unseen)}."))
    few = layers[layers.num_tokens * top_k < FEW * layers.num_experts]
    if len(few):
        blocks.append(
            Note(
                f"Fewer than {FEW} tokens per expert in {len(few)} of {len(layers)} layers: an expert without a token "
                "may only be rare. More records (`msmoe profile --samples`) tell."
            )
        )
    return Section("usage", "Expert usage", lead(layers), tuple(blocks))


def drops(stats: Stats) -> bool:
    """Whether tokens over the capacity of their expert are dropped."""
    return drops_tokens(stats.checkpoint.get("model_type"))


def measures_of(stats: Stats) -> dict[str, str]:
    """Fields of the frame of experts and what they are called; nothing is dispatched or dropped without a capacity."""
    return {field: label for field, label in MEASURES.items() if drops(stats) or field in ("routed", "gate")}


def lead(layers: pd.DataFrame) -> str:
    total, used = layers.num_experts.sum(), layers.used.sum()
    if layers.imbalance.isna().all():
        return "No token of the calibration data reached an MoE layer."
    cold = f"{layers.cold.sum():,} of them less than a tenth of an equal share"
    text = f"{used:,} of {total:,} experts saw a token; {cold}."
    if len(layers) < 2:
        return text
    most, least = layers.loc[layers.entropy.idxmin()], layers.loc[layers.entropy.idxmax()]
    return (
        f"{text} The most uneven layer is {most.layer}: its {most.num_experts} experts are used like "
        f"{most.effective_experts:.1f} equal ones, and the most used one takes {most.largest_share:.1%} of its tokens. "
        f"The most even one is {least.layer}: {least.num_experts} like {least.effective_experts:.1f}."
    )


def expert_frame(stats: Stats) -> pd.DataFrame:
    """Shares (0 to 1) of each expert in its layer, and its place there by usage; one row per layer and expert."""
    short = short_names(list(stats.layers))
    frames = []
    for name, layer in stats.layers.items():
        routed = layer.array("routed")
        tokens = max(int(routed.sum()), 1)
        rank = np.empty(len(routed), dtype=int)
        rank[np.lexsort((np.arange(len(routed)), -routed))] = np.arange(len(routed))
        frame = {
            "layer": short[name],
            "name": name,
            "stack": stack_of(name),
            "expert": np.arange(len(routed)),
            "rank": rank,
            "tokens": routed,
            "routed": routed / tokens,
            "dispatched": layer.array("dispatched") / max(int(layer.array("dispatched").sum()), 1),
            "dropped": (layer.array("routed") - layer.array("dispatched")) / tokens,
            "gate": layer.array("gate_mass") / max(float(layer.array("gate_mass").sum()), 1e-30),
        }
        frames.append(pd.DataFrame(frame))
    return pd.concat(frames, ignore_index=True)


def usage_map(experts: pd.DataFrame, measures: dict[str, str]) -> Figure:
    measure = choice("measure", "Share of", list(measures), list(measures.values()))
    scale = choice("scale", "Colours", ["linear", "log"])
    order = choice("order", "Experts by", ["index", "usage"])
    layers = list(dict.fromkeys(experts.layer))
    base = alt.Chart(experts).transform_calculate(
        share="datum[measure]",
        colour="scale == 'log' ? (datum.share > 0 ? log(datum.share) / LN10 : null) : datum.share",
        place="order == 'usage' ? datum.rank : datum.expert",
    )
    x = alt.X("place:O", title="expert, by index or from the most used", axis=alt.Axis(labelAngle=0, labelOverlap=True))
    y = alt.Y("layer:N", sort=layers, title=None)
    tooltip = [
        alt.Tooltip("name:N", title="layer"), alt.Tooltip("expert:Q"),
        alt.Tooltip("tokens:Q", title="routed tokens", format=","),
        *[alt.Tooltip(f"{field}:Q", title=f"share of {label}", format=".2%") for field, label in measures.items()],
    ]  # fmt: skip
    legend = alt.Legend(
        title="share of the layer", orient="top", gradientLength=260,
        labelExpr="scale == 'log' ? format(pow(10, datum.value), '.2~%') : format(datum.value, '.2~%')",
    )  # fmt: skip
    cells = base.mark_rect().encode(
        x=x, y=y, tooltip=tooltip, color=alt.Color("colour:Q", scale=alt.Scale(scheme=SEQUENTIAL), legend=legend)
    )
    dead = base.transform_filter("datum.share == 0 && measure != 'dropped'").mark_point(
        shape="cross", size=70, angle=45, strokeWidth=1.5, opacity=1, color=ORANGE
    )
    return Figure(
        "usage-map",
        "Expert usage by layer",
        "Each cell is one expert's share of its layer's tokens (or gate mass); yellow is much, and an orange cross is "
        "nothing at all. Look for rows with a few bright cells: such a layer uses few of its experts.",
        alt.layer(cells, dead.encode(x=x, y=y, tooltip=tooltip))
        .add_params(measure, scale, order)
        .properties(width="container", height=ROW * len(layers)),
    )


def kept_counts(stats: Stats) -> dict[str, list[int]]:
    """Budget -> experts that each layer keeps, the most used ones, by the adaptive budget of M-SMoE.

    Layers that `msmoe plan` leaves alone by default keep all of theirs.
    """
    from msmoe.families import FAMILIES, MoELayer
    from msmoe.planning.grouping import group_counts

    layers = tuple(
        MoELayer(name, n.num_experts, n.array("input_sum").shape[1], 0, {}) for name, n in stats.layers.items()
    )
    left = {name for family in FAMILIES for name in family.default_kept_layers(layers)}
    usage = {name: layer.usage for name, layer in stats.layers.items() if name not in left}
    full = {layer.name: layer.num_experts for layer in layers}
    average = float(np.mean([len(u) for u in usage.values()])) if usage else 1.0
    kept = {}
    for label, divisor in BUDGETS.items():
        counts = group_counts(list(usage.values()), max(average / divisor, 1.0)) if usage else []
        kept[label] = list((full | dict(zip(usage, counts, strict=True))).values())
    return kept


def usage_bars(experts: pd.DataFrame, stats: Stats) -> Figure:
    """Sorted bars of every layer; those that a budget cuts are grey."""
    budget = choice("budget", "Keep", list(BUDGETS))
    short = short_names(list(stats.layers))
    counts = pd.DataFrame({"layer": [short[name] for name in stats.layers], **kept_counts(stats)})
    frame = experts[["layer", "expert", "rank", "routed"]].merge(counts, on="layer")
    panel = (
        alt.Chart(frame)
        .mark_bar()
        .transform_calculate(kept="datum.rank < datum[budget] ? 'kept' : 'merged or removed'")
        .encode(
            x=alt.X("rank:O", title=None, axis=None),
            y=alt.Y("routed:Q", title=None, axis=alt.Axis(format="%", tickCount=3)),
            color=alt.Color(
                "kept:N",
                title=None,
                legend=alt.Legend(orient="top"),
                scale=alt.Scale(domain=["kept", "merged or removed"], range=[BLUE, GREY]),
            ),
            tooltip=["layer:N", "expert:Q", alt.Tooltip("routed:Q", format=".2%"), "kept:N"],
        )
        .properties(width=SMALL + 40, height=SMALL - 60)
    )
    return Figure(
        "usage-bars",
        "Where a budget cuts",
        "Experts of each layer from the most to the least used, as shares of its routed tokens; blue ones would be "
        "kept at that share of the experts by the adaptive budget of M-SMoE, as `msmoe plan` does, which leaves some "
        "layers alone by default. Look for tall grey bars: tokens that change experts.",
        panel.facet(facet=alt.Facet("layer:N", sort=list(dict.fromkeys(experts.layer)), title=None), columns=COLUMNS)
        .add_params(budget)
        .resolve_scale(y="independent", x="independent"),
    )


def evenness(layers: pd.DataFrame) -> Figure:
    """Effective number of experts of each layer, encoder and decoder apart."""
    short = short_names(list(layers.layer))
    frame = layers.assign(short=layers.layer.map(short), stack=layers.layer.map(stack_of))
    y = alt.Y("short:N", sort=list(frame.short), title=None)
    tooltip = [
        alt.Tooltip("layer:N"), alt.Tooltip("effective_experts:Q", title="effective experts", format=".1f"),
        alt.Tooltip("num_experts:Q", title="experts"), alt.Tooltip("entropy:Q", format=".3f"),
        alt.Tooltip("gini:Q", title="Gini", format=".3f"), alt.Tooltip("imbalance:Q", title="max / mean", format=".2f"),
    ]  # fmt: skip
    base = alt.Chart(frame).encode(y=y, tooltip=tooltip)
    whole = base.mark_tick(thickness=2, size=ROW - 6, color=GREY).encode(x=alt.X("num_experts:Q", title="experts"))
    bars = base.mark_bar(height=8).encode(
        x="effective_experts:Q", color=alt.Color("stack:N", title=None, sort=None, legend=stack_legend(frame["stack"]))
    )
    return Figure(
        "usage-evenness",
        "Effective number of experts",
        "Bars are exp(entropy of usage): a layer that used so many experts equally would have the same entropy; ticks "
        "are the experts that the layer has. Look for short bars: these layers use the fewest of their experts.",
        (bars + whole).properties(width="container", height=ROW * len(frame)),
    )


def layer_table(layers: pd.DataFrame, *, drops: bool) -> Table:
    return Table(
        "usage-layers",
        "Usage by layer",
        "One row per MoE layer; the measures are of routed tokens.",
        layers,
        (
            Column("layer", "layer"),
            Column("num_experts", "experts", "integer"),
            Column("num_tokens", "tokens", "integer", "routed tokens, padding not counted"),
            Column("used", "used", "integer", "experts that saw a token"),
            Column("cold", "cold", "integer", "used ones with less than a tenth of an equal share"),
            Column("dead", "dead", "integer", "experts without a token"),
            *([Column("dropped_share", "dropped", "share", "tokens over capacity")] if drops else []),
            Column("largest_share", "largest", "share", "share of the most used expert"),
            Column("entropy", "entropy", "number", "over ln E: 1 is even"),
            Column("gini", "Gini", "number", "0 is even"),
            Column("imbalance", "max / mean", "number", "1 is even"),
            Column("effective_experts", "effective", "number", "exp of the entropy"),
        ),
    )


def idle_table(stats: Stats) -> list[Table]:
    """Dead and cold experts, if there are any."""
    frame = stats.to_frame()
    size = frame.groupby("layer").expert.transform("size")
    seen = frame.groupby("layer").routed.transform("sum") > 0
    idle = frame[seen & (frame.usage_frequency < COLD / size)].sort_values("routed", kind="stable")
    if idle.empty:
        return []
    return [
        Table(
            "usage-idle",
            "Dead and cold experts",
            "Experts that saw no token, or less than a tenth of an equal share of their layer's, the least used first.",
            idle,
            (
                Column("layer", "layer"),
                Column("expert", "expert", "integer"),
                Column("routed", "routed", "integer", "tokens"),
                Column("usage_frequency", "usage", "share", "of the layer's routed tokens"),
            ),
            is_essential=True,
        )
    ]


def expert_table(stats: Stats) -> Table:
    frame = stats.to_frame()
    unseen = [name for name, layer in stats.layers.items() if layer.num_tokens == 0]
    frame.loc[frame.layer.isin(unseen), "usage_frequency"] = float("nan")
    frame = frame.sort_values("usage_frequency", ascending=False, kind="stable")
    return Table(
        "usage-experts",
        "Usage by expert",
        "One row per expert, the most used first.",
        frame,
        (
            Column("layer", "layer"),
            Column("expert", "expert", "integer"),
            Column("routed", "routed", "integer", "tokens"),
            *([Column("dispatched", "dispatched", "integer", "tokens within capacity")] if drops(stats) else []),
            Column("usage_frequency", "usage", "share", "of the layer's routed tokens"),
            Column("gate_mass", "gate mass", "number", "sum of gate values of routed tokens"),
            Column("soft_mass", "soft mass", "number", "sum of router probabilities over all tokens"),
        ),
    )
