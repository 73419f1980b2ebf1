"""Charts of the domains of the calibration data: their usage, distances between them, layers that tell them apart.

Shapes: K domains, E experts, P pairs of domains, L layers.
"""

import altair as alt
import numpy as np
import pandas as pd
from msmoe.analysis.report.charts import INK, SEQUENTIAL, choice, short_names, stack_legend, stack_of
from msmoe.analysis.report.document import Figure
from msmoe.analysis.report.sections.domains.usage import MAX_PAIRED, Distances, Domains, bounded, mean_of_known, usage

MAX_CELLS, MAX_PANEL_CELLS = 60_000, 20_000  # of the map: on the page, in files
MAX_SHOWN = 24  # domains there
COLUMNS = 3
ROW = 18  # pixels
PANEL = 250
DIVERGING = "blueorange"  # less is blue
SIGNED = "(show != 'usage' && datum.value > 0 ? '+' : '') + format(datum.value, '~r')"
DARK, LIGHT = "#1c1f24", "#f2f2f2"  # text on bright and on dark cells


def usage_map(domains: Domains, overview: pd.DataFrame) -> Figure:
    num_experts = sum(counts.shape[1] for counts in domains.routed.values())
    shown = overview.head(max(1, min(MAX_SHOWN, MAX_CELLS // num_experts)))
    frame, short = map_frame(domains, list(shown.position)), list(short_names(list(domains.routed)).values())
    fields = [f"d{position}" for position in shown.position]
    pick = choice("domain", "Domain, furthest from all data first", fields, list(shown.domain))
    show = choice("show", "Show", ["usage", "difference"], ["usage", "difference to all data"])
    largest = largest_of(frame[fields].to_numpy())
    difference = largest_of(frame[fields].to_numpy() - frame[["all"]].to_numpy())
    colour = alt.Color(
        "shown:Q",
        scale=alt.Scale(
            type="sqrt",
            scheme=alt.ExprRef(f"show == 'usage' ? '{SEQUENTIAL}' : '{DIVERGING}'"),
            domain=alt.ExprRef(f"show == 'usage' ? [0, {largest:g}] : [{-difference:g}, {difference:g}]"),
        ),
        legend=alt.Legend(
            title="% (difference: percentage points)", orient="top", gradientLength=260, titleLimit=420,
            labelExpr=SIGNED,
        ),
    )  # fmt: skip
    tooltip = [
        alt.Tooltip("name:N", title="layer"), alt.Tooltip("expert:Q"),
        alt.Tooltip("usage:Q", title="% of the domain", format=".2f"),
        alt.Tooltip("all:Q", title="% of all", format=".2f"),
        alt.Tooltip("difference:Q", title="points", format="+.2f"),
    ]  # fmt: skip
    chart = (
        alt.Chart(frame)
        .mark_rect()
        .transform_calculate(usage="datum[domain]")
        .transform_filter("isValid(datum.usage)")
        .transform_calculate(difference="datum.usage - datum.all")
        .transform_calculate(shown="show == 'usage' ? datum.usage : datum.difference")
        .encode(
            x=alt.X("expert:O", axis=alt.Axis(labelAngle=0, labelOverlap=True, ticks=False)),
            y=alt.Y("layer:N", sort=short, title=None, scale=alt.Scale(domain=short)),
            color=colour,
            tooltip=tooltip,
        )
        .add_params(pick, show)
        .properties(width="container", height=ROW * len(short))
    )
    some = (
        f" Of {len(overview)} domains, the {len(shown)} furthest from all data." if len(shown) < len(overview) else ""
    )
    return Figure(
        "domains-usage",
        "Usage by domain",
        "Each cell is an expert's share of the domain's tokens in the layer, or how many percentage points that is "
        "above (orange) or below (blue) its share of all data together; colours follow the square root, and a row "
        f"without cells saw no token.{some}",
        chart,
        difference_panels(frame, shown, short, num_experts),
    )


def largest_of(values: np.ndarray) -> float:
    """The largest size of a number, NaN left out, to end a scale at; 1 if there is nothing but 0."""
    return float(np.nan_to_num(np.abs(values)).max(initial=0)) or 1.0


def map_frame(domains: Domains, positions: list[int]) -> pd.DataFrame:
    """One row per layer and expert: `all` and d0, d1, ... (by position of the domain) are shares in %, 2 decimals."""
    frames = []
    for (name, counts), short in zip(domains.routed.items(), short_names(list(domains.routed)).values(), strict=True):
        shares = {f"d{k}": usage(counts[k]) for k in positions} | {"all": usage(counts.sum(0))}
        where = {"layer": short, "name": name, "expert": np.arange(counts.shape[1])}
        frames.append(pd.DataFrame(where | {field: (100 * share).round(2) for field, share in shares.items()}))
    return pd.concat(frames, ignore_index=True)


def difference_panels(frame: pd.DataFrame, shown: pd.DataFrame, layers: list[str], num_experts: int) -> alt.FacetChart:
    """Small multiples of the difference to all data, of as many domains as a file can hold."""
    some = shown.head(max(1, MAX_PANEL_CELLS // num_experts))
    parts = [
        frame[["layer", "expert"]].assign(domain=domain, points=frame[f"d{position}"] - frame["all"])
        for domain, position in zip(some.domain, some.position, strict=True)
    ]
    long = pd.concat(parts).dropna()
    largest = largest_of(long.points.to_numpy())
    colour = alt.Color(
        "points:Q",
        scale=alt.Scale(type="sqrt", scheme=DIVERGING, domain=[-largest, largest]),
        legend=alt.Legend(
            title="percentage points more than in all data",
            orient="top",
            gradientLength=260,
            titleLimit=420,
            format="+~r",
        ),
    )
    panel = (
        alt.Chart(long)
        .mark_rect()
        .encode(
            x=alt.X("expert:O", title=None, axis=alt.Axis(labelAngle=0, labelOverlap=True, ticks=False)),
            y=alt.Y("layer:N", sort=layers, title=None, scale=alt.Scale(domain=layers)),
            color=colour,
        )
        .properties(width=PANEL, height=12 * len(layers))
    )
    return panel.facet(facet=alt.Facet("domain:N", sort=list(some.domain), title=None), columns=COLUMNS)


def distance_frame(domains: Domains, measured: Distances, chance: Distances) -> pd.DataFrame:
    """Both orders of every pair of domains: a, b, measured, chance, above (bits, mean over layers)."""
    between, dealt = mean_of_known(measured.between, 0), mean_of_known(chance.between, 0)
    names = np.array(domains.names, dtype=object)
    half = pd.DataFrame({"a": names[measured.first], "b": names[measured.second], "measured": between, "chance": dealt})
    half["above"] = (half.measured - half.chance).clip(lower=0)
    return pd.concat([half, half.rename(columns={"a": "b", "b": "a"})], ignore_index=True)


def similar_beside(frame: pd.DataFrame) -> list[str]:
    """Domains in an order in which similar ones stand beside each other; unknown distances count as the largest."""
    wide = frame.pivot(index="a", columns="b", values="measured")
    names = list(wide.index)
    if len(names) < 3:
        return names
    from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
    from scipy.spatial.distance import squareform

    distances = squareform(wide.fillna(1.0).to_numpy() * (1 - np.eye(len(names))), checks=False)
    return [names[i] for i in leaves_list(optimal_leaf_ordering(linkage(distances, "average"), distances))]


def distance_map(frame: pd.DataFrame, domains: Domains) -> Figure:
    show = choice("show", "Show", ["measured", "chance", "above"], ["divergence", "by chance", "above chance"])
    largest = largest_of(frame[["measured", "chance"]].to_numpy())
    order = similar_beside(frame)
    step = int(np.clip(600 // len(order), 31, 64))
    base = (
        alt.Chart(frame)
        .transform_calculate(bits="datum[show]")
        .transform_filter("isValid(datum.bits)")
        .encode(
            x=alt.X("b:N", sort=order, title=None, scale=alt.Scale(domain=order), axis=alt.Axis(labelAngle=-40)),
            y=alt.Y("a:N", sort=order, title=None, scale=alt.Scale(domain=order)),
            tooltip=[
                alt.Tooltip("a:N", title="domain"), alt.Tooltip("b:N", title="and"),
                alt.Tooltip("measured:Q", title="bits", format=".3f"),
                alt.Tooltip("chance:Q", title="by chance", format=".3f"),
            ],
        )
    )  # fmt: skip
    cells = base.mark_rect().encode(
        color=alt.Color(
            "bits:Q",
            scale=alt.Scale(scheme=SEQUENTIAL, domain=[0, largest]),
            legend=alt.Legend(title="bits", orient="top", gradientLength=200),
        )
    )
    labels = base.mark_text(fontSize=10 if step > 36 else 9).encode(
        text=alt.Text("bits:Q", format=".2f" if largest >= 0.1 else ".3f"),
        color=alt.condition(f"datum.bits > {0.55 * largest:g}", alt.value(DARK), alt.value(LIGHT)),
    )
    which = f", {bounded(domains)}" if len(domains.names) > MAX_PAIRED else ""
    return Figure(
        "domains-distance",
        "How far domains are from each other",
        f"Jensen-Shannon divergence of the usage of two domains in bits (0: same shares, 1: no expert in common), mean "
        f"over layers{which}; similar domains stand together. By chance is what the same texts give if they are dealt "
        "out at random into parts of these sizes: only what is well above it tells domains apart.",
        (cells + labels).add_params(show).properties(width=alt.Step(step), height=alt.Step(24)),
    )


def layer_frame(domains: Domains, measured: Distances, chance: Distances) -> pd.DataFrame:
    """One row per layer: name, layer, stack, bits, chance (mean over pairs), domain (the furthest from all data)."""
    names = list(domains.routed)
    far = np.nan_to_num(measured.to_all, nan=-1.0).argmax(1)
    return pd.DataFrame(
        {
            "name": names,
            "layer": list(short_names(names).values()),
            "stack": [stack_of(name) for name in names],
            "bits": mean_of_known(measured.between, 1),
            "chance": mean_of_known(chance.between, 1),
            "domain": [domains.names[k] for k in far],
        }
    )


def layer_bars(frame: pd.DataFrame) -> Figure:
    base = alt.Chart(frame).encode(
        y=alt.Y("layer:N", sort=list(frame.layer), title=None),
        tooltip=[
            alt.Tooltip("name:N", title="layer"), alt.Tooltip("bits:Q", format=".3f"),
            alt.Tooltip("chance:Q", title="by chance", format=".3f"),
            alt.Tooltip("domain:N", title="furthest from all data"),
        ],
    )  # fmt: skip
    bars = base.mark_bar(height=8).encode(
        x=alt.X("bits:Q", title="bits, mean over pairs of domains", axis=alt.Axis(tickCount=6)),
        color=alt.Color("stack:N", title=None, sort=None, legend=stack_legend(frame["stack"])),
    )
    ticks = base.mark_tick(thickness=2, size=ROW - 2, color=INK).encode(x="chance:Q")
    return Figure(
        "domains-layers",
        "Which layers tell domains apart",
        "Bars are the Jensen-Shannon divergence of usage, mean over pairs of domains; ticks are what texts dealt out "
        "at random give. Look for bars far beyond their tick: there, experts are used by domain.",
        (bars + ticks).properties(width="container", height=ROW * len(frame)),
    )
