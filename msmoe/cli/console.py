"""What the subcommands share: tables on stdout, progress bars on stderr, numbers for people."""

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

import msmoe
from msmoe.errors import MsmoeWarning
from msmoe.formats.imports import when_imported

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

BLOCKS = " ▁▂▃▄▅▆▇█"


def console() -> "Console":
    """Console on stdout; a file or a pipe gets lines as long as they need to be."""
    from rich.console import Console

    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=200)


@contextlib.contextmanager
def progress(label: str) -> Iterator[Callable[..., None]]:
    """Progress bar on stderr, off when stderr is no terminal; yields `update(done, total, note="")`."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

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
    with bar:
        task = bar.add_task(label, total=None)

        def update(done: int, total: int, note: str = "") -> None:
            bar.update(task, completed=done, total=total, description=f"{label}  {note}" if note else label)

        yield update


def quieten_transformers() -> None:
    """No progress bars and no advice of the library between our own lines, from the moment when it is imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    when_imported("transformers.utils.logging", silence_transformers)


def silence_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


@contextlib.contextmanager
def print_warnings_as_lines(*, everything: bool = False) -> Iterator[None]:
    """Print the package's warnings as lines on stderr, those of libraries not at all.

    Args:
        everything: print all warnings as Python does.
    """
    if everything:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("always", MsmoeWarning)
        said: set[str] = set()

        def once(message, *rest) -> None:
            if str(message) not in said:  # a comparison reads its data many times
                said.add(str(message))
                show_warning(message, *rest)

        warnings.showwarning = once
        yield


def show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """In the place of `warnings.showwarning`."""
    if issubclass(category, MsmoeWarning) or Path(filename).is_relative_to(Path(msmoe.__file__).parent):
        click.echo(f"msmoe: warning: {' '.join(str(message).split())}", err=True)


def print_json(content: object) -> None:
    """Print JSON; a number that is not finite, which JSON has no word for, is null."""
    from msmoe.strict_json import without_nan

    click.echo(json.dumps(without_nan(content), indent=1, allow_nan=False))


def table(*columns: str, title: str | None = None) -> "Table":
    """Table whose first column is text and whose others are numbers, right-aligned."""
    from rich.table import Table

    result = Table(
        title=title, title_justify="left", header_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for i, name in enumerate(columns):
        result.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    return result


def usage_table(stats) -> "Table":
    """Per-layer expert usage: one bar per expert, entropy, the largest share, and dropped tokens where some can be.

    Args:
        stats: `msmoe.Stats`.
    """
    from rich.text import Text

    from msmoe.calibration.usage import entropy
    from msmoe.families import drops_tokens

    has_capacity = drops_tokens(stats.checkpoint.get("model_type"))
    dropped = ["dropped"] if has_capacity else []
    result = table("layer", "tokens", *dropped, "largest", "entropy", "unused", title="Expert usage (routed tokens)")
    result.add_column("usage of experts 0, 1, ...", justify="left", no_wrap=True)
    for name, layer in stats.layers.items():
        usage = layer.usage
        result.add_row(
            Text(name),
            f"{layer.num_tokens:,}",
            *([f"{layer.dropped / max(layer.num_tokens, 1):.1%}"] if has_capacity else []),
            f"{usage.max():.1%}",
            f"{entropy(usage):.2f}",
            str(int((layer.array("routed") == 0).sum())),
            Text(sparkline(usage)),
        )
    return result


def sparkline(values) -> str:
    """One block character per value, scaled to the largest; zero is a blank."""
    largest = max(values) or 1
    return "".join(BLOCKS[0 if v == 0 else max(1, round(v / largest * 8))] for v in values)
