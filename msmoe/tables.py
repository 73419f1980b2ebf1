"""Short tables of results, for notebooks."""

from collections.abc import Iterable, Sequence
from html import escape

MAX_ROWS = 40  # of one table: a notebook shows it whole


def html_table(title: str, head: Sequence[str], rows: Sequence[Sequence[object]], remarks: Iterable[str] = ()) -> str:
    """HTML of a title, a table and lines below it; every text is escaped.

    Args:
        rows: of at most `MAX_ROWS` the whole table is shown.
    """
    cells = lambda tag, row: "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in row)
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows[:MAX_ROWS])
    left = [f"and {len(rows) - MAX_ROWS} more"] if len(rows) > MAX_ROWS else []
    below = "".join(f"<div>{escape(line)}</div>" for line in (*left, *remarks))
    return (
        f"<b>{escape(title)}</b><table><thead><tr>{cells('th', head)}</tr></thead><tbody>{body}</tbody></table>{below}"
    )
