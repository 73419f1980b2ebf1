"""What the subcommands share: tables on stdout, progress bars on stderr, numbers for people."""

import contextlib
import json
from collections.abc import Callable, Iterator

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

BLOCKS = " ▁▂▃▄▅▆▇█"


def console() -> Console:
    """Console on stdout; a file or a pipe gets lines as long as they need to be."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=200)


@contextlib.contextmanager
def progress(label: str) -> Iterator[Callable[..., None]]:
    """Progress bar on stderr, off when stderr is no terminal; yields `update(done, total, note="")`."""
    silence_transformers()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not Console(stderr=True).is_terminal,
        transient=True,
    )
    with bar, data_warnings_shown():
        task = bar.add_task(label, total=None)

        def update(done: int, total: int, note: str = "") -> None:
            bar.update(task, completed=done, total=total, description=f"{label}  {note}" if note else label)

        yield update


@contextlib.contextmanager
def data_warnings_shown() -> Iterator[None]:
    """Warnings about the data, each as one line on stderr."""
    import warnings

    from msmoe.calibration.records import DataWarning

    with warnings.catch_warnings():
        shown = warnings.showwarning

        def show(message, category, *rest, **more) -> None:
            if issubclass(category, DataWarning):
                click.echo(f"msmoe: warning: {message}", err=True)
            else:
                shown(message, category, *rest, **more)

        warnings.showwarning = show
        warnings.simplefilter("always", DataWarning)
        yield


def silence_transformers() -> None:
    """No progress bars and no advice of the library between our own lines."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def print_json(content: object) -> None:
    click.echo(json.dumps(content, indent=1, allow_nan=False))


def table(*columns: str, title: str | None = None) -> Table:
    """Table whose first column is text and whose others are numbers, right-aligned."""
    result = Table(
        title=title, title_justify="left", header_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for i, name in enumerate(columns):
        result.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    return result


def usage_table(stats) -> Table:
    """Per-layer expert usage: one bar per expert, entropy, the largest share, dropped tokens.

    Args:
        stats: `msmoe.Stats`.
    """
    from msmoe.usage import entropy

    result = table("layer", "tokens", "dropped", "largest", "entropy", "unused", title="Expert usage (routed tokens)")
    result.add_column("usage of experts 0, 1, ...", justify="left", no_wrap=True)
    for name, layer in stats.layers.items():
        usage = layer.usage_frequency.numpy()
        result.add_row(
            Text(name),
            f"{layer.num_tokens:,}",
            f"{layer.dropped / max(layer.num_tokens, 1):.1%}",
            f"{usage.max():.1%}",
            f"{entropy(usage):.2f}",
            str(int((layer.routed == 0).sum())),
            Text(sparkline(usage)),
        )
    return result


def sparkline(values) -> str:
    """One block character per value, scaled to the largest; zero is a blank."""
    largest = max(values) or 1
    return "".join(BLOCKS[0 if v == 0 else max(1, round(v / largest * 8))] for v in values)
