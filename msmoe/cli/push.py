"""`--push`: upload what a command wrote."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import click


@contextlib.contextmanager
def pushed(out: Path, repository: str | None) -> Iterator[None]:
    """Check before the work that a repository can be pushed to, and upload the folder `out` after it."""
    if repository is None:
        yield
        return
    from msmoe.checkpoint.upload import check_upload, upload

    check_upload(repository)
    yield
    click.echo(f"pushed to {upload(out, repository)}", err=True)
