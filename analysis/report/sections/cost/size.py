"""Where the bytes went: checkpoints by part, and what each step took away."""

from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd
from msmoe.analysis.report.charts import BLUE, COLOURS, GREY, ORANGE, choice
from msmoe.analysis.report.document import ERROR, Column, Figure, Table
from msmoe.analysis.report.sections.cost.data import Cost

from msmoe.units import human_bytes

BAR, PANEL = 26, 300  # pixels
MINUS = "\N{MINUS SIGN}"
KINDS = {"total": GREY, "taken away": BLUE, "added": ORANGE}
BYTES = "format(datum.value, '.3~s') + 'B'"
OTHER_PARTS = "other parts"


def size_blocks(costs: Sequence[Cost], parts: pd.DataFrame, steps: pd.DataFrame) -> list:
    return [waterfall(costs, steps), part_bars(parts), part_table(parts), checkpoint_table(costs)]


def waterfall(costs: Sequence[Cost], steps: pd.DataFrame) -> Figure:
    """Floating bars from the original down to what is stored."""
    frame: Any = steps.assign(
        text=[human_bytes(c) if k == "total" else f"{'+' if c > 0 else MINUS}{human_bytes(abs(c))}"
              for c, k in zip(steps.change, steps.kind, strict=True)],
        side=steps[["start", "end"]].max(axis=1),
    )  # fmt: skip
    base = alt.Chart(frame).encode(
        y=alt.Y("step:N", sort=alt.SortField("place"), title=None),
        tooltip=["checkpoint:N", "step:N", alt.Tooltip("change:Q", title="bytes", format=",")],
    )
    x = alt.X("start:Q", title="bytes", scale=room_for_text(frame.side), axis=alt.Axis(labelExpr=BYTES, tickCount=6))
    colour = alt.Color(
        "kind:N", title=None, scale=alt.Scale(domain=list(KINDS), range=list(KINDS.values())),
        legend=alt.Legend(orient="top"),
    )  # fmt: skip
    bars = base.mark_bar(height=BAR - 8).encode(x=x, x2="end:Q", color=colour)
    texts = base.mark_text(align="left", dx=5).encode(x="side:Q", text="text:N")
    still = alt.layer(bars, texts, data=frame).properties(width=2 * PANEL, height=alt.Step(BAR))
    height = BAR * int(frame.groupby("index").size().max())
    chart = alt.layer(bars, texts, data=frame).properties(width="container", height=height)
    if len(costs) > 1:
        which = choice("which", "Checkpoint", [c.index for c in costs], [c.label for c in costs])
        chart = chart.transform_filter("datum.index === which").add_params(which)
    rows = alt.Row("checkpoint:N", sort=[c.label for c in costs], title=None, header=alt.Header(orient="top"))
    return Figure(
        "cost-steps",
        "What each step took away",
        "Bytes of weights from the original to what is stored; grey bars are totals, floating ones what a step took "
        "away or added. Look at which step did the work: fewer experts, or smaller ones.",
        chart,
        still.facet(row=rows).resolve_scale(y="independent") if len(costs) > 1 else None,
    )


def room_for_text(ends: pd.Series) -> alt.Scale:
    """From 0 to beyond the longest bar, so that a label fits beside it on a phone too."""
    return alt.Scale(domain=[0, 1.25 * float(ends.max())], nice=False)


def part_bars(parts: pd.DataFrame) -> Figure:
    """Stacked bars; parts beyond the colours are one."""
    largest: Any = parts.groupby("part")["bytes"].max()
    names = list(largest.sort_values(ascending=False).index)
    shown = names if len(names) <= len(COLOURS) else [*names[: len(COLOURS) - 1], OTHER_PARTS]
    frame: Any = parts.assign(part=parts.part.where(parts.part.isin(shown), OTHER_PARTS))
    frame = frame.groupby(["checkpoint", "part"], sort=False, as_index=False)[["parameters", "bytes"]].sum()
    frame = frame.assign(place=frame.part.map(shown.index))
    labels = list(dict.fromkeys(frame.checkpoint))
    totals: Any = frame.groupby("checkpoint", sort=False, as_index=False)["bytes"].sum()
    totals = totals.assign(text=totals["bytes"].map(human_bytes))
    room = room_for_text(totals["bytes"])
    y = alt.Y("checkpoint:N", sort=labels, title=None)
    bars = (
        alt.Chart(frame)
        .mark_bar(height=BAR - 8)
        .encode(
            x=alt.X("bytes:Q", title="bytes", scale=room, axis=alt.Axis(labelExpr=BYTES, tickCount=6)),
            y=y,
            order="place:O",
            color=alt.Color(
                "part:N", title=None, scale=alt.Scale(domain=shown, range=list(COLOURS[: len(shown)])),
                legend=alt.Legend(orient="top", columns=4),
            ),
            tooltip=[
                "checkpoint:N", "part:N", alt.Tooltip("bytes:Q", format=","), alt.Tooltip("parameters:Q", format=","),
            ],
        )
    )  # fmt: skip
    text = alt.Chart(totals).mark_text(align="left", dx=5).encode(x="bytes:Q", y=y, text="text:N")
    return Figure(
        "cost-parts",
        "Bytes by part",
        "Bytes of weights of each checkpoint, by what they are for, the largest part first. What is not an expert "
        "does not shrink: it bounds what compression of experts can reach.",
        (bars + text).properties(width="container", height=BAR * len(labels)),
    )


def part_table(parts: pd.DataFrame) -> Table:
    return Table(
        "cost-parts-table",
        "Parameters and bytes by part",
        "One row per checkpoint and part; maps and indices are no parameters.",
        parts,
        (
            Column("checkpoint", "checkpoint"),
            Column("part", "part"),
            Column("parameters", "parameters", "integer"),
            Column("bytes", "bytes", "bytes"),
            Column("share", "of the original", "share", "bytes over those of the same part of the original"),
        ),
    )


def checkpoint_table(costs: Sequence[Cost]) -> Table:
    """Sizes as predicted and as written, and what recovery did."""
    return Table(
        "cost-checkpoints",
        "Compressed checkpoints",
        "One row per checkpoint. Predicted are the bytes that its plan promised, written those in its files; the "
        "difference should be nothing.",
        pd.DataFrame([checkpoint_row(cost) for cost in costs]),
        (
            Column("checkpoint", "checkpoint"),
            Column("method", "method"),
            Column("export", "export"),
            Column("before", "experts before", "integer"),
            Column("after", "after", "integer"),
            Column("parameters", "parameters", "integer"),
            Column("predicted", "bytes predicted", "integer"),
            Column("bytes", "written", "integer"),
            Column("difference", "difference", "integer"),
            Column("share", "of the original", "share"),
            Column("largest_error", "largest layer error", "share", ERROR),
        ),
        is_essential=True,
    )


def checkpoint_row(cost: Cost) -> dict:
    before, after = cost.experts
    predicted = cost.folder.provenance.get("bytes", {}).get("predicted")
    return {
        "checkpoint": cost.label,
        "method": cost.folder.plan.method if cost.folder.plan else None,
        "export": cost.folder.provenance.get("export"),
        "before": before,
        "after": after,
        "parameters": cost.folder.summary.num_parameters,
        "predicted": predicted,
        "bytes": cost.num_bytes,
        "difference": None if predicted is None else cost.num_bytes - predicted,
        "share": cost.num_bytes / cost.source_bytes if cost.source_bytes else None,
        "largest_error": cost.worst[1] if cost.worst else None,
    }


def recovery_table(costs: Sequence[Cost]) -> Table | None:
    """What fine-tuning after compression did; None where there was none."""
    rows = [
        {
            "checkpoint": cost.label,
            "steps": recovery.get("steps"),
            "best_step": recovery.get("best_step"),
            "records": recovery.get("num_records", {}).get("train"),
            "taught": "yes" if recovery.get("teacher") else "no",
            "before": recovery.get("validation_loss", {}).get("before"),
            "after": recovery.get("validation_loss", {}).get("after"),
        }
        for cost in costs
        if (recovery := cost.folder.provenance.get("recovery"))
    ]
    if not rows:
        return None
    return Table(
        "cost-recovery",
        "Recovery",
        "Fine-tuning after compression: steps, and cross-entropy per target token on validation records before and "
        "after. It trains on text of the kind that the loss is measured on: this loss, and one on other text of the "
        "kind, may fall below the original's, which alone does not make a better model.",
        pd.DataFrame(rows),
        (
            Column("checkpoint", "checkpoint"),
            Column("steps", "steps", "integer"),
            Column("best_step", "best step", "integer", "the one whose weights were kept"),
            Column("records", "training records", "integer"),
            Column("taught", "distilled", help="from a teacher, or on targets alone"),
            Column("before", "loss before", "number", "nats per target token"),
            Column("after", "after", "number"),
        ),
    )
