"""Tables of a comparison: Markdown to read, CSV to compute with, LaTeX to print."""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from itertools import groupby

from msmoe.comparison.summary import LABELS, MISSING, SAME_AS_BEST, SAME_AS_FULL, Column, Row, Score, Size, Summary

MARKDOWN_SYNTAX = re.compile(r"([\\`*_\[\]<>|~&$#])")
LATEX_SYNTAX = {  # a star or bracket that begins a row would be an argument of the line break before it
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "*": "{*}", "[": "{[}", '"': r"\textquotedbl{}", "≥": r"$\geq$", "±": r"$\pm$",
    SAME_AS_FULL: r"$\approx$", SAME_AS_BEST: r"$\dagger$",
}  # fmt: skip
FIELDS: tuple[str, ...] = (
    "method", "kind", "experts", "average_kept", "bytes", "recover_steps", "task", "metric", "value", "low", "high",
    "num_examples", "num_seeds", "p_full", "p_best", "rank", "speaks_of",
)  # fmt: skip
MEAN = "(mean)"
LAST_T1 = 0x180  # Latin Extended-A ends here


def markdown(summary: Summary, *, figures: Sequence[str] = ()) -> str:
    """A report: warnings, one table per size, legend, tasks.

    Args:
        figures: addresses of pictures to show, relative to the report.
    """
    steps = ", ".join("no training" if not n else f"{n} steps of recovery" for n in summary.recover_steps)
    lines = [
        f"# Comparison of {escape_markdown(summary.checkpoint)}",
        "",
        f"{summary.num_parameters:,} parameters, {summary.num_bytes:,} bytes; calibrated on "
        f"{escape_markdown(summary.calibration)}; {steps}.",
        "",
    ]
    if summary.warnings:
        lines += ["**Read with care:**", "", *[f"- {escape_markdown(w)}" for w in summary.warnings], ""]
    if len(summary.sizes) > 1:
        lines += ["## All sizes", "", *overview_table(summary), ""]
    for size in summary.sizes:
        lines += [f"## {escape_markdown(size.title)}", "", *markdown_table(summary, size), ""]
    for text in summary.legend:
        lines += [escape_markdown(text), ""]
    lines += ["Tasks:", "", *[f"- {escape_markdown(str(task))}" for task in summary.tasks], ""]
    for figure in figures:
        lines += [f"![{escape_markdown(figure)}]({figure})", ""]
    return "\n".join(lines)


def overview_table(summary: Summary) -> list[str]:
    """Lines of one table for all sizes: the mean score of every method, the best methods over the sizes first."""
    columns = summary.columns(tasks=False)
    columns = [column for column in columns if column.quantity == "mean"]
    found: dict[str, dict[float, Row]] = {}
    for size in summary.sizes:
        for row in size.rows:
            found.setdefault(row.method, {})[size.experts] = row
    sign = 1 if summary.mean_metric == "loss" else -1

    def order(method: str) -> tuple[bool, float]:
        scores = [row.score(columns[0]) for row in found[method].values()]
        values = [score.value if score else sign * float("inf") for score in scores]
        return not next(iter(found[method].values())).is_reference, sign * sum(values) / len(values)

    heads = [f"{size.experts:g} experts{column.heading.removeprefix(summary.mean_title)}"
             for column in columns for size in summary.sizes]  # fmt: skip
    lines = [markdown_line(["method", "kind", *map(escape_markdown, heads)]), "|---|---|" + "---:|" * len(heads)]
    for method in sorted(found, key=order):
        rows = [found[method].get(size.experts) for size in summary.sizes]
        cells = [row.cell(column) if row else None for column in columns for row in rows]
        texts = [("**%s**" if cell.is_best else "%s") % cell.text if cell else "" for cell in cells]
        kind = next(iter(found[method].values())).kind
        lines.append(markdown_line([escape_markdown(method), escape_markdown(kind), *texts]))
    return lines


def markdown_table(summary: Summary, size: Size) -> list[str]:
    """Lines of the table of one size; the best of a column is bold."""
    columns = summary.columns()
    heads = [*LABELS, *[column.heading for column in columns]]
    return [
        markdown_line(map(escape_markdown, heads)),
        "|---|---|" + "---:|" * (len(heads) - 2),
        *[markdown_row(row, columns) for row in size.rows],
    ]


def markdown_row(row: Row, columns: Sequence[Column]) -> str:
    numbers = [f"**{cell.text}**" if cell.is_best else cell.text for cell in row.cells(columns)]
    return markdown_line([*map(escape_markdown, row.labels), *numbers])


def markdown_line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def escape_markdown(text: str) -> str:
    """Plain text for a paragraph or a table's cell."""
    return MARKDOWN_SYNTAX.sub(r"\\\1", " ".join(text.split()))


def comparison_csv(summary: Summary) -> str:
    """Long form: a line per method, size, recovery and task; the mean over tasks is the task `(mean)`.

    `experts` is the size of the table. References stand beside every size, since `p_best` depends on it; their
    own is `average_kept`. `p_full` and `p_best` are after Holm's correction. Empty where there is no value.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    for size in summary.sizes:
        for row in size.rows:
            writer.writerows(csv_lines(summary, size, row))
    return text.getvalue()


def csv_lines(summary: Summary, size: Size, row: Row) -> list[dict[str, object]]:
    """Lines of one method at one size."""
    lines = []
    for steps, measured in row.measurements.items():
        named = [(task.name, task.metric, measured.scores.get(task.name)) for task in summary.tasks]
        for task, metric, score in [(MEAN, summary.mean_metric, measured.mean), *named]:
            if score is None:
                continue
            lines.append(
                {
                    "method": row.method,
                    "kind": row.kind,
                    "experts": f"{size.experts:g}",
                    "average_kept": f"{row.average_kept:g}",
                    "bytes": measured.num_bytes,
                    "recover_steps": steps,
                    "task": task,
                    "metric": metric,
                    "num_examples": score.num_examples,
                    "num_seeds": score.num_seeds,
                    "speaks_of": score.speaks_of,
                    "rank": number(measured.rank) if task == MEAN else "",
                }
                | {name: number(getattr(score, name)) for name in ("value", "low", "high", "p_full", "p_best")}
            )
    return lines


def number(value: float | None) -> str:
    """Eight digits: beyond them results differ by thread counts."""
    return "" if value is None else f"{value:.8g}"


def latex(summary: Summary) -> str:
    """A `table` per size, to `\\input` into a document with booktabs and graphicx."""
    return "\n".join(latex_table(summary, size) for size in summary.sizes)


def latex_document(tables: str) -> str:
    """A document that compiles on its own and shows the tables of a file.

    Args:
        tables: name of the file beside the document, without `.tex`.
    """
    return "\n".join(
        [
            r"\documentclass{article}",
            r"\usepackage[utf8]{inputenc}",
            r"\usepackage[T1]{fontenc}",
            r"\usepackage[landscape,margin=1cm]{geometry}",
            r"\usepackage{booktabs,graphicx}",
            r"\begin{document}",
            rf"\input{{{tables}}}",
            r"\end{document}",
            "",
        ]
    )


def latex_table(summary: Summary, size: Size) -> str:
    """Float with a table of one size, scaled down where it is wider than the text."""
    columns = summary.columns()
    body = [latex_row(row, columns) for row in size.rows]
    num_references = len(size.rows) - len(size.methods)
    if 0 < num_references < len(body):
        body.insert(num_references, r"\midrule")
    caption = f"{summary.checkpoint}: {size.title}."
    return "\n".join(
        [
            r"\begin{table}[tbp]",
            r"\centering",
            rf"\caption{{{escape_latex(caption)}}}",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{ll{'r' * (len(LABELS) - 2 + len(columns))}}}",
            r"\toprule",
            *latex_head(columns),
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}}",
            rf"\par\smallskip\parbox{{\linewidth}}{{\footnotesize {escape_latex(' '.join(summary.legend))}}}",
            r"\end{table}",
            "",
        ]
    )


def latex_head(columns: Sequence[Column]) -> list[str]:
    """Column heads; after more than one recovery, a head over each quantity and the steps below it."""
    labels = [escape_latex(label) for label in LABELS]
    blocks = [(title, len(list(block))) for (_, title), block in groupby(columns, key=lambda c: (c.task, c.title))]
    if len(blocks) == len(columns):
        return [latex_line([*labels, *[escape_latex(column.heading) for column in columns]])]
    over = [rf"\multicolumn{{{width}}}{{c}}{{{escape_latex(title)}}}" for title, width in blocks]
    rules, first = [], len(labels) + 1
    for _, width in blocks:
        rules.append(rf"\cmidrule(lr){{{first}-{first + width - 1}}}")
        first += width
    steps = [f"@{column.recover_steps}" for column in columns]
    return [latex_line([*[""] * len(labels), *over]), "".join(rules), latex_line([*labels, *steps])]


def latex_row(row: Row, columns: Sequence[Column]) -> str:
    cells = [latex_cell(row, column) for column in columns]
    return latex_line([*[escape_latex(label) for label in row.labels], *cells])


def latex_cell(row: Row, column: Column) -> str:
    """The value, bold if best, with its interval in small print and its marks raised."""
    score = row.score(column)
    if score is None:
        return row.cell(column).text.replace(MISSING, "--")
    text = rf"\textbf{{{score}}}" if score.is_best else str(score)
    interval = rf" {{\scriptsize [{score.low:.3f}, {score.high:.3f}]}}" if column.quantity == "mean" else ""
    return text + latex_marks(score) + interval


def latex_marks(score: Score) -> str:
    marks = {SAME_AS_FULL: r"\approx", SAME_AS_BEST: r"\dagger"}
    raised = "".join(marks[mark] for mark in score.marks)
    return f"$^{{{raised}}}$" if raised else ""


def latex_line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def escape_latex(text: str) -> str:
    """Plain text for a paragraph or a table's cell; a character that T1 fonts lack becomes its code point."""

    def escape(character: str) -> str:
        known = LATEX_SYNTAX.get(character, character)
        return known if character in LATEX_SYNTAX or ord(character) < LAST_T1 else f"U+{ord(character):04X}"

    return "".join(map(escape, " ".join(text.split())))
