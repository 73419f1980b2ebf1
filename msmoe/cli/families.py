"""`msmoe families`"""

import click

from msmoe.cli.console import console, print_json, progress, table
from msmoe.cli.options import json_option


@click.command("families")
@click.argument("model_types", nargs=-1)
@json_option
def command(model_types: tuple[str, ...], as_json: bool) -> None:
    """List the Mixture-of-Experts families of the installed transformers and what works with each.

    MODEL_TYPES: only these; the whole table builds a model of each type without memory and takes about ten seconds.

    \b
    Example: msmoe families qwen3_moe gpt_oss
    """
    from msmoe.families.table import rows

    with progress("reading families") as update:
        found = rows(model_types, progress=update)
    if as_json:
        print_json([row.to_dict() for row in found])
        return
    shown = table("family")
    for name in ("class", "experts on disk", "router", "works", "what does not, and why"):
        shown.add_column(name, justify="left", overflow="fold")
    for row in found:
        shown.add_row(row.model_type, row.model_class, row.stored, row.router, ", ".join(row.works) or "-", row.limits)
    console().print(shown)
