"""At a glance: quality beside size, what the model is, what calibration saw, what it weighs and would weigh."""

from collections.abc import Callable
from fractions import Fraction

import altair as alt
import pandas as pd
from msmoe.analysis.report.artefacts import Artefacts, CheckpointFolder
from msmoe.analysis.report.charts import BLUE, GREEN, GREY, stack_of
from msmoe.analysis.report.document import Block, Fact, Facts, Figure, Note, Section

from msmoe.calibration.usage import layer_frame
from msmoe.families import drops_tokens
from msmoe.units import human_bytes

SHARES = {"half": Fraction(1, 2), "a quarter": Fraction(1, 4), "an eighth": Fraction(1, 8)}
KINDS = {"original": GREY, "predicted": BLUE, "written": GREEN}
BAR = 26  # pixels
UNMEASURED = (
    "How good the model is was not measured. `msmoe evaluate CHECKPOINT --data TASK.jsonl --out results.json`, of the "
    "original and of what was made from it, or `msmoe compare` give the scores: name their results beside the others "
    "to see quality beside size here."
)
BYTES = "format(datum.value, '~s') + 'B'"  # labels of an axis


def section(artefacts: Artefacts, say: Callable[[str], None]) -> Section | None:
    lead, blocks = "", [Note(UNMEASURED)]
    if artefacts.evaluations or artefacts.comparisons:
        from msmoe.analysis.report.sections.quality import quality

        lead, blocks = quality(artefacts)
    if artefacts.layers:
        blocks += model_blocks(artefacts)
    return Section("glance", "At a glance", lead, tuple(blocks))


def model_blocks(artefacts: Artefacts) -> list[Block]:
    sizes = size_frame(artefacts)
    facts = [*model_facts(artefacts), *usage_facts(artefacts), *size_facts(sizes)]
    kept = any(stack_of(name) == "encoder" for name in artefacts.layers)
    figures = [size_figure(sizes, kept=kept)] if len(sizes) > 1 else []
    return [Facts(tuple(facts)), *figures, *notes(artefacts)]


def model_facts(artefacts: Artefacts) -> list[Fact]:
    counts = list(artefacts.layers.values())
    per_layer = str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
    facts = [Fact("Experts", f"{sum(counts):,}", f"{per_layer} in each of {len(counts)} MoE layers")]
    folder = artefacts.original or next(iter(artefacts.compressed), None)
    if folder is not None:
        summary = folder.summary
        shapes = sorted({(layer.d_model, layer.d_ff) for layer in summary.layers})
        widths = ", ".join(f"d_model {d_model}, d_ff {d_ff}" for d_model, d_ff in shapes)
        facts.append(Fact("Model", summary.model_type, f"{widths}; {', '.join(summary.dtypes)}"))
    elif artefacts.calibration is not None:
        facts.append(Fact("Model", artefacts.calibration.checkpoint.get("model_type", "unknown")))
    return facts


def usage_facts(artefacts: Artefacts) -> list[Fact]:
    stats = artefacts.calibration
    if stats is None:
        return []
    layers = layer_frame(stats)
    total, used = int(layers.num_experts.sum()), int(layers.used.sum())
    dropped, tokens = int(layers.dropped.sum()), int(layers.num_tokens.sum())
    digest = str(stats.data.get("sha256", ""))[:12]
    over = f"{dropped:,} of {tokens:,} over capacity, all layers"
    has_capacity = drops_tokens(stats.checkpoint.get("model_type"))
    return [
        Fact(
            "Calibration data",
            f"{stats.data.get('num_records', 0):,} records",
            f"{stats.data.get('num_tokens', 0):,} tokens, SHA-256 {digest}…",
        ),
        Fact("Used experts", f"{used:,} of {total:,}", "saw at least one token"),
        Fact("Dead experts", f"{total - used:,}", "saw no token"),
        Fact("Cold experts", f"{int(layers.cold.sum()):,}", "less than a tenth of an equal share"),
        *([Fact("Dropped tokens", f"{dropped / max(tokens, 1):.2%}", over)] if has_capacity else []),
    ]


def size_frame(artefacts: Artefacts) -> pd.DataFrame:
    """Checkpoints in bytes: the original, what merging would leave of it, and those that were written."""
    rows = []
    if (original := artefacts.original) is not None:
        from msmoe.planning.planner import merged_size

        rows.append({"what": "original", "kind": "original", "bytes": original.summary.num_bytes})
        for label, share in SHARES.items():
            size = merged_size(original.checkpoint, float(share))
            rows.append({"what": f"{label} of the experts", "kind": "predicted", "bytes": size["bytes"]})
    elif artefacts.compressed and (known := source_bytes(artefacts.compressed[0])):
        rows.append({"what": "original", "kind": "original", "bytes": known})
    for item in artefacts.plans:
        if item.plan.predicted:
            row = {"what": f"plan {item.label}", "kind": "predicted", "bytes": item.plan.predicted["bytes"]}
            rows.append(row)
    rows += [{"what": f.label, "kind": "written", "bytes": f.summary.num_bytes} for f in artefacts.compressed]
    frame = pd.DataFrame(rows, columns=["what", "kind", "bytes"])
    first = frame.bytes.iloc[0] if len(frame) and frame.kind.iloc[0] == "original" else None
    frame["share"] = frame.bytes / first if first else float("nan")
    frame["text"] = [
        human_bytes(size) + (f", {share:.0%}" if share == share and kind != "original" else "")
        for size, share, kind in zip(frame.bytes, frame.share, frame.kind, strict=True)
    ]
    return frame


def source_bytes(folder: CheckpointFolder) -> int | None:
    """Bytes of the original, as a compressed checkpoint remembers them."""
    return folder.provenance.get("bytes", {}).get("source")


def size_facts(sizes: pd.DataFrame) -> list[Fact]:
    names = {"original": "Original size"} | {f"{label} of the experts": f"Size at {label}" for label in SHARES}
    hints = {"predicted": "predicted, if merged", "original": "weights on disk"}
    return [
        Fact(names[what], text, hints[kind])
        for what, text, kind in zip(sizes.what, sizes.text, sizes.kind, strict=True)
        if what in names
    ]  # what was written stands in the figure


def size_figure(sizes: pd.DataFrame, *, kept: bool) -> Figure:
    """Bars of bytes.

    Args:
        kept: whether merging leaves the first MoE layer of an encoder alone, as it does by default.
    """
    left = " (the first MoE layer of the encoder kept)" if kept else ""
    base = alt.Chart(sizes).encode(y=alt.Y("what:N", title=None, sort=None))
    bars = base.mark_bar(height=BAR - 8).encode(
        x=alt.X("bytes:Q", title="weights on disk", axis=alt.Axis(labelExpr=BYTES, tickCount=6)),
        color=alt.Color(
            "kind:N", title=None, legend=alt.Legend(orient="top"),
            scale=alt.Scale(domain=list(KINDS), range=list(KINDS.values())),
        ),
        tooltip=[alt.Tooltip("what:N", title="checkpoint"), "kind:N", alt.Tooltip("bytes:Q", format=","),
                 alt.Tooltip("share:Q", title="of the original", format=".1%")],
    )  # fmt: skip
    labels = base.mark_text(align="left", dx=5).encode(
        x=alt.X("bytes:Q", scale=alt.Scale(domainMax=1.3 * sizes.bytes.max())), text="text:N"
    )
    return Figure(
        "glance-sizes",
        "Size",
        f"Bytes of weights on disk: now, predicted for merging to a share of the experts{left}, and of what was "
        "written. What merging cannot take away is everything but experts.",
        (bars + labels).properties(width="container", height=BAR * len(sizes)),
    )


def notes(artefacts: Artefacts) -> list[Note]:
    found = []
    if artefacts.calibration is None:
        found.append(Note("No statistics: give the directory that `msmoe profile` wrote to see how experts are used."))
    if shared := artefacts.num_shared_records:
        found.append(Note(f"{shared:,} sampled records stand in more than one of the statistics and count in each."))
    if artefacts.original is None:
        found.append(
            Note("No original checkpoint: give its folder to see sizes, similarities of weights and forecasts.")
        )
    return found
