"""Many cases: which ones, run in one process or several, and what came of them in a table."""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from forks import Limits, run_forked
from judge import Case, Judge, Verdict
from kinds import KINDS
from world import build, warm_up

BUILDING = Limits(memory=16 * 2**30, seconds=300)


def cases_of(kind: str, count: int, seed: int) -> list[Case]:
    """The cases of a kind: `count` seeds that follow one another, from a start that the seed decides."""
    return [Case(kind, seed * 1_000_003 + i) for i in range(count)]


def share(count: int, kinds: Iterable[str]) -> dict[str, int]:
    """Divide a number of cases among kinds by the damages that each has."""
    sizes = {kind: len(KINDS[kind].damages) for kind in kinds}
    return {kind: max(1, round(count * size / sum(sizes.values()))) for kind, size in sizes.items()}


def prepare(folder: Path) -> Path:
    """Import everything once and build the world; returns its folder.

    Raises:
        RuntimeError: if the good artefacts cannot be made.
    """
    warm_up()
    world = folder / "world"
    outcome = run_forked(partial(build, world), folder, folder / "texts", BUILDING)
    if outcome.code:
        raise RuntimeError(f"the world cannot be built: {outcome.stderr[-3000:]}")
    return world


def run(cases: list[Case], world: Path, *, jobs: int = 1, keep: Path | None = None) -> Iterator[Verdict]:
    """Verdicts, in order for one job; several jobs are forks that take every n-th case."""
    if jobs == 1:
        with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
            judge = Judge(world, Path(scratch), keep)
            yield from map(judge.try_case, cases)
        return
    readers = [start(cases[i::jobs], world, keep) for i in range(jobs)]
    for reader in readers:
        with open(reader, encoding="utf-8") as lines:
            for line in lines:
                kind, seed, *rest = json.loads(line)
                yield Verdict(Case(kind, seed), *rest)


def start(cases: list[Case], world: Path, keep: Path | None) -> int:
    """Fork a process that runs cases; returns where its verdicts can be read."""
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        return reader
    with open(writer, "w", encoding="utf-8") as lines:
        for v in run(cases, world, keep=keep):
            lines.write(json.dumps([v.case.kind, v.case.seed, v.refused, v.wrong, v.line]) + "\n")
            lines.flush()
    os._exit(0)


def table(verdicts: Iterable[Verdict]) -> str:
    """Per kind: cases, refused, fine, mishandled."""
    counts: dict[str, Counter] = {}
    for v in verdicts:
        what = "mishandled" if v.wrong else "refused" if v.refused else "fine"
        counts.setdefault(v.case.kind, Counter())[what] += 1
    rows = [("kind", "cases", "refused", "fine", "mishandled")]
    for kind, c in counts.items():
        rows.append((kind, str(c.total()), *(str(c[w]) for w in rows[0][2:])))
    total = sum(counts.values(), Counter())
    rows.append(("all", str(total.total()), *(str(total[w]) for w in rows[0][2:])))
    return "\n".join("  ".join([row[0].ljust(14), *(cell.rjust(10) for cell in row[1:])]) for row in rows)
