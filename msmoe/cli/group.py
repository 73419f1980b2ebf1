"""The group of subcommands: what `msmoe --help` shows, what a typo meant, how a run ends."""

import difflib
import importlib
import os
import sys

import click

from msmoe.cli import COMMANDS
from msmoe.cli.console import print_warnings_as_lines, quieten_transformers
from msmoe.cli.faults import explain

USER, DONE = 2, 0  # exit codes: what the caller can mend; all is well


class LazyGroup(click.Group):
    """Imports a subcommand when it is asked for, none of them for the list."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return getattr(importlib.import_module(f"msmoe.cli.{cmd_name}"), "command")  # noqa: B009

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(self, ctx: click.Context, args: list[str]):
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            close = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f" - did you mean {close[0]!r}?" if close else "."
            ctx.fail(f"no command {name!r}{hint} Commands: {', '.join(COMMANDS)}")
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list:
        """Names of commands and options, without importing a command."""
        from click.shell_completion import CompletionItem

        names = [CompletionItem(name, help=line) for name, line in COMMANDS.items() if name.startswith(incomplete)]
        return names + click.Command.shell_complete(self, ctx, incomplete)


def print_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from importlib.metadata import version

    click.echo(f"msmoe, version {version('msmoe')}")
    ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=print_version, help="Show the version."
)
def app() -> None:
    """Make Mixture-of-Experts checkpoints small: profile, plan, apply, evaluate.

    \b
    msmoe demo                                                     see all of it on a small trained checkpoint
    msmoe compress CKPT --data calibration.jsonl --experts 8 --out DIR    do all of it on yours

    A mistake in the input, a full disk or too little memory ends with exit code 2 and one line; --debug, anywhere,
    shows the traceback. An interrupt ends with 130, SIGTERM with 143.

    \b
    Names and options complete with the tab key after
      eval "$(_MSMOE_COMPLETE=bash_source msmoe)"    (zsh_source, fish_source)
    """


def run_command(arguments: list[str]) -> None:
    """Run a command line and end the process.

    Raises:
        SystemExit: always, but for faults of ours and under `--debug`.
    """
    given = [argument for argument in arguments if argument != "--debug"]
    debug = len(given) < len(arguments)
    check_streams()
    quieten_transformers()
    code = DONE
    try:
        with print_warnings_as_lines(everything=debug):
            complete_if_asked()
            with app.make_context("msmoe", given) as context:
                app.invoke(context)
        sys.stdout.flush()
    except BrokenPipeError:
        discard_stdout()
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        code = USER
    except Exception as error:
        line = explain(error)
        if line is None or debug:
            raise
        click.echo(f"msmoe: {line}", err=True)
        discard_stdout()
        code = USER
    sys.exit(code)


def complete_if_asked() -> None:
    """Answer a shell that completes names, and end.

    Raises:
        SystemExit: if a shell asks.
    """
    instruction = os.environ.get("_MSMOE_COMPLETE")
    if instruction:
        from click.shell_completion import shell_complete

        sys.exit(shell_complete(app, {}, "msmoe", "_MSMOE_COMPLETE", instruction))


def check_streams() -> None:
    """Refuse to start without a standard output: the first file opened would take its place.

    Raises:
        SystemExit: with code 2.
    """
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - open as long as the process
    if sys.stdout is None:
        click.echo("msmoe: standard output is closed: open it, e.g. with > /dev/null", err=True)
        sys.exit(USER)
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")  # names of files need not be text


def discard_stdout() -> None:
    """What could not be written is not tried again when the interpreter ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
