"""Rows and ablations of the switch-base-32 table of M-SMoE (arXiv 2310.01334, table 2), on any checkpoint and tasks.

    python scripts/experiments/published_table.py --out build/published    the demo checkpoint and its tasks
    python scripts/experiments/published_table.py --checkpoint switch-base-32 --data calibration.jsonl \
        --recover-data train.jsonl --tasks tasks --experts 8 --out build/published    the paper's tasks

Every row stores the same bytes and is recovered the same way. One table sets our scores beside the published ones
(task by task where a task file has the name of a published one, e.g. tasks/sst2.jsonl); a second one has the ablations.
Everything that is measured is kept in --out and done once: a killed run goes on when it is started again.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from scipy.stats import kendalltau

from msmoe.cli.console import progress
from msmoe.comparison.run import compare
from msmoe.comparison.scoring import summarise
from msmoe.comparison.summary import Row, Summary
from msmoe.demo import CALIBRATION, CHECKPOINT, HELD_OUT_TEXT, TASKS

# Table 2 of arXiv 2310.01334: single runs; MC-SMoE's size counts non-zero entries; EM of SQuAD and HotpotQA.
PUBLISHED_TASKS = ("sst2", "mrpc", "multirc", "copa", "winogrande", "squad", "wikiqa", "hotpotqa")
PUBLISHED = {
    "dense": ("220M", (94.61, 88.97, 74.25, 58, 58.72, 63.65, 96.12, 66.13)),
    "full": ("2.0B", (95.75, 90.20, 76.19, 68, 61.80, 65.39, 96.45, 67.55)),
    "frequency": ("733M", (94.50, 88.97, 75.13, 63, 61.64, 64.80, 96.27, 67.39)),
    "task-specific": ("733M", (91.28, 82.04, 53.63, 52, 58.56, 54.40, 95.24, 64.70)),
    "average": ("733M", (92.66, 88.73, 74.04, 62, 59.59, 64.49, 96.19, 67.36)),
    "zipit": ("733M", (93.12, 91.18, 75.26, 65, 60.38, 65.01, 96.05, 67.59)),
    "repair": ("733M", (92.89, 90.44, 74.44, 65, 61.48, 64.67, 96.27, 67.67)),
    "git-re-basin": ("733M", (93.35, 88.24, 74.25, 65, 59.25, 64.61, 96.23, 67.29)),
    "m-smoe": ("733M", (94.50, 90.69, 75.57, 68, 61.80, 65.66, 96.34, 67.91)),
    "mc-smoe": ("381M", (93.35, 89.22, 73.98, 67, 59.52, 65.41, 96.08, 67.64)),
}
ROWS = [name for name in PUBLISHED if name not in ("full", "dense")]
BASES = (
    "router-weight", "weight", "feature", "feature.abs", "weight-feature", "router-weight-feature", "gradient",
    "weight-gradient", "mse", "feature-correlation.lsa", "feature-correlation.max", "expert-output", "random",
)  # fmt: skip
ABLATIONS = {  # what is changed of m-smoe -> label of the variant; the published score where the paper has one
    "m-smoe": "m-smoe",
    "uniform budget": "m-smoe:budget=uniform",
    "random groups": "m-smoe:grouping=random",
    **{f"similarity: {base}": f"m-smoe:similarity={base}" for base in BASES},
    "no alignment": "m-smoe:align=none",
    "aligned to expert 0, as published": "m-smoe:align_to=first",
    "aligned by activations": "m-smoe:align=activation",
    "equal weights": "m-smoe:weighting=uniform",
    "Fisher weights": "m-smoe:rule=fisher",
    "wo refitted": "m-smoe-refit",
    "factorised without merging, same bytes": "mc-smoe:rank=16:keep_rows=0.05",
    "pruned instead, tokens to the nearest kept expert": "frequency:others=nearest",
}
# MultiRC, COPA, MRPC, SQuAD EM of the published ablations; m-smoe itself is 75.57, 68, 90.69, 65.66
PUBLISHED_ABLATIONS = {
    "m-smoe": (75.57, 68, 90.69, 65.66),
    "uniform budget": (74.48, 63, 90.44, 64.36),
    "random groups": (74.69, 62, 89.95, 64.97),
    "similarity: weight": (75.29, 63, 89.46, 64.98),
    "similarity: weight-feature": (74.96, 62, 89.95, 64.98),
    "similarity: gradient": (75.50, 59, 89.22, 64.93),
    "similarity: feature": (74.74, 60, 89.95, 65.03),
    "similarity: feature.abs": (75.20, 65, 89.22, 64.90),
    "similarity: router-weight": (75.01, 59, 88.73, 64.99),
    "no distillation": (74.77, 64, 89.22, 63.25),
    "no alignment": (74.84, 66, 89.95, 64.73),
    "equal weights": (75.11, 64, 89.95, 64.55),
    "Fisher weights": (73.77, 65, 89.46, 63.99),
}
NO_DISTILLATION = "no distillation"


def table_row(row: Row, summary: Summary, steps: int) -> list[str]:
    """Bytes, experts, mean with interval, rank and every task's score of a method."""
    columns = summary.columns(recover_steps=[steps])
    return [f"{row.num_bytes:,}", f"{row.average_kept:.3g}", *[row.cell(column).text for column in columns]]


def published_mean(name: str) -> float:
    """Mean of the published scores over the paper's tasks."""
    return sum(PUBLISHED[name][1]) / len(PUBLISHED[name][1])


def main_table(summary: Summary, steps: Sequence[int]) -> list[str]:
    """Rows of the published table, ours beside theirs, before and after recovery."""
    rows = {row.method: row for row in summary.sizes[-1].rows}
    for size in summary.sizes:
        rows |= {row.method: row for row in size.rows if row.method in PUBLISHED}
    ours = [task.name for task in summary.tasks]
    shared = [task for task in PUBLISHED_TASKS if task in ours]
    columns = [column for s in steps for column in summary.columns(recover_steps=[s])]
    heads = ["method", "bytes", "experts", *[column.heading for column in columns], "published size",
             "published mean of 8", *[f"published {task}" for task in shared]]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name in PUBLISHED:
        if name not in rows:
            continue
        row = rows[name]
        cells = [name, f"{row.num_bytes:,}", f"{row.average_kept:.3g}", *[row.cell(c).text for c in columns]]
        theirs = dict(zip(PUBLISHED_TASKS, PUBLISHED[name][1], strict=True))
        cells += [PUBLISHED[name][0], f"{published_mean(name):.2f}", *[f"{theirs[task]:g}" for task in shared]]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def ordering(summary: Summary, steps: Sequence[int]) -> list[str]:
    """Whether our order of the methods is the published one: Kendall's tau, and the pairs with m-smoe one by one."""
    rows = {row.method: row for size in summary.sizes for row in size.rows if row.method in ROWS}
    lines = []
    for s in steps:
        means = {m: r.measurements[s].mean for m, r in rows.items() if s in r.measurements}
        known = {m: mean for m, mean in means.items() if mean is not None}
        tau = kendalltau([published_mean(m) for m in known], [mean.value for mean in known.values()])
        when = f"After {s} steps of recovery" if s else "Without training"
        lines.append(
            f"{when}: Kendall's tau between the published and our order of {len(known)} methods {tau.statistic:+.2f} "
            f"(p = {tau.pvalue:.2f})."
        )
        if "m-smoe" not in known:
            continue
        holds = {m: (known["m-smoe"].value > v.value) == (published_mean("m-smoe") > published_mean(m))
                 for m, v in known.items() if m != "m-smoe"}  # fmt: skip
        lines.append(
            "  m-smoe is on the published side of: "
            + (", ".join(m for m, h in holds.items() if h) or "none")
            + "; on the other side of: "
            + (", ".join(m for m, h in holds.items() if not h) or "none")
            + "."
        )
    return lines


def ablation_table(summaries: Sequence[Summary], steps: int) -> list[str]:
    """Each change to m-smoe: mean score, difference to m-smoe, and the published means where there are any."""
    found = {row.method: row for summary in summaries for size in summary.sizes for row in size.rows}
    columns = summaries[0].columns(tasks=False, recover_steps=[steps])
    base = found["m-smoe"].measurements[steps].mean
    published_base = sum(PUBLISHED_ABLATIONS["m-smoe"]) / 4
    heads = [
        "change",
        "bytes",
        "experts",
        *[column.heading for column in columns],
        "points",
        "published points (mean of 4)",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for change, label in ABLATIONS.items():
        if label not in found or steps not in found[label].measurements:
            continue
        row = found[label]
        mean = row.measurements[steps].mean
        points = "" if mean is None or base is None else f"{100 * (mean.value - base.value):+.2f}"
        theirs = PUBLISHED_ABLATIONS.get(change)
        shown = f"{sum(theirs) / 4 - published_base:+.2f}" if theirs else ""
        cells = [
            change,
            f"{row.num_bytes:,}",
            f"{row.average_kept:.3g}",
            *[row.cell(column).text for column in columns],
            points,
            shown,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def distillation(with_it: Summary, without: Summary, steps: int) -> str:
    """What the distillation term of the recovery is worth."""
    means = []
    for summary in (with_it, without):
        row = next(row for size in summary.sizes for row in size.rows if row.method == "m-smoe")
        means.append(row.measurements[steps].mean)
    if any(mean is None for mean in means):
        return ""
    published = (sum(PUBLISHED_ABLATIONS[NO_DISTILLATION]) - sum(PUBLISHED_ABLATIONS["m-smoe"])) / 4
    return (
        f"m-smoe recovered without distillation: {means[1].with_interval} beside {means[0].with_interval} with it, "
        f"{100 * (means[1].value - means[0].value):+.2f} points (published {published:+.2f}, mean of 4)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--data", type=Path, default=CALIBRATION, help="calibration data")
    parser.add_argument("--recover-data", type=Path, help="what recovery trains on; default: the calibration data")
    parser.add_argument("--tasks", type=Path, nargs="+", default=[TASKS, HELD_OUT_TEXT])
    parser.add_argument("--experts", type=float, default=4, help="a quarter of the experts, as published")
    parser.add_argument("--recover-steps", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--token-sample", type=int, default=16384)
    parser.add_argument("--max-examples", type=int)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--skip-ablations", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    common = {
        "data": args.data, "tasks": args.tasks, "experts": [args.experts], "seeds": tuple(range(args.seeds)),
        "samples": args.samples, "token_sample": args.token_sample, "max_examples": args.max_examples,
        "processes": args.processes, "recover_data": args.recover_data, "cost": False, "resume": True,
    }  # fmt: skip
    recovery = {"learning_rate": args.learning_rate}
    steps = (0, args.recover_steps)
    runs = {
        "table": {"methods": ROWS, "recover_steps": steps, "recovery": recovery},
        NO_DISTILLATION: {
            "methods": ["m-smoe"],
            "recover_steps": steps[1:],
            "recovery": recovery | {"kd_weight": 0.0},
        },
        "ablations": {  # some similarities correlate hidden units of every pair of experts over the whole sample
            "methods": list(ABLATIONS.values()),
            "recover_steps": (0,),
            "token_sample": min(4096, args.token_sample),
        },
    }
    if args.skip_ablations:
        del runs["ablations"]
    summaries = {}
    for name, chosen in runs.items():
        with progress(name) as update:
            results = compare(args.checkpoint, args.out / name.replace(" ", "-"), progress=update, **common | chosen)
        summaries[name] = summarise(results)
    lines = ["# Switch-base-32 table of arXiv 2310.01334", "", *main_table(summaries["table"], steps), ""]
    lines += [*ordering(summaries["table"], steps), ""]
    lines += [distillation(summaries["table"], summaries[NO_DISTILLATION], args.recover_steps), ""]
    if "ablations" in summaries:
        lines += ["## Ablations, without training", "", *ablation_table([summaries["ablations"]], 0), ""]
    lines += [f"- {line}" for line in summaries["table"].legend]
    text = "\n".join(lines) + "\n"
    (args.out / "published_table.md").write_text(text, encoding="utf-8")
    (args.out / "settings.json").write_text(json.dumps(vars(args), default=str, indent=1) + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
