"""`msmoe methods`"""

import click

from msmoe.cli.console import console, print_json, table
from msmoe.cli.options import json_option


@click.command("methods")
@json_option
def command(as_json: bool) -> None:
    """List every method with one line and its source, and the choices that a plan has.

    \b
    Example: msmoe methods
    """
    from msmoe.planning.methods import METHODS
    from msmoe.planning.parameters import CHOICES, STATISTICS

    if as_json:
        print_json(
            {
                m.name: {
                    "kind": m.kind,
                    "summary": m.summary,
                    "source": m.source,
                    "needs": list(m.defaults.needs),
                    "defaults": m.defaults.to_dict(),
                }
                for m in METHODS.values()
            }
        )
        return
    rows = table("method")
    rows.add_column("kind", justify="left")
    rows.add_column("what it does", justify="left", overflow="fold")
    rows.add_column("needs", justify="left", overflow="fold")
    rows.add_column("source", justify="left", overflow="fold")
    for method in METHODS.values():
        needs = ", ".join(method.defaults.needs)
        rows.add_row(method.name, method.kind, method.summary, needs, method.source)
    out = console()
    out.print(rows)
    out.print()
    collected = table("statistics needed")
    collected.add_column("where they come from", justify="left", overflow="fold")
    for name, how in STATISTICS.items():
        collected.add_row(name, how.replace("`", ""))
    out.print(collected)
    out.print()
    choices = table("option")
    choices.add_column("choices", justify="left", overflow="fold")
    for name, allowed in CHOICES.items():
        choices.add_row("--" + name.replace("_", "-"), ", ".join(allowed))
    out.print(choices)
