"""Wrong command lines, and surroundings that fail: full disks, closed pipes, signals, quotas."""

import shutil
import signal
from pathlib import Path

from damage import Expect, Table, Trial

OPTIONS = Table()
SURROUNDINGS = Table()
WRONG = (
    "",
    "x",
    "-1",
    "0",
    "2.5",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "9" * 400,
    "0x10",
    "\uff11",
    "true",
    "None",
    "1,2",
    " 3 ",
    "\x1b[31m",
    "\udcff",
)
NUMBERS = (
    "--experts", "--samples", "--batch-size", "--token-sample", "--seed", "--rank", "--steps", "--epochs", "--seeds",
    "--learning-rate", "--kd-weight", "--temperature", "--warmup", "--clip", "--validation-share",
    "--max-source-length",
    "--max-target-length", "--keep-rows", "--energy", "--target-bytes", "--target-ratio", "--max-shard-size",
    "--accumulate",
    "--weight-decay", "--evaluate-every", "--save-every", "--ce-weight", "--hidden-weight", "--fisher",
    "--group-capacity",
    "--recover-steps", "--max-examples", "--processes",
)  # fmt: skip
NAMES = (
    "--method", "--methods", "--budget", "--keep-layer", "--saliency", "--others", "--selection", "--similarity",
    "--metric",
    "--grouping", "--weighting", "--rule", "--align", "--align-to", "--refit", "--routing", "--svd", "--row-score",
    "--export", "--router", "--metrics", "--train", "--device", "--dtype",
)  # fmt: skip
FILES = ("--data", "--stats", "--plan", "--out", "--tasks", "--teacher", "--original", "--validation", "--figures")


def with_option(trial: Trial, name: str, value: str) -> None:
    """Set an option, in the place of the one that is there."""
    if name in trial.argv:
        trial.argv[trial.argv.index(name) + 1] = value
    else:
        trial.argv += [name, value]


for option in NUMBERS:
    for turn in range(3):
        OPTIONS.row(f"{option} odd {turn}", lambda t, o=option: with_option(t, o, t.rng.choice(WRONG)), Expect.EITHER)
for option in NAMES:
    OPTIONS.row(
        f"{option} odd",
        lambda t, o=option: with_option(t, o, t.rng.choice(["nope", "", "NONE", "a b", "\udcff", "x" * 300])),
    )
for option in FILES:
    for value in (
        "nowhere/x",
        "",
        "/dev/null",
        "/dev/zero",
        "a\0b"[:1] + "\n",
        "x" * 300,
        "/proc/self/mem",
        "tokens.jsonl/x",
    ):
        if option in ("--out", "--figures") and value.startswith("/"):
            continue  # never write outside of the trial's folder
        expect = Expect.EITHER if value in ("x" * 300, "a\n") or option in ("--figures", "--out") else Expect.REFUSE
        OPTIONS.row(f"{option} {value[:20]!r}", lambda t, o=option, v=value: with_option(t, o, v), expect)


def nothing_but_name(trial: Trial) -> None:
    del trial.argv[1:]


def without_one(trial: Trial) -> None:
    del trial.argv[trial.rng.randrange(1, len(trial.argv))]


def twice(trial: Trial) -> None:
    trial.argv += trial.argv[1:2]


OPTIONS.row("only the command", nothing_but_name)
for turn in range(6):
    OPTIONS.row(f"a word missing {turn}", without_one, Expect.EITHER)
OPTIONS.row("an argument too many", twice, Expect.EITHER)
OPTIONS.row("an unknown option", lambda t: t.argv.append("--nope"))
OPTIONS.row("a typo of the command", lambda t: t.argv.__setitem__(0, t.argv[0][:-1]))
OPTIONS.row("an option without a value", lambda t: t.argv.append("--seed"))
OPTIONS.row("a checkpoint that is not there", lambda t: t.argv.__setitem__(1, "nowhere"))
OPTIONS.row("a checkpoint that is a file", lambda t: t.argv.__setitem__(1, "tokens.jsonl"))
OPTIONS.row("a checkpoint of no name", lambda t: t.argv.__setitem__(1, ""))
OPTIONS.row("a checkpoint of a surrogate", lambda t: t.argv.__setitem__(1, "\udcff"))
OPTIONS.row("a checkpoint of an empty folder", lambda t: ((t.root / "empty").mkdir(), t.argv.__setitem__(1, "empty")))
OPTIONS.row("a checkpoint of a long name", lambda t: t.argv.__setitem__(1, "x" * 5000))
OPTIONS.row("a hub name", lambda t: t.argv.__setitem__(1, "nobody/nothing-of-the-kind"))


def output(trial: Trial) -> Path | None:
    """The output named in the command line."""
    if "--out" not in trial.argv:
        return None
    return trial.root / trial.argv[trial.argv.index("--out") + 1]


def over_input(trial: Trial) -> None:
    with_option(trial, "--out", trial.argv[1])
    trial.argv.append("--force")


def inside_input(trial: Trial) -> None:
    with_option(trial, "--out", f"{trial.argv[1]}/inside")


def around_input(trial: Trial) -> None:
    with_option(trial, "--out", ".")
    trial.argv.append("--force")


def occupied(trial: Trial) -> None:
    """The user's own things under names that the package might think its own."""
    for name in ("out.partial", "out.replaced", "out.merged", "out.tmp"):
        (trial.root / name).mkdir()
        (trial.root / name / "mine.txt").write_text("mine")


def existing(trial: Trial) -> None:
    folder = trial.root / trial.argv[trial.argv.index("--out") + 1] if "--out" in trial.argv else trial.root / "out"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")


def linked_output(trial: Trial) -> None:
    (trial.root / "elsewhere").mkdir()
    (trial.root / "elsewhere" / "mine.txt").write_text("mine")
    (trial.root / "out").symlink_to("elsewhere")
    trial.argv.append("--force")


WRITERS = frozenset({"profile", "recover", "compress", "apply", "factorize", "plan", "evaluate"})
SURROUNDINGS.row("over the input", over_input)
SURROUNDINGS.row(
    "inside the input", inside_input, by=frozenset({"profile", "recover", "compress", "apply", "factorize"})
)
SURROUNDINGS.row("around the input", around_input, by=WRITERS)
SURROUNDINGS.row("a user's own folders", occupied, Expect.SAME)
SURROUNDINGS.row("an output that exists", existing, by=WRITERS)
SURROUNDINGS.row("a linked output", linked_output, Expect.EITHER)
SURROUNDINGS.row("a full standard output", lambda t: setattr(t.limits, "stdout", "full"), Expect.EITHER)
SURROUNDINGS.row("a closed standard output", lambda t: setattr(t.limits, "stdout", "closed"), Expect.EITHER)
for size in (0, 1000, 8192, 40_000):
    SURROUNDINGS.row(f"a quota of {size} bytes", lambda t, s=size: setattr(t.limits, "file_size", s), Expect.EITHER)
for megabytes in (2, 20, 60):
    SURROUNDINGS.row(
        f"{megabytes} MB of memory", lambda t, m=megabytes: setattr(t.limits, "memory", m * 2**20), Expect.EITHER
    )
for turn in range(12):

    def interrupt(trial: Trial) -> None:
        trial.limits.signal = trial.rng.choice([signal.SIGINT, signal.SIGTERM])
        trial.limits.delay = 0.05 + trial.rng.random() ** 2

    SURROUNDINGS.row(f"a signal {turn}", interrupt, Expect.EITHER)
SURROUNDINGS.row("an input linked", lambda t: linked_input(t), Expect.SAME, WRITERS)


def linked_input(trial: Trial) -> None:
    shutil.move(trial.root / trial.argv[1], trial.root / "moved")
    (trial.root / trial.argv[1]).symlink_to("moved")
