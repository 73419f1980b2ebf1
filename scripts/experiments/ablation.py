"""Compare merging variants on the demo checkpoint at several sizes: one calibration, one table in Markdown.

python scripts/experiments/ablation.py
"""

import argparse
import json
import tempfile
from pathlib import Path

import msmoe
from msmoe.cli.console import silence_transformers
from msmoe.demo import CALIBRATION, CHECKPOINT, HELD_OUT_TEXT, TASKS

VARIANTS = {
    "M-SMoE as published (aligned to expert 0)": {"method": "m-smoe", "align_to": "first"},
    "M-SMoE aligned to the dominant expert": {"method": "m-smoe"},
    "M-SMoE without alignment": {"method": "m-smoe", "align": "none"},
    "plain average of the same groups": {"method": "average"},
    "random groups, uniform, plain average, not aligned": {
        "method": "average", "grouping": "random", "budget": "uniform", "align": "none",
    },
    "M-SMoE + refit": {"method": "m-smoe-refit"},
    "random groups + refit": {"method": "m-smoe-refit", "grouping": "random"},
}  # fmt: skip


def measure(checkpoint: Path) -> dict[str, float]:
    """Loss per target token on held-out text and tasks, and exact match averaged over tasks."""
    text = msmoe.evaluate(checkpoint, HELD_OUT_TEXT)
    tasks = [
        msmoe.evaluate(checkpoint, file, metrics=["exact_match", "loss"]) for file in sorted(TASKS.glob("*.jsonl"))
    ]
    return {
        "text loss": text.metrics["loss"].value,
        "task loss": sum(t.metrics["loss"].value for t in tasks) / len(tasks),
        "exact match": sum(t.metrics["exact_match"].value for t in tasks) / len(tasks),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 4, 2])
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    args = parser.parse_args()
    silence_transformers()
    stats = msmoe.profile(CHECKPOINT, CALIBRATION, samples=512, token_sample=16384)
    full = measure(CHECKPOINT)
    results = {"full": full}
    print("full: " + ", ".join(f"{name} {value:.3f}" for name, value in full.items()) + "\n")
    print("Text loss / task loss above the full model; mean exact match over tasks. Experts per layer on average:\n")
    print("| | " + " | ".join(map(str, args.experts)) + " |")
    print("|---|" + "---|" * len(args.experts))
    with tempfile.TemporaryDirectory() as folder:
        for name, choices in VARIANTS.items():
            cells = []
            for experts in args.experts:
                plan = msmoe.plan(CHECKPOINT, stats, experts=experts, **choices)
                report = msmoe.apply(CHECKPOINT, plan, Path(folder) / "out", stats=stats, data=CALIBRATION, force=True)
                scores = measure(report.out)
                results[f"{name}, {experts}"] = scores
                text, task = (scores[key] - full[key] for key in ("text loss", "task loss"))
                cells.append(f"{text:+.3f} / {task:+.3f}, {scores['exact match']:.3f}")
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
