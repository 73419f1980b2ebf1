"""A report as text: facts, findings, the usage map in block characters, and the essential tables."""

from collections.abc import Iterator

import numpy as np
from msmoe.analysis.report.build import Report
from msmoe.analysis.report.charts import short_names
from msmoe.analysis.report.document import Facts, Note, Section, Table, printable, shorten
from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.table import Table as Grid
from rich.text import Text

from msmoe.calibration.stats import Stats
from msmoe.calibration.usage import effective_experts
from msmoe.families import drops_tokens

BLOCKS = " ▁▂▃▄▅▆▇█"
SHADES = "·░▒▓█"
MAX_CELLS = 64  # of the map; more experts share cells
MAX_ROWS, MAX_COLUMNS = 20, 7  # of a table


def to_text(report: Report) -> Group:
    """What rich prints for a report."""
    parts: list[RenderableType] = [Text(printable(report.document.title), style="bold")]
    parts.append(Text(printable(report.document.subtitle)))
    for section in report.document.sections:
        parts += section_text(section, report.artefacts.calibration)
    return Group(*parts)


def section_text(section: Section, stats: Stats | None) -> Iterator[RenderableType]:
    yield Text()
    yield Rule(section.title, align="left", style="dim")
    if section.lead:
        yield Text(printable(section.lead))
    if section.key == "usage" and stats is not None:
        yield usage_grid(stats)
    for block in section.blocks:
        if isinstance(block, Facts):
            yield facts_grid(block)
        elif isinstance(block, Note):
            yield Text(f"note: {printable(block.text)}", style="italic")
            yield from (Text(f"  - {printable(item)}", style="italic") for item in block.items)
        elif isinstance(block, Table) and block.is_essential and len(block.frame):
            yield Text()
            yield table_grid(block)


def facts_grid(block: Facts) -> Grid:
    grid = Grid(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for fact in block.facts:
        grid.add_row(*(Text(printable(text)) for text in (fact.label, fact.value, fact.hint)))
    return grid


def table_grid(table: Table) -> Grid:
    """The first rows and columns of a table."""
    more = len(table.frame) - MAX_ROWS
    title = table.title + (f" (first {MAX_ROWS} of {len(table.frame):,} rows)" if more > 0 else "")
    grid = Grid(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    columns = table.columns[:MAX_COLUMNS]
    for column in columns:
        grid.add_column(column.heading, justify="left" if column.is_text else "right")
    fields = [column.field for column in columns]
    for row in table.frame.head(MAX_ROWS)[fields].itertuples(index=False, name=None):
        shown = [printable(column.show(value)) for column, value in zip(columns, row, strict=True)]
        grid.add_row(*map(Text, shown))
    return grid


def usage_grid(stats: Stats) -> Grid:
    """Usage of the experts of each layer by index, in shades of the layer's largest; and sorted, as a sparkline."""
    grid = Grid(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("layer", "usage by expert, · is none", "sorted"):
        grid.add_column(heading, no_wrap=True)
    has_capacity = drops_tokens(stats.checkpoint.get("model_type"))
    for heading in ("dropped", "effective experts")[not has_capacity :]:
        grid.add_column(heading, justify="right")
    short = short_names(list(stats.layers))
    for name, layer in stats.layers.items():
        seen = layer.num_tokens > 0
        usage = layer.usage * seen
        grid.add_row(
            Text(shorten(short[name])),
            Text(characters(usage, SHADES)),
            Text(characters(np.sort(usage)[::-1], BLOCKS)),
            *([f"{layer.dropped / max(layer.num_tokens, 1):.1%}"] if has_capacity else []),
            f"{effective_experts(usage):.1f} of {len(usage)}" if seen else "-",
        )
    return grid


def characters(values: np.ndarray, levels: str) -> str:
    """One character per value, or per few neighbouring values of which the largest counts; the first is for zero.

    Args:
        values: (E,) non-negative.
    """
    size = -(-len(values) // MAX_CELLS)
    cells = [values[i : i + size].max() for i in range(0, len(values), size)]
    top = len(levels) - 1
    largest = max([*cells, 1e-30])
    return "".join(levels[0 if v <= 0 else max(1, round(v / largest * top))] for v in cells)
