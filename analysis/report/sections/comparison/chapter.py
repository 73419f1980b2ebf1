"""Which method keeps most of the model at which size: comparisons, two of them side by side, evaluations."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pandas as pd
from msmoe.analysis.cost_tables import MEASURES, value
from msmoe.analysis.report.artefacts import Artefacts, Comparison
from msmoe.analysis.report.document import Block, Column, Facts, Note, Section, Table, distinct, shorten
from msmoe.analysis.report.sections.comparison.evaluations import evaluation_blocks, evaluation_lead
from msmoe.analysis.report.sections.comparison.pareto import pareto_figure
from msmoe.analysis.report.sections.comparison.runs import run_blocks
from msmoe.analysis.report.sections.comparison.tasks import layer_figure, task_figure

from msmoe.comparison.summary import FULL, MISSING, SAME_AS_BEST, SAME_AS_FULL, Row, Size, Summary
from msmoe.comparison.summary import Column as Measure

MAX_COMPARISONS = 4  # that are shown
MAX_WARNINGS = 8
MAX_NAMED = 3  # methods in a sentence
DIGITS = 6  # after the point, in tables
MAX_SIZES = 3  # in the first sentence
NAME, WARNING = 80, 400  # characters of names in tables, of a warning


def section(artefacts: Artefacts, say: Callable[[str], None]) -> Section | None:
    comparisons = artefacts.comparisons[:MAX_COMPARISONS]
    if not comparisons and not artefacts.evaluations:
        return None
    labels = distinct([item.label for item in comparisons])
    leads, blocks = [], []
    for i, (item, label) in enumerate(zip(comparisons, labels, strict=True)):
        say(label)
        suffix, prefix = ("", "") if len(comparisons) == 1 else (f"-{i + 1}", f"{label}: ")
        leads.append(prefix + lead(item.summary))
        blocks += [titled(block, prefix) for block in comparison_blocks(item, suffix)]
        if i > 0:
            say(f"{labels[0]} and {label}")
            blocks += run_blocks(comparisons[0], item, (labels[0], label), f"-{i + 1}")
    if len(artefacts.comparisons) > MAX_COMPARISONS:
        blocks.append(Note(f"Of {len(artefacts.comparisons)} comparisons, the first {MAX_COMPARISONS} are shown."))
    if artefacts.evaluations:
        say("evaluations")
        leads.append(evaluation_lead(artefacts.evaluations))
        blocks += evaluation_blocks(artefacts.evaluations)
    return Section("comparison", "Comparison", " ".join(leads), tuple(blocks))


def titled(block: Block, prefix: str) -> Block:
    """The block with the run that it is of."""
    return block if isinstance(block, Note | Facts) else replace(block, title=prefix + block.title)


def comparison_blocks(item: Comparison, suffix: str) -> list[Block]:
    summary = item.summary
    blocks: list[Block | None] = [pareto_figure(summary, f"comparison-pareto{suffix}")]
    if summary.warnings:
        blocks.append(caution(summary.warnings))
    blocks += [score_table(summary, f"comparison-scores{suffix}"), Note(" ".join(summary.legend))]
    blocks += [task_figure(summary, f"comparison-tasks{suffix}"), layer_figure(summary, f"comparison-layers{suffix}")]
    if item.content.get("cost"):
        blocks.append(cost_table(item.content["cost"], f"comparison-cost{suffix}"))
    return [block for block in blocks if block is not None] + [Note(text) for text in lacking(item)]


def caution(warnings: Sequence[str]) -> Note:
    """What to be careful about, the first few."""
    items = [shorten(text, WARNING) for text in warnings[:MAX_WARNINGS]]
    if len(warnings) > MAX_WARNINGS:
        items.append(f"and {len(warnings) - MAX_WARNINGS} more, in comparison.md")
    return Note("Read with care:", tuple(items))


def lacking(item: Comparison) -> list[str]:
    """What was not measured, and how to get it."""
    rows = [row for size in item.summary.sizes for row in size.rows]
    texts = []
    if not any(row.method == FULL for row in rows):
        texts.append(f"Add {FULL} to --methods of `msmoe compare --resume` to see differences to the full model.")
    if not any(row.layer_loss for row in rows):
        texts.append("Add 0 to --recover-steps of `msmoe compare --resume` to see the loss of each layer alone.")
    if not item.content.get("cost"):
        texts.append("Repeat `msmoe compare --resume` with --cost to see speed and memory beside the original's.")
    return texts


def lead(summary: Summary) -> str:
    """The best method of each size, with what it cannot be told from; before any recovery if that was measured."""
    steps, sizes = summary.recover_steps[0], summary.sizes
    shown = sizes if len(sizes) <= MAX_SIZES else [*sizes[: MAX_SIZES - 1], sizes[-1]]
    found = [f"at {size.title} {best}" for size in shown if (best := best_of(summary, size, steps))]
    if not found:
        return "No method was measured on all tasks."
    trained = f" after {steps:,} steps of recovery" if steps else ""
    return f"Best {summary.mean_title}{trained}: {'; '.join(found)}."


def best_of(summary: Summary, size: Size, steps: int) -> str:
    """The best method of a size in words; empty without any mean."""
    column = Measure("mean", summary.mean_title, None, steps)
    scores = {row.method: score for row in size.methods if (score := row.score(column))}
    best = next((method for method, score in scores.items() if score.is_best), None)
    if best is None:
        return ""
    score = scores[best]
    same = [shorten(method) for method, other in scores.items() if SAME_AS_BEST in other.marks]
    if len(same) > MAX_NAMED:
        same = [*same[:MAX_NAMED], f"{len(same) - MAX_NAMED} more methods"]
    if SAME_AS_FULL in score.marks:
        same.append("the full model")
    text = f"{shorten(best)} with {score.with_interval}"
    if same:
        return f"{text}, not distinguishable from {', '.join(same[:-1])}{' and ' if same[:-1] else ''}{same[-1]}"
    return f"{text}, distinguishable from all others" if len(scores) > 1 or score.p_full is not None else text


def score_table(summary: Summary, name: str) -> Table:
    """One row per size and method; the number behind a text is in a field of its own."""
    measures = summary.columns()
    frame = pd.DataFrame([score_record(size, row, measures) for size in summary.sizes for row in size.rows])
    columns = [
        Column("size", "size", "number", "experts per layer that the methods of a table were given the bytes of"),
        Column("method", "method"),
        Column("kind", "kind"),
        Column("seeds", "seeds", "integer", "with one seed, marks speak of these checkpoints, not of the method"),
        Column("bytes", "stored", "bytes", "the most over recovery steps"),
        Column("experts", "experts", "number", "stored per compressed layer, on average"),
    ]
    columns += [
        Column(f"text {i}", shorten(measure.heading), by=f"value {i}", strong=f"best {i}")
        for i, measure in enumerate(measures)
    ]
    return Table(
        name,
        "All scores",
        "One row per size and method, references first, then by the mean; the best of a column at its size is bold. "
        "Click a heading to sort by it, filter by a method, a kind or a mark.",
        frame,
        tuple(columns),
        is_essential=True,
    )


def score_record(size: Size, row: Row, measures: Sequence[Measure]) -> dict[str, object]:
    record: dict[str, object] = {
        "size": size.experts,
        "method": shorten(row.method, NAME),
        "kind": shorten(row.kind, NAME) or MISSING,
        "seeds": row.num_seeds,
        "bytes": row.num_bytes,
        "experts": row.average_kept,
    }
    for i, measure in enumerate(measures):
        score, cell = row.score(measure), row.cell(measure)
        number = row.rank(measure) if measure.quantity == "rank" else score and round(score.value, DIGITS)
        record |= {f"text {i}": cell.text, f"value {i}": number, f"best {i}": cell.is_best}
        if score:
            record |= {f"low {i}": round(score.low, DIGITS), f"high {i}": round(score.high, DIGITS)}
    return record


def cost_table(costs: Mapping[str, Mapping], name: str) -> Table:
    """One row per method and size; what a measure is relative to the original's stands behind it."""
    records = []
    for key, entry in costs.items():
        method, _, experts = key.rpartition("/")
        record: dict[str, object] = {"method": shorten(method, NAME), "experts": float(experts)}
        for heading, keys, factor in MEASURES:
            own, full = value(entry, keys) * factor, value(entry["full"], keys) * factor
            record |= {heading: own, f"original's {heading}": full, f"text {heading}": f"{own:,.4g} ({own / full:.2f})"}
        records.append(record)
    measures = [Column(f"text {heading}", heading, by=heading) for heading, _, _ in MEASURES]
    return Table(
        name,
        "Cost",
        "What compressed models cost to run; in brackets relative to the original, measured in the same process in "
        "turns. Prefill is one forward pass over source and target tokens, in batches and record by record; peak "
        "memory is of a process of its own.",
        pd.DataFrame(records),
        (Column("method", "method"), Column("experts", "size", "number", "experts per layer"), *measures),
    )
