"""The `msmoe` command: parse, call, print. One file per subcommand."""

import importlib
import sys

import click

from msmoe.errors import UserError

COMMANDS = (
    "inspect", "convert", "profile", "plan", "apply", "factorize", "recover", "compress", "evaluate", "compare",
    "report", "methods", "demo",
)  # fmt: skip


class LazyGroup(click.Group):
    """Imports a subcommand when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return getattr(importlib.import_module(f"msmoe.cli.{cmd_name}"), "command")  # noqa: B009


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="msmoe")
def app() -> None:
    """Make Mixture-of-Experts checkpoints small: profile, plan, apply, evaluate.

    \b
    msmoe demo                                                     see all of it on a small trained checkpoint
    msmoe compress CKPT --data calibration.jsonl --experts 8 --out DIR    do all of it on yours

    A mistake in the input ends with exit code 2 and one line; --debug, anywhere, shows the traceback.
    """


def main() -> None:
    """Entry point of the command."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        code = app.main(args=arguments, prog_name="msmoe", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except (UserError, click.ClickException) as error:
        if debug:
            raise
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        click.echo(f"msmoe: {' '.join(message.split())}", err=True)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("msmoe: interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)


__all__ = ["app", "main"]
