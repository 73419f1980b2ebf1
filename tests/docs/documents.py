"""What the documents say, taken apart: links, code blocks, command lines; and the folder in which they run."""

import io
import os
import re
import shlex
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import click
import pytest
import torch
from tiny import write_records
from transformers import AutoModelForSeq2SeqLM

from msmoe.cli import app, main

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / name for name in ("README.md", "msmoe/README.md", "analysis/README.md", "scripts/README.md")]
DOCUMENTS.append(ROOT / "msmoe" / "demo" / "checkpoint" / "README.md")
README = DOCUMENTS[0]
LINK = re.compile(r"\]\(([^()\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
GIVEN = {"google", "calibration.jsonl", "train.jsonl", "task.jsonl", "tasks"}


def text_of(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def blocks(document: Path, language: str) -> list[str]:
    """The code blocks of a language, in their order."""
    return [code for name, code in FENCE.findall(text_of(document)) if name == language]


def prose(document: Path) -> str:
    """A document without its code blocks."""
    return FENCE.sub("", text_of(document))


def links(document: Path) -> list[str]:
    """Targets of links and images that are no addresses."""
    return [target for target in LINK.findall(prose(document)) if "://" not in target]


def anchors(document: Path) -> set[str]:
    """Names by which the headings can be linked."""
    headings = re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def bash_lines(document: Path) -> list[str]:
    """Lines of the bash blocks, continued ones joined."""
    return [
        line for code in blocks(document, "bash") for line in code.replace("\\\n", " ").splitlines() if line.strip()
    ]


def commands(lines: list[str]) -> list[list[str]]:
    """The lines that call `msmoe`, as words without comments."""
    words = [shlex.split(line, comments=True) for line in lines]
    return [line for line in words if line and line[0] == "msmoe"]


def subcommand(name: str) -> click.Command | None:
    return app.get_command(click.Context(app), name)


def all_options() -> set[str]:
    """Every option of every subcommand, and those of `msmoe` itself."""
    context = click.Context(app)
    known = [app, *filter(None, map(subcommand, app.list_commands(context)))]
    options = {
        name for command in known for option in command.params for name in (*option.opts, *option.secondary_opts)
    }
    return options | {"--help", "--debug"}


def use_commands() -> list[list[str]]:
    """The `msmoe` lines under "Use"."""
    return commands(text_of(README).split("## Use\n")[1].split("```bash\n")[1].split("```")[0].splitlines())


def write_pickled(checkpoint: Path, out: Path) -> Path:
    """A checkpoint as the hub holds the public ones: `pytorch_model.bin` in place of safetensors."""
    out.mkdir(parents=True)
    for file in checkpoint.iterdir():
        if file.suffix in (".json", ".txt", ".model"):
            (out / file.name).write_bytes(file.read_bytes())
    model = AutoModelForSeq2SeqLM.from_pretrained(checkpoint, dtype="auto")
    torch.save(model.state_dict(), out / "pytorch_model.bin")
    return out


def working_folder(folder: Path, checkpoint: Path, calibration: list[dict], task: list[dict]) -> Path:
    """A folder with the files that the README's commands name: `GIVEN`."""
    write_pickled(checkpoint, folder / "google" / "switch-base-8")
    write_records(folder / "calibration.jsonl", calibration)
    write_records(folder / "train.jsonl", calibration)
    write_records(folder / "task.jsonl", task)
    (folder / "tasks").mkdir()
    write_records(folder / "tasks" / "task.jsonl", task)
    return folder


def run_here(folder: Path, line: list[str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command line in this process, in a folder."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr(sys, "argv", line)
        with pytest.raises(SystemExit) as stop:
            main()
    return stop.value.code, out.getvalue(), err.getvalue()


def environment(folder: Path) -> dict[str, str]:
    """Of a fresh process: one thread, no network, and a cache of its own for code that comes with checkpoints."""
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / ".modules")}
