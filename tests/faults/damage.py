"""What a damage is, and the tools with which damages are done to JSON and safetensors files."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from random import Random

from forks import Limits

DEEP = "[" * 100_000 + "]" * 100_000
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a21" * 10 + b"beef\nsize 990345061\n"
GONE = object()  # in place of a value: take the field out
ODD = {
    "zero": 0, "negative": -1, "null": None, "a string": "x", "a fraction": 2.5, "true": True, "a list": [3],
    "an object": {}, "huge": 10**9, "beyond 64 bits": 2**70, "NaN": float("nan"), "infinite": float("inf"),
}  # fmt: skip


class Expect(Enum):
    """What a command must make of a damage."""

    REFUSE = "exit 2"
    SAME = "the result of the undamaged input"
    SAME_OR_REFUSE = "exit 2, or the result of the undamaged input"
    EITHER = "exit 2, or a result that is sound"
    TWIN = "the result of the same values in another form"


@dataclass
class Trial:
    """One run about to happen: a folder with the artefacts it reads, which damages may change, and its command line."""

    root: Path
    target: str
    argv: list[str]
    rng: Random
    limits: Limits = field(default_factory=Limits)

    @property
    def path(self) -> Path:
        """The artefact to be damaged."""
        return self.root / self.target


@dataclass(frozen=True)
class Damage:
    """A way to damage a trial.

    Attributes:
        do: changes the trial's files or command line; `twin` makes the trial that must give the same result.
        expect: what every command must make of it, or those in `by`, if given; the others may do either.
    """

    name: str
    do: Callable[[Trial], None]
    expect: Expect = Expect.REFUSE
    by: frozenset[str] | None = None
    twin: Callable[[Trial], None] | None = None

    def expected_of(self, command: str) -> Expect:
        return self.expect if self.by is None or command in self.by else Expect.EITHER


class Table(list[Damage]):
    """Damages of one kind."""

    def add(self, name: str, expect: Expect = Expect.REFUSE, by: frozenset[str] | None = None) -> Callable:
        """Decorator: a function of a trial becomes a row."""

        def decorate(do: Callable[[Trial], None]) -> Callable[[Trial], None]:
            self.row(name, do, expect, by)
            return do

        return decorate

    def row(self, name: str, do: Callable[[Trial], None], expect: Expect = Expect.REFUSE, by=None, twin=None) -> None:
        self.append(Damage(name, do, expect, by, twin))


def rewrite(file: Path, content: str | bytes) -> None:
    """Put a new file in the place of another, links and pipes included."""
    remove(file)
    file.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)


def remove(file: Path) -> None:
    if file.is_symlink() or file.exists():
        file.unlink()


def dump(content: object) -> str:
    return json.dumps(content, indent=1)


def load(file: Path):
    return json.loads(file.read_text(encoding="utf-8"))


def set_at(content, place: tuple, value: object) -> None:
    """Replace the value at a place in nested lists and dicts, or take it out."""
    for step in place[:-1]:
        content = content[step]
    if value is GONE:
        del content[place[-1]]
    else:
        content[place[-1]] = value


def edit_json(file: Path, place: tuple, value: object) -> None:
    content = load(file)
    set_at(content, place, value)
    rewrite(file, dump(content))


def places(content, prefix: tuple = ()) -> list[tuple]:
    """Every place in nested lists and dicts, leaves and branches, in file order."""
    found = []
    steps = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for step, value in steps:
        found.append((*prefix, step))
        found += places(value, (*prefix, step))
    return found


def text_damages(table: Table, name: Callable[[Trial], Path], *, what: str, expect=Expect.REFUSE, by=None) -> None:
    """Rows that break a JSON file whatever is in it."""

    def replace(make: Callable[[bytes, Random], bytes | str]) -> Callable[[Trial], None]:
        return lambda t: rewrite(name(t), make(name(t).read_bytes(), t.rng))

    for label, make in {
        "empty": lambda b, r: b"",
        "truncated": lambda b, r: b[: r.randrange(1, len(b) - 2)],
        "no JSON": lambda b, r: "hello",
        "an array": lambda b, r: "[]",
        "a number": lambda b, r: "7",
        "null": lambda b, r: "null",
        "a string": lambda b, r: '"x"',
        "too deep": lambda b, r: DEEP,
        "deep inside": lambda b, r: '{"a": ' * 50_000 + "1" + "}" * 50_000,
        "no UTF-8": lambda b, r: b"\xff\xfe" + b,
        "UTF-16": lambda b, r: b.decode("latin-1").encode("utf-16"),
        "binary": lambda b, r: r.randbytes(200),
        "trailing text": lambda b, r: b + b"}",
        "an LFS pointer": lambda b, r: LFS,
        "zeros": lambda b, r: bytes(len(b)),
        "a huge integer": lambda b, r: '{"a": ' + "9" * 5000 + "}",
    }.items():
        table.row(f"{what} {label}", replace(make), expect, by)
    table.row(f"{what} missing", lambda t: remove(name(t)), expect, by)
    table.row(f"{what} a folder", lambda t: as_folder(name(t)), expect, by)
    table.row(f"{what} a pipe", lambda t: as_pipe(name(t)), expect, by)
    table.row(f"{what} a link to itself", lambda t: as_link(name(t), name(t).name), expect, by)
    table.row(f"{what} endless", lambda t: as_link(name(t), "/dev/zero"), expect, by)


def as_folder(file: Path) -> None:
    remove(file)
    file.mkdir()


def as_pipe(file: Path) -> None:
    remove(file)
    os.mkfifo(file)


def as_link(file: Path, target: str | Path) -> None:
    remove(file)
    file.symlink_to(target)


def any_place(trial: Trial, file: Path, prefix: str = "") -> None:
    """Put an odd value at any place of a JSON file."""
    content = load(file)
    found = [p for p in places(content) if not prefix or p[0] == prefix]
    value = trial.rng.choice([*ODD.values(), GONE, "\ud800", "\x1b[31m\n", [None], -0.0])
    set_at(content, trial.rng.choice(found), value)
    rewrite(file, dump(content))


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


def layers_of(content: dict) -> list[str]:
    return list(content["layers"])


def layer_edit(file: Callable[[Trial], Path], key: str, change: Callable[[object, Random], object]) -> Callable:
    """Damage to one field of one layer of statistics or a plan."""

    def do(trial: Trial) -> None:
        content = load(file(trial))
        layer = content["layers"][trial.rng.choice(layers_of(content))]
        value = change(layer[key], trial.rng)
        set_at(layer, (key,), value)
        rewrite(file(trial), dump(content))

    return do


def one_value(value: object) -> Callable[[list, Random], list]:
    def change(values: list, rng: Random) -> list:
        place = rng.randrange(len(values))
        return [value if i == place else v for i, v in enumerate(values)]

    return change
