"""Is the forecast one? Predicted errors of the demo checkpoint at every size, beside what compressing it really does.

    python scripts/experiments/forecast.py

Every method and size is applied with a uniform budget and measured on held-out data: KL divergence from the full model
and loss increase per target token, on passages and on tasks, and exact match; the loss also with a single layer
compressed. Held-out passages and tasks are weighted by their target tokens in the calibration data where both count as
one. The output errors are measured once more on statistics of held-out records. Finished cells are kept in the output
file, and a rerun does the rest.
"""

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

import msmoe
from msmoe.calibration.batches import IGNORE, batch_indices, collate
from msmoe.calibration.records import TokenRecord, choose_records, read_records
from msmoe.calibration.tokenization import tokenize
from msmoe.calibration.tokenizer import load_tokenizer
from msmoe.cli.console import silence_transformers
from msmoe.compression.layer_errors import layer_errors
from msmoe.demo import CALIBRATION, CHECKPOINT, HELD_OUT_TEXT, TASKS
from msmoe.files import write_whole
from msmoe.forecasting import forecast
from msmoe.planning.planner import Planner
from msmoe.workers import in_order

METHODS = ("m-smoe-refit", "m-smoe")
SAMPLES, TOKEN_SAMPLE, FISHER = 512, 16384, 64
PER_TASK, TEXTS = 200, 295  # held-out records
SINGLE_PER_TASK, SINGLE_TEXTS = 40, 100  # for single layers
GOOD, FAIR = 0.9, 0.6  # Spearman correlation
TARGETS = {
    "kl": "KL divergence",
    "text loss": "loss increase on text",
    "task loss": "loss increase on tasks",
    "exact match lost": "exact match lost",
}


# ---- measuring


@dataclass
class HeldOut:
    """Records of one kind, and the log-probabilities that the full model gives at their target positions."""

    records: list[TokenRecord]
    batches: list[dict[str, Tensor]]
    reference: list[Tensor]


def held_out(records: list[TokenRecord], full) -> HeldOut:
    batches = [collate([records[i] for i in chosen], pad_id=0) for chosen in batch_indices(records, 32)]
    return HeldOut(records, batches, [log_probabilities(full, batch) for batch in batches])


@torch.inference_mode()
def log_probabilities(model, batch: dict[str, Tensor]) -> Tensor:
    """(N, V) at the N target positions of a batch."""
    return model(**batch).logits[batch["labels"] != IGNORE].log_softmax(-1)


def divergence(model, data: HeldOut) -> dict[str, float]:
    """KL divergence from the full model and loss increase, nats per target token, with the standard error of the
    latter over records."""
    kl, rises, counts = 0.0, [], []
    for batch, before in zip(data.batches, data.reference, strict=True):
        after, places = log_probabilities(model, batch), batch["labels"] != IGNORE
        kl += float((before.exp() * (before - after)).sum(dtype=torch.float64))
        rise = (before - after).gather(1, batch["labels"][places][:, None]).flatten().double()
        record, number = places.nonzero()[:, 0], places.sum(1)
        rises.append(torch.zeros(len(number), dtype=torch.float64).index_add_(0, record, rise))
        counts.append(number)
    rise, count = torch.cat(rises), torch.cat(counts)
    loss, total = float(rise.sum() / count.sum()), int(count.sum())
    variance = float((rise - loss * count).square().sum()) * len(count) / (len(count) - 1)
    return {"kl": kl / total, "loss": loss, "standard error": math.sqrt(variance) / total}


def exact_match(model) -> float:
    scores = [
        msmoe.evaluate(model, file, metrics=["exact_match"], samples=PER_TASK, count_flops=False)
        for file in sorted(TASKS.glob("*.jsonl"))
    ]
    return statistics.mean(score.metrics["exact_match"].value for score in scores)


@dataclass
class Bench:
    """What every cell is measured with; `held_out_stats` are of records that no method saw."""

    stats: msmoe.Stats
    held_out_stats: msmoe.Stats
    planner: Planner
    data: dict[str, HeldOut]
    single: dict[str, HeldOut]
    share: dict[str, float]

    def measure(self, method: str, size: int, folder: Path) -> dict:
        """One cell: a method at a size."""
        plan = self.planner.plan(method, experts=size, budget="uniform")
        out = msmoe.apply(CHECKPOINT, plan, folder / f"{method}-{size}", stats=self.stats, workers=1).out
        compressed, full = msmoe.load(out), msmoe.load(CHECKPOINT)
        scores = {kind: divergence(compressed, data) for kind, data in self.data.items()}
        errors = layer_errors(CHECKPOINT, out, self.held_out_stats, every=True, tokens=4096, stable_ranks=False)
        optimistic = layer_errors(CHECKPOINT, out, self.stats, stable_ranks=False)
        layers = {}
        for name in plan.layers:
            parent, _, last = name.rpartition(".")
            block = full.get_submodule(parent)
            own = getattr(block, last)
            setattr(block, last, compressed.get_submodule(name))
            single = {kind: divergence(full, data) for kind, data in self.single.items()}
            setattr(block, last, own)
            layers[name] = {
                **{what: self.pooled(single, what) for what in ("kl", "loss")},
                "output error": errors[name].error,
                "output error on the calibration sample": optimistic[name].error,
            }
        return {
            "kl": self.pooled(scores, "kl"),
            **{f"{kind} {what}": value for kind, score in scores.items() for what, value in score.items()},
            "exact match": exact_match(compressed),
            "layers": layers,
        }

    def pooled(self, scores: dict[str, dict[str, float]], what: str) -> float:
        """Passages and tasks as in the calibration data."""
        return sum(self.share[kind] * scores[kind][what] for kind in scores)


def prepare(folder: Path) -> tuple[Bench, float]:
    """Statistics, held-out data and the exact match of the full model."""
    tokenizer, full = load_tokenizer(CHECKPOINT), msmoe.load(CHECKPOINT)
    as_tokens = lambda raw: tokenize(raw, tokenizer, pad_id=0, vocab_size=full.config.vocab_size)
    files = sorted(TASKS.glob("*.jsonl"))
    chosen = lambda count: [r for file in files for r in choose_records(read_records(file), count, seed=0)]
    texts = read_records(HELD_OUT_TEXT)
    data = {"text": held_out(as_tokens(texts[:TEXTS]), full), "task": held_out(as_tokens(chosen(PER_TASK)), full)}
    single = {
        "text": held_out(as_tokens(texts[:SINGLE_TEXTS]), full),
        "task": held_out(as_tokens(chosen(SINGLE_PER_TASK)), full),
    }
    calibration = read_records(CALIBRATION)
    counts = {"text": 0, "task": 0}
    for raw, record in zip(calibration, as_tokens(calibration), strict=True):
        counts["text" if "text" in raw else "task"] += len(record.labels)
    share = {kind: count / sum(counts.values()) for kind, count in counts.items()}
    num_texts = sum("text" in raw for raw in calibration)
    unseen = folder / "held_out.jsonl"
    some = [*texts[:num_texts], *chosen((len(calibration) - num_texts) // len(files))]
    unseen.write_text("".join(json.dumps(record) + "\n" for record in some), encoding="utf-8")
    stats = msmoe.profile(CHECKPOINT, CALIBRATION, samples=SAMPLES, token_sample=TOKEN_SAMPLE, fisher=FISHER)
    held_out_stats = msmoe.profile(CHECKPOINT, unseen, samples=SAMPLES, token_sample=TOKEN_SAMPLE)
    return Bench(stats, held_out_stats, Planner(CHECKPOINT, stats), data, single, share), exact_match(full)


# ---- comparing


def correlations(predicted: Sequence[float], measured: Sequence[float]) -> dict[str, float | None]:
    """Spearman's and Pearson's correlation, the latter also of logarithms where all values are positive."""
    logs = [np.log(np.maximum(values, 1e-300)) for values in (predicted, measured)]
    positive = min(*predicted, *measured) > 0
    return {
        "spearman": float(spearmanr(predicted, measured)[0]),
        "pearson": float(pearsonr(predicted, measured)[0]),
        "log-log pearson": float(pearsonr(*logs)[0]) if positive else None,
    }


def concordance(pairs: Sequence[tuple[float, float]]) -> tuple[int, int]:
    """Of all pairs of (predicted, measured), how many are in the same order, and how many there are."""
    signs = [(a[0] - b[0]) * (a[1] - b[1]) for a, b in combinations(pairs, 2)]
    return sum(sign > 0 for sign in signs), len(signs)


def compare(results: dict) -> dict:
    """Correlations of predicted with measured values, per method, over methods, and of single layers."""
    predicted, cells = results["predicted"], results["cells"]
    full = results["full exact match"]
    sizes = [s for s in results["sizes"] if s < results["num_experts"]]  # all experts: 0 on either side
    measured = {
        (m, s): cells[f"{m}/{s}"] | {"exact match lost": full - cells[f"{m}/{s}"]["exact match"]}
        for m in METHODS
        for s in sizes
    }
    index = {size: i for i, size in enumerate(results["sizes"])}
    points = {(m, s): layer_points(predicted[m], cells[f"{m}/{s}"], index[s]) for m in METHODS for s in sizes}
    found: dict = {"whole": {}, "layers": {}}
    for group, methods in {**{m: (m,) for m in METHODS}, "both": METHODS}.items():
        keys = [(m, s) for m in methods for s in sizes]
        curve = lambda what, keys=keys: [predicted[m][what][index[s]] for m, s in keys]
        found["whole"][group] = {
            what: {target: correlations(curve(what), [measured[key][target] for key in keys]) for target in TARGETS}
            for what in ("output error", "kl", "experts removed")
        }
        layers = [p for key in keys for p in points[key]]
        field = lambda name, layers=layers: [p[name] for p in layers]
        found["layers"][group] = {
            "output error": correlations(field("output error"), field("measured output error")),
            "kl": correlations(field("kl"), field("measured kl")),
            "loss": correlations(field("kl"), field("measured loss")),
            "right order at a size": {
                what: share_of(
                    [concordance([(p[what], p["measured kl"]) for m in methods for p in points[m, s]]) for s in sizes]
                )
                for what in ("output error", "kl")
            },
        }
    for m in METHODS:
        ratios = [cells[f"{m}/{s}"]["kl"] / predicted[m]["kl"][index[s]] for s in sizes]
        errors = [
            (p["measured output error"] / p["output error"], p["on the calibration sample"] / p["output error"])
            for s in sizes
            for p in points[m, s]
        ]
        found["whole"][m]["measured over predicted kl"] = [min(ratios), statistics.median(ratios), max(ratios)]
        found["layers"][m]["measured over predicted output error"] = statistics.median(e for e, _ in errors)
        found["layers"][m]["calibration sample over predicted output error"] = statistics.median(e for _, e in errors)
        found["whole"][m]["loss increases beyond two standard errors"] = {
            kind: sum(
                abs(cells[f"{m}/{s}"][f"{kind} loss"]) > 2 * cells[f"{m}/{s}"][f"{kind} standard error"] for s in sizes
            )
            / len(sizes)
            for kind in ("text", "task")
        }
    return found


def layer_points(predicted: dict, cell: dict, index: int) -> list[dict[str, float]]:
    """Predicted and measured numbers of every layer of a cell."""
    return [
        {
            "output error": predicted["layers"][name]["output error"][index],
            "kl": predicted["layers"][name]["kl"][index],
            "measured output error": layer["output error"],
            "on the calibration sample": layer["output error on the calibration sample"],
            "measured kl": layer["kl"],
            "measured loss": layer["loss"],
        }
        for name, layer in cell["layers"].items()
    ]


def share_of(counts: list[tuple[int, int]]) -> float:
    return sum(right for right, _ in counts) / sum(number for _, number in counts)


def grade(value: float) -> str:
    """Spearman's correlation in words."""
    return "a forecast" if value >= GOOD else "a rough guide" if value >= FAIR else "no forecast"


def conclusion(found: dict) -> list[str]:
    """What the numbers say, by rule: a rank correlation of 0.9 or more is a forecast, of 0.6 or more a rough guide.

    Over the sizes of one method anything monotone does well, so the number of experts removed is shown beside it.
    """
    kl = {target: found["whole"]["both"]["kl"][target]["spearman"] for target in TARGETS}
    lines = [
        "over sizes and methods, the predicted KL is "
        + ", ".join(f"{grade(kl[target])} of the {name}" for target, name in TARGETS.items())
    ]
    for target, name in TARGETS.items():
        for group in (*METHODS, "both"):
            row = found["whole"][group]
            kl, error, trivial = (row[what][target]["spearman"] for what in ("kl", "output error", "experts removed"))
            where = "over both methods" if group == "both" else group
            lines.append(
                f"{name}, {where}: Spearman {kl:.2f} by predicted KL ({grade(kl)}), {error:.2f} by output error "
                f"({grade(error)}); {trivial:.2f} by the number of experts removed"
            )
    for m in METHODS:
        low, middle, high = found["whole"][m]["measured over predicted kl"]
        scale = "right to a factor of 2" if low >= 0.5 and high <= 2 else "not right to a factor of 2"
        lines.append(f"{m}: measured over predicted KL is {low:.2f} to {high:.2f}, median {middle:.2f}: {scale}")
        layers, shares = found["layers"][m], found["whole"][m]["loss increases beyond two standard errors"]
        lines.append(
            f"{m}: output error on held-out data over predicted, median of layers and sizes "
            f"{layers['measured over predicted output error']:.2f}; on the sample that it was fitted to "
            f"{layers['calibration sample over predicted output error']:.2f}"
        )
        lines.append(
            f"{m}: loss increases beyond two standard errors at {shares['text']:.0%} of the sizes on text, "
            f"{shares['task']:.0%} on tasks; where they are not, there is no order to predict"
        )
    layers = found["layers"]["both"]
    lines.append(
        f"single layers, both methods: Spearman {layers['kl']['spearman']:.2f} of predicted with measured KL "
        f"({grade(layers['kl']['spearman'])}), {layers['loss']['spearman']:.2f} with the loss increase "
        f"({grade(layers['loss']['spearman'])}), {layers['output error']['spearman']:.2f} of output errors"
    )
    lines.append(
        "single layers at the same size: right order of measured KL in "
        f"{layers['right order at a size']['kl']:.0%} of pairs by predicted KL, "
        f"{layers['right order at a size']['output error']:.0%} by output error (half would be chance)"
    )
    return lines


def table(results: dict) -> list[str]:
    """Predicted and measured values of every method and size, in Markdown."""
    lines = []
    for m in METHODS:
        lines += [
            f"{m}:\n",
            "| experts | output error, predicted | KL, predicted | KL | loss, text | loss, tasks | exact match |",
            "|---|---|---|---|---|---|---|",
        ]
        for i, size in enumerate(results["sizes"]):
            cell, row = results["cells"][f"{m}/{size}"], results["predicted"][m]
            loss = {k: f"{cell[f'{k} loss']:+.4f} ± {cell[f'{k} standard error']:.4f}" for k in ("text", "task")}
            lines.append(
                f"| {size} | {row['output error'][i]:.4f} | {row['kl'][i]:.4f} | {cell['kl']:.4f} | {loss['text']} | "
                f"{loss['task']} | {cell['exact match']:.3f} |"
            )
        lines.append("")
    return lines


# ---- running


def predict(stats: msmoe.Stats) -> tuple[dict, dict[str, float]]:
    """Curves of both methods as plain values, and the seconds that each took."""
    predicted, seconds = {}, {}
    for m in METHODS:
        started = time.perf_counter()
        made = forecast(CHECKPOINT, stats, method=m)
        seconds[m] = time.perf_counter() - started
        whole = made.whole()
        predicted[m] = {
            "sizes": whole.sizes,
            "output error": whole.output_error,
            "kl": whole.kl,
            "experts removed": [max(whole.sizes) - size for size in whole.sizes],
            "layers": {n: {"output error": layer.output_error, "kl": layer.kl} for n, layer in made.layers.items()},
        }
    return predicted, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/forecast_demo.json"))
    args = parser.parse_args()
    silence_transformers()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(args.out.read_text()) if args.out.exists() else {"cells": {}}
    save = lambda: write_whole(args.out, json.dumps(results, indent=1) + "\n")
    with tempfile.TemporaryDirectory() as folder:
        bench, results["full exact match"] = prepare(Path(folder))
        results["settings"] = {
            "samples": SAMPLES, "token sample": TOKEN_SAMPLE, "fisher": FISHER, "records per task": PER_TASK,
            "passages": TEXTS, "share of target tokens": bench.share,
        }  # fmt: skip
        results["predicted"], results["seconds"] = predict(bench.stats)
        results["sizes"] = list(results["predicted"][METHODS[0]]["sizes"])
        results["num_experts"] = max(results["sizes"])
        missing = [(m, s) for s in results["sizes"] for m in METHODS if f"{m}/{s}" not in results["cells"]]
        measured = in_order(lambda cell: bench.measure(*cell, Path(folder)), missing, os.cpu_count() or 1)
        for (m, size), cell in zip(missing, measured, strict=True):
            results["cells"][f"{m}/{size}"] = cell
            save()
            print(f"{m}, {size} experts: KL {cell['kl']:.4f}", flush=True)
    results["comparison"] = compare(results)
    results["conclusion"] = conclusion(results["comparison"])
    save()
    print("\nPer target token, above the full model; loss with its standard error. Full exact match "
          f"{results['full exact match']:.3f}.\n")  # fmt: skip
    print("\n".join(table(results)))
    print("\n".join(f"- {line}" for line in results["conclusion"]))


if __name__ == "__main__":
    main()
