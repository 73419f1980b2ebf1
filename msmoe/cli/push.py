"""`--push`: upload what a command wrote."""

import functools
from collections.abc import Callable
from typing import Any

import click


def push_option(function: Callable) -> Callable:
    """The option `--push` of a command with `--out`: checked before the work, done after it."""

    @functools.wraps(function)
    def with_push(*, push: str | None, **arguments: Any) -> None:
        if push is None or arguments.get("dry_run"):
            function(**arguments)
            return
        from msmoe.checkpoint.upload import check_upload, upload

        check_upload(push)
        function(**arguments)
        click.echo(f"pushed to {upload(arguments['out'], push)}", err=True)

    help_text = "Upload the output to this repository of the hub; needs a token (`hf auth login`, or HF_TOKEN)."
    return click.option("--push", metavar="OWNER/NAME", help=help_text)(with_push)
