"""The plan: who becomes part of whom with which weight, how the budget is spread, and how several plans differ."""

from collections.abc import Callable

import altair as alt
import pandas as pd
from msmoe.analysis.report.artefacts import Artefacts
from msmoe.analysis.report.charts import BLUE, GREEN, GREY
from msmoe.analysis.report.document import Block, Column, Fact, Facts, Figure, Note, Section, Table, shorten
from msmoe.analysis.report.sections.plan.charts import flow, flow_multiples
from msmoe.analysis.report.sections.plan.frames import (
    all_plans,
    as_number,
    budget_frame,
    comparison_frame,
    flow_frame,
    group_frame,
    usage_of,
)

from msmoe.compression.layer_errors import covered
from msmoe.planning.methods import METHODS
from msmoe.planning.plan import Plan
from msmoe.units import human_bytes

BAR = 20  # pixels
ENDS = {"remove": "removed", "mean-output": "mean output"}


def section(artefacts: Artefacts, say: Callable[[str], None]) -> Section | None:
    if artefacts.plan is None:
        return None
    plan, usage = artefacts.plan.plan, usage_of(artefacts)
    budget, groups = budget_frame(artefacts, plan), group_frame(plan, usage)
    blocks: list[Block] = [Facts(tuple(facts(artefacts, plan, budget)))]
    if plan.layers:
        end = ENDS.get(plan.parameters.others, ENDS["remove"])
        blocks.append(flow_figure(flow_frame(plan, usage, end=end), has_usage=bool(usage)))
    if len(budget):
        known = budget.dropna(subset=["experts"])
        blocks += [*([budget_figure(known)] if len(known) else []), layer_table(budget)]
    blocks.append(group_table(groups))
    plans = all_plans(artefacts)
    if len(plans) > 1:
        blocks.append(plan_table(comparison_frame(plans)))
        blocks.append(Note(f"Of {len(plans)} plans, {artefacts.plan.label} is the one drawn: the first one given."))
    if artefacts.calibration is not None and not made_from_these(plan, artefacts):
        blocks.append(Note("The plan was made from other statistics than those given, which the shares here are of."))
    if not usage:
        blocks.append(Note("No statistics: give the directory that `msmoe profile` wrote to see the groups' tokens."))
    return Section("plan", "Plan", lead(plan, artefacts.plan.label, budget, groups), tuple(blocks))


def made_from_these(plan: Plan, artefacts: Artefacts) -> bool:
    """Whether the plan's statistics are among those given; also if it names none."""
    used, given = covered(plan.stats), artefacts.calibration.covers if artefacts.calibration else frozenset()
    return used <= given


def lead(plan: Plan, label: str, budget: pd.DataFrame, groups: pd.DataFrame) -> str:
    changed = budget[budget.what == "compressed"] if len(budget) else budget
    if changed.empty:
        return f"The plan {label} ({shorten(plan.method)}) changes no layer."
    kept, total, removed = changed[["kept", "experts", "removed"]].sum().astype(int).tolist()
    largest = groups.iloc[int(groups["size"].to_numpy().argmax())]
    short = changed.set_index("layer").short
    text = f"{shorten(plan.method)} leaves {kept:,} of {total:,} experts in {len(changed)} layers"
    text += f" and takes {removed:,} out without merging them." if removed else "."
    if largest["size"] == 1:
        return text
    share = "" if pd.isna(largest.tokens) else f", {largest.tokens:.1%} of its layer's tokens"
    return (
        f"{text} The largest group is that of expert {largest.dominant} in {short[largest.layer]}: "
        f"{largest['size']} experts{share}."
    )


def facts(artefacts: Artefacts, plan: Plan, budget: pd.DataFrame) -> list[Fact]:
    known = METHODS.get(plan.method)
    found = [Fact("Method", shorten(plan.method), known.summary if known else "not a method of this version")]
    changed = budget[budget.what == "compressed"] if len(budget) else budget
    if len(changed):
        kept, total = int(changed.kept.sum()), int(changed.experts.sum())
        hint = (
            f"{kept / total:.1%} of the experts of {len(changed)} layers; {len(budget) - len(changed)} kept as they are"
        )
        found.append(Fact("Experts", f"{kept:,} of {total:,}", hint))
    source = source_size(artefacts)
    for label, key, show in (("Parameters", "num_parameters", "{:,.0f}".format), ("Bytes", "bytes", human_bytes)):
        value = as_number(plan.predicted.get(key))
        if value == value:
            share = f", {value / source[key]:.1%} of the original" if source.get(key) else ""
            found.append(Fact(label, show(value), f"predicted{share}"))
    if not plan.predicted:
        why = "known once the merged experts are decomposed" if plan.parameters.factors else "the plan has none"
        found.append(Fact("Bytes", "not predicted", why))
    found.append(Fact("Seed", str(plan.seed)))
    return found


def source_size(artefacts: Artefacts) -> dict[str, int]:
    """Parameters and bytes of the original, from it or from what was made of it; empty if nothing tells."""
    if artefacts.original is not None:
        summary = artefacts.original.summary
        return {"num_parameters": summary.num_parameters, "bytes": summary.num_bytes}
    for folder in artefacts.compressed:
        return {key: folder.provenance.get(key, {}).get("source") for key in ("num_parameters", "bytes")}
    return {}


def flow_figure(frame: pd.DataFrame, *, has_usage: bool) -> Figure:
    points = ", points sized by their share of the tokens" if has_usage else ""
    return Figure(
        "plan-flow",
        "Who becomes part of whom",
        f"Experts of a layer at the left{points}, and what they become at the right, named by the dominant expert "
        "(diamond); a thick curve is a large weight in the average, a dashed one none. Look for groups of many thin "
        "curves: experts that hardly count in the average.",
        flow(frame),
        flow_multiples(frame),
    )


def budget_figure(budget: pd.DataFrame) -> Figure:
    colours = {"compressed": BLUE, "kept as it is": GREEN}
    y = alt.Y("short:N", sort=list(budget.short), title=None)
    tooltip = [
        alt.Tooltip("layer:N"),
        alt.Tooltip("kept:Q"),
        alt.Tooltip("experts:Q"),
        alt.Tooltip("removed:Q", title="removed, not merged"),
        alt.Tooltip("largest:Q", title="largest group"),
        alt.Tooltip("dominant:N", title="dominant experts"),
    ]
    frame = budget.assign(text=[f"{k:.0f} of {e:.0f}" for k, e in zip(budget.kept, budget.experts, strict=True)])
    base = alt.Chart(frame).encode(y=y, tooltip=tooltip)
    scale = alt.Scale(domainMin=0, domainMax=1.25 * float(budget.experts.max()), nice=False)
    whole = base.mark_bar(height=BAR - 6, color=GREY, opacity=0.3).encode(
        x=alt.X("experts:Q", title="experts", scale=scale, axis=alt.Axis(tickCount=6))
    )
    kept = base.mark_bar(height=BAR - 6).encode(
        x="kept:Q",
        color=alt.Color(
            "what:N",
            title=None,
            legend=alt.Legend(orient="top"),
            scale=alt.Scale(domain=list(colours), range=list(colours.values())),
        ),
    )
    text = base.mark_text(align="left", dx=4, fontSize=11).encode(x="experts:Q", text="text:N")
    return Figure(
        "plan-budget",
        "Budget over layers",
        "Experts that each layer keeps (filled) of those it has (pale). Look for layers that are cut hardest; green "
        "ones are left alone.",
        alt.layer(whole, kept, text).properties(width="container", height=BAR * len(frame)),
    )


def layer_table(budget: pd.DataFrame) -> Table:
    return Table(
        "plan-layers",
        "Plan by layer",
        "One row per layer, with what the method noted; a dash says that only the layer's name is known.",
        budget,
        (
            Column("layer", "layer"),
            Column("what", "what"),
            Column("experts", "experts", "integer"),
            Column("kept", "kept", "integer"),
            Column("removed", "removed", "integer", "experts whose weights are in none of the kept ones"),
            Column("largest", "largest group", "integer", "experts"),
            Column("note", "note"),
        ),
        is_essential=True,
    )


def group_table(groups: pd.DataFrame) -> Table:
    return Table(
        "plan-groups",
        "Groups",
        "One row per group, in the plan's order; weights are those of the heaviest members.",
        groups,
        (
            Column("layer", "layer"),
            Column("dominant", "dominant", "integer", "index of the expert that names the group"),
            Column("size", "experts", "integer"),
            Column("weights", "weights", "text", "expert: share in the average"),
            Column("tokens", "tokens", "share", "of the layer's routed tokens"),
        ),
    )


def plan_table(plans: pd.DataFrame) -> Table:
    return Table(
        "plan-comparison",
        "Plans side by side",
        "Agreement is the adjusted Rand index of the groupings with those of the first plan, mean over the layers that "
        "both change: 1 is the same, about 0 is chance; removed experts count as one group.",
        plans,
        (
            Column("plan", "plan"),
            Column("method", "method"),
            Column("layers", "layers", "integer", "that the plan changes"),
            Column("kept", "kept", "number", "experts, mean over these layers"),
            Column("least", "least", "integer", "experts kept in a layer"),
            Column("most", "most", "integer", "experts kept in a layer"),
            Column("bytes", "bytes", "bytes", "predicted"),
            Column("agreement", "agreement", "number"),
        ),
    )
