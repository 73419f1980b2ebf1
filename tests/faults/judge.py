"""Run one trial and say whether the command handled it."""

import hashlib
import json
import math
import re
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

from damage import Damage, Expect, Trial
from forks import MEMORY, Limits, Outcome, run_forked
from kinds import KINDS, Command
from world import adopt

LONGEST = 2000  # characters of a line that a person may still read
VOLATILE = re.compile(r"seconds|peak_memory|path|source|created|checkpoint|sha256|version|calibration|^task$")
WARNING_TEXT = re.compile(r"\.py:\d+: \w*Warning")
OUT_OF_MEMORY = re.compile(r"out of memory|not enough memory|memory is too small|MemoryError|allocat", re.IGNORECASE)
TOLERANCE = 2e-2  # of the loss, between two forms of the same values
TOO_MUCH = "asks for more than"
SIGNALLED = {2: 130, 15: 143}


@dataclass(frozen=True)
class Case:
    """One damage to what one command reads, every choice in it drawn from the seed."""

    kind: str
    seed: int

    @property
    def damage(self) -> Damage:
        rows = KINDS[self.kind].damages
        return rows[self.seed * stride(len(rows)) % len(rows)]

    @property
    def command(self) -> Command:
        kind = KINDS[self.kind]
        turn, place = divmod(self.seed, len(kind.damages))
        return kind.commands[(turn + place) % len(kind.commands)]

    def __str__(self) -> str:
        return f"{self.kind}:{self.seed}"


@dataclass(frozen=True)
class Verdict:
    """What came of a case; `wrong` says what was mishandled, empty if nothing was."""

    case: Case
    refused: bool
    wrong: str
    line: str  # the first line on standard error

    def describe(self) -> dict:
        """For programs."""
        case = {"kind": self.case.kind, "seed": self.case.seed, "damage": self.case.damage.name}
        return case | {"argv": self.case.command.argv, "refused": self.refused, "wrong": self.wrong, "line": self.line}

    def __str__(self) -> str:
        return f"{self.case} {self.case.command.name} <- {self.case.damage.name}: {self.wrong or 'handled'}"


def stride(count: int) -> int:
    """A step through a table that visits every row and soon has been everywhere: near the golden section, coprime."""
    step = max(1, round(count * 0.618))
    while math.gcd(step, count) > 1:
        step += 1
    return step


class Judge:
    """Runs cases in forks, in a folder of their own each.

    Args:
        world: good artefacts; never changed.
        scratch: folder for trials; keep: folder into which mishandled trials are moved.
    """

    def __init__(self, world: Path, scratch: Path, keep: Path | None = None):
        self.world, self.scratch, self.keep = world, scratch, keep
        self.undamaged: dict[tuple, object] = {}

    def try_case(self, case: Case) -> Verdict:
        trial, outcome, wrong = self.run(case, case.damage.do)
        if wrong.startswith(TOO_MUCH):  # or other processes had the memory
            trial, outcome, wrong = self.run(case, case.damage.do)
        expect = case.damage.expected_of(case.command.name)
        if not wrong:
            wrong = self.against_expectation(case, expect, trial, outcome)
        if wrong and self.keep:
            shutil.copytree(trial.root, self.keep / str(case).replace(":", "-"), symlinks=True, dirs_exist_ok=True)
        shutil.rmtree(trial.root, ignore_errors=True)
        lines = outcome.stderr.strip().splitlines()
        return Verdict(case, outcome.code == 2, wrong, lines[-1][:300] if lines else "")

    def run(self, case: Case, damage, root: str = "trial") -> tuple[Trial, Outcome, str]:
        """Prepare and run a trial; returns what was wrong with it whatever the damage."""
        folder = self.scratch / root
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        argv = list(case.command.argv)
        for name in case.command.reads:
            copy(self.world / name, folder / name)
        trial = Trial(folder, case.command.target, argv, Random(f"{case}"), Limits())
        damage(trial)
        if KINDS[case.kind].adopts and Random(str(case)).random() < 0.6:
            quiet = self.scratch / "quiet"
            run_forked(partial(adopt, trial.path, folder), folder, quiet, Limits(seconds=20))
        before = snapshot(folder)
        outcome = run_forked(partial(call_cli, trial.argv), folder, self.scratch / "texts", trial.limits)
        outputs = outputs_of(trial, case.command, before)
        wrong = whatever_happened(trial, outcome) or left_behind(trial, outcome, before, outputs)
        if not wrong and outcome.code == 0:
            wrong = not_sound(folder, outcome) or self.not_loadable(case, folder)
        return trial, outcome, wrong

    def not_loadable(self, case: Case, folder: Path) -> str:
        """Evaluate a written checkpoint as its user would."""
        if case.command.writes != "checkpoint" or not (folder / "out").exists():
            return ""
        data = folder / "probe.jsonl"
        shutil.copy(self.world / "tokens.jsonl", data)
        argv = ["evaluate", "out", "--data", "probe.jsonl", "--metrics", "loss", "--out", "probe.json"]
        outcome = run_forked(partial(call_cli, argv), folder, self.scratch / "texts")
        if outcome.code:
            return f"wrote a checkpoint that `evaluate` refuses ({outcome.code}): {last_line(outcome)}"
        return ""

    def against_expectation(self, case: Case, expect: Expect, trial: Trial, outcome: Outcome) -> str:
        if trial.limits.signal is not None:
            return ""
        if expect is Expect.REFUSE:
            return "" if outcome.code == 2 else "accepted, exit 0"
        if outcome.code == 2:
            kind = "" if expect in (Expect.EITHER, Expect.SAME_OR_REFUSE, Expect.TWIN) else "refused"
            return f"{kind}: {last_line(outcome)}" if kind else ""
        if expect is Expect.TWIN:
            return self.against_twin(case, trial)
        if expect is Expect.EITHER:
            return ""
        wanted = self.result_of_undamaged(case)
        if wanted is None:
            return ""
        found = essence(case.command, trial.root, outcome.stdout)
        return "" if found == wanted else f"another result than the undamaged input: {difference(wanted, found)}"

    def against_twin(self, case: Case, trial: Trial) -> str:
        """Compare with the result of the same values in another form."""
        found = loss_of(trial.root, case.command)
        other, outcome, wrong = self.run(case, case.damage.twin, "twin")
        if wrong or outcome.code:
            return f"its twin failed: {wrong or last_line(outcome)}"
        wanted = loss_of(other.root, case.command)
        return "" if abs(found - wanted) <= TOLERANCE else f"loss {found:.4f} where the same values give {wanted:.4f}"

    def result_of_undamaged(self, case: Case) -> object:
        """What the command makes of the undamaged input; None if it cannot be had today."""
        key = case.command.argv
        if key not in self.undamaged:
            trial, outcome, wrong = self.run(case, lambda trial: None, "undamaged")
            good = not wrong and outcome.code == 0
            self.undamaged[key] = essence(case.command, trial.root, outcome.stdout) if good else None
        return self.undamaged[key]


def call_cli(argv: list[str]) -> None:
    import sys

    from msmoe.cli import main

    sys.argv = ["msmoe", *argv]
    main()


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True)
    else:
        shutil.copy2(source, target)


def snapshot(folder: Path) -> dict[str, str]:
    """What lies in a folder: digest of files, targets of links, kind of the rest."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder" if path.is_dir() else "special"
    return found


def whatever_happened(trial: Trial, outcome: Outcome) -> str:
    """What no command may do, however its input is damaged."""
    if outcome.timed_out:
        return f"hangs, or takes more than {trial.limits.seconds:g} s"
    if "Traceback (most recent call last)" in outcome.stderr + outcome.stdout:
        return f"traceback, exit {outcome.code}: {last_line(outcome)}"
    if trial.limits.memory == MEMORY and (outcome.peak > 2 * MEMORY or OUT_OF_MEMORY.search(outcome.stderr)):
        return f"{TOO_MUCH} {MEMORY / 2**30:g} GB: {last_line(outcome)}"
    allowed = {0, 2}
    if trial.limits.signal is not None:
        allowed = {0, SIGNALLED[trial.limits.signal]}
    if outcome.code not in allowed:
        return f"exit {outcome.code}: {last_line(outcome)}"
    if outcome.code:
        return not_one_line(outcome)
    noise = next((line for line in outcome.stderr.splitlines() if WARNING_TEXT.search(line)), "")
    return f"a Python warning: {noise[:200]}" if noise else ""


def not_one_line(outcome: Outcome) -> str:
    lines = [line for line in outcome.stderr.splitlines() if line and not line.startswith("msmoe: warning: ")]
    if len(lines) != 1:
        return f"{len(lines)} lines on standard error: {' | '.join(lines)[:300]}"
    if not lines[0].startswith("msmoe: "):
        return f"a line that is not ours: {lines[0][:300]}"
    if len(lines[0]) > LONGEST:
        return f"a line of {len(lines[0])} characters: {lines[0][:200]}"
    if not lines[0].isprintable():
        return f"a line with unprintable characters: {lines[0][:200]!r}"
    return ""


def outputs_of(trial: Trial, command: Command, before: dict[str, str]) -> set[str]:
    """Names that the trial may write: the command's own, and new ones that its command line asks for."""
    named = {trial.argv[i + 1] for i, word in enumerate(trial.argv[:-1]) if word in ("--out", "--figures")}
    new = {name.split("/")[0] for name in named if name not in before}
    return {"out", "out.json", "out.html"} | {command.output} | new


def left_behind(trial: Trial, outcome: Outcome, before: dict[str, str], outputs: set[str]) -> str:
    """Changed input, and files that nobody asked for."""
    after = snapshot(trial.root)
    changed = [n for n, digest in before.items() if after.get(n) != digest and n.split("/")[0] not in outputs]
    if changed:
        return f"changed its input: {', '.join(changed[:3])}"
    new = sorted(
        {name if name.split("/")[0] in after.keys() & before else name.split("/")[0] for name in after} - {*before}
    )
    complete = outcome.code == 0 or trial.limits.stdout == "full"  # what could not be printed is written
    if complete or any((trial.root / "out" / "cells").glob("*.json")):  # a comparison goes on with --resume
        outputs = outputs | {f"{name}.training" for name in outputs}
    elif trial.limits.signal is not None:
        return ""  # what a run leaves to be resumed is for the tests of interruption
    else:
        outputs = {command for command in outputs if command in before}
    extra = [name for name in new if name.split("/")[0] not in outputs]
    return f"left {', '.join(extra[:4])} behind after exit {outcome.code}" if extra else ""


def refuse_constant(name: str) -> None:
    raise ValueError(f"holds {name}")


def is_written(file: Path, folder: Path) -> bool:
    return str(file.relative_to(folder)).startswith("out")


def not_sound(folder: Path, outcome: Outcome) -> str:
    """JSON that is none, in files or on standard output."""
    copied = {f.read_bytes() for f in folder.rglob("*.json") if f.is_file() and not is_written(f, folder)}
    files = [f for f in (*sorted(folder.glob("out*.json")), *sorted(folder.glob("out*/**/*.json"))) if f.is_file()]
    contents = {str(f.relative_to(folder)): f.read_bytes() for f in files}
    texts = {name: content.decode(errors="replace") for name, content in contents.items() if content not in copied}
    if outcome.stdout.startswith("{"):
        texts["standard output"] = outcome.stdout
    for name, text in texts.items():
        try:
            json.loads(text, parse_constant=refuse_constant)
        except ValueError as error:
            return f"{name} is no JSON: {error}"
    return ""


def essence(command: Command, folder: Path, stdout: str) -> object:
    """The part of a result that must not depend on how the input is written."""
    out = folder / command.output if command.output else None
    if command.writes == "checkpoint":
        return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(out.glob("*.safetensors"))}
    if command.writes == "stats":
        digest = hashlib.sha256((out / "stats.safetensors").read_bytes()).hexdigest()
        return {"arrays": digest, "layers": json.loads((out / "stats.json").read_text())["layers"]}
    if command.writes == "json":
        return steady(json.loads(out.read_text()))
    return steady(json.loads(stdout)) if stdout.startswith("{") else stdout


def steady(content: object) -> object:
    """JSON without times, places and memory."""
    if isinstance(content, dict):
        return {k: steady(v) for k, v in content.items() if not VOLATILE.search(k)}
    return [steady(v) for v in content] if isinstance(content, list) else content


def difference(wanted: object, found: object) -> str:
    if isinstance(wanted, dict) and isinstance(found, dict):
        keys = [k for k in {**wanted, **found} if wanted.get(k) != found.get(k)]
        return f"{keys[0]}: {difference(wanted.get(keys[0]), found.get(keys[0]))}" if keys else "nothing"
    return f"{str(found)[:80]!r} for {str(wanted)[:80]!r}"


def loss_of(folder: Path, command: Command) -> float:
    file = folder / ("probe.json" if command.writes == "checkpoint" else command.output)
    return float(json.loads(file.read_text())["results"][0]["metrics"]["loss"]["value"])


def last_line(outcome: Outcome) -> str:
    lines = outcome.stderr.strip().splitlines()
    return lines[-1][:300] if lines else "without a word"
