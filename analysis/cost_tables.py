"""What the compressed models cost to run, each beside the original that took turns with it: Markdown and CSV."""

import csv
import io
from collections.abc import Mapping

from msmoe.analysis.comparison_tables import escape_markdown, markdown_line

MEASURES = (  # heading, keys in the entry, unit's factor
    ("MFLOP per token", ("flops_per_token",), 1e-6),
    ("prefill tokens/s", ("prefill", "tokens_per_second"), 1),
    ("prefill p50 ms", ("prefill", "p50_seconds"), 1e3),
    ("prefill p95 ms", ("prefill", "p95_seconds"), 1e3),
    ("generated tokens/s", ("generation", "tokens_per_second"), 1),
    ("generation p50 ms", ("generation", "p50_seconds"), 1e3),
    ("generation p95 ms", ("generation", "p95_seconds"), 1e3),
    ("peak memory MB", ("peak_memory_bytes",), 1e-6),
)


def value(entry: Mapping, keys: tuple[str, ...]) -> float:
    """A number of an entry by its path of keys."""
    for key in keys:
        entry = entry[key]
    return float(entry)  # type: ignore[arg-type]


def cost_markdown(costs: Mapping[str, Mapping]) -> str:
    """One row per method and size: every measure, and in brackets what it is relative to the original's."""
    if not costs:
        return ""
    lines = [
        "",
        "## Cost",
        "",
        "In brackets: relative to the original, measured in the same process in turns. Prefill: one forward pass over "
        "source and target tokens, in batches and record by record. Peak memory: of a process of its own.",
        "",
        markdown_line(["method / experts", *[heading for heading, _, _ in MEASURES]]),
        "|---" * (len(MEASURES) + 1) + "|",
    ]
    for name, entry in costs.items():
        cells = []
        for _, keys, factor in MEASURES:
            own, full = value(entry, keys), value(entry["full"], keys)
            cells.append(f"{own * factor:,.4g} ({own / full:.2f})")
        lines.append(markdown_line([escape_markdown(name), *cells]))
    return "\n".join([*lines, ""])


def cost_csv(costs: Mapping[str, Mapping]) -> str:
    """One line per method, size and measure, in the units of `results.json`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "experts", "measure", "value", "full"])
    for name, entry in costs.items():
        method, _, experts = name.rpartition("/")
        for _, keys, _ in MEASURES:
            writer.writerow([method, experts, ".".join(keys), value(entry, keys), value(entry["full"], keys)])
    return text.getvalue()
