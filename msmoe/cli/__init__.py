"""The `msmoe` command: parse, call, print. One file per subcommand.

This file imports nothing that takes time, so that a signal is heard from the first moment.
"""

import sys
from typing import Any

COMMANDS = {  # in the order of the help, each with its line in it
    "inspect": "Show architecture, MoE layers, experts, parameters and bytes.",
    "convert": "Write a checkpoint as safetensors: from pickled weights, or in shards of another size.",
    "profile": "Record how often the router activates each expert on calibration data, and all that planning needs.",
    "plan": "Decide which experts are kept and what becomes of the others.",
    "apply": "Carry out a plan: write the compressed checkpoint, a few experts in memory at a time.",
    "factorize": "Store each expert matrix as low rank plus a few rows: smaller on disk and in memory.",
    "recover": "Train a compressed checkpoint to do what the original did: fine-tuning with distillation.",
    "compress": "Profile, plan and apply in one go.",
    "evaluate": "Measure a checkpoint on tasks, with 95 % bootstrap intervals.",
    "compare": "Compare methods at the same stored bytes on the same calibration data and tasks, in one table.",
    "report": "Show what statistics, plans, checkpoints and results say: a page to read, figures for a paper.",
    "methods": "List every method with one line and its source, and the choices that a plan has.",
    "families": "List the Mixture-of-Experts families of the installed transformers and what works with each.",
    "demo": "The whole story on an embedded checkpoint: profile, plan, apply, factorise, recover, evaluate, report.",
}


def main() -> None:
    """Entry point of the command; ends the process with its exit code."""
    from msmoe.cli.signals import interruptible

    interruptible(run)


def run() -> None:
    from msmoe.cli.group import run_command

    run_command(sys.argv[1:])


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from msmoe.cli.group import app

    return app


__all__ = ["COMMANDS", "app", "main"]
