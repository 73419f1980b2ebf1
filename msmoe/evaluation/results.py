"""Results: what was measured, one record per (checkpoint, task), in `results.json`."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from msmoe.evaluation.metrics import Estimate
from msmoe.files import write_whole
from msmoe.places import FILE, check_place

FORMAT = "msmoe-results/1"


@dataclass(frozen=True)
class TaskResult:
    """One checkpoint on one task.

    Attributes:
        checkpoint, task: names.
        metrics: metric -> value with interval.
        majority_share: share of the most frequent target; None for tasks without a small set of labels.
        num_parameters: parameters of the model; num_bytes: its weights on disk, None for a model in memory.
        flops_per_token: multiply-adds counted twice, of one forward pass over source and target tokens, all of which a
            decoder-only model reads in one sequence.
        seconds: time of the evaluation; peak_memory: bytes resident at most in this process so far.
        right: (N,) 0 or 1 per example, in file order, whether the generated answer is the target; empty without that
            metric. losses: (N, 2) summed loss and number of target tokens per example.
        source: fingerprint of the original checkpoint behind the model; None for a model in memory.
        settings: everything that the numbers depend on beside model and data, and the records cut and skipped.
    """

    checkpoint: str
    task: str
    metrics: dict[str, Estimate]
    majority_share: float | None
    num_parameters: int
    num_bytes: int | None
    flops_per_token: float
    seconds: float
    peak_memory: int
    right: list[int] = field(default_factory=list)
    losses: list[tuple[float, int]] = field(default_factory=list)
    source: str | None = None
    settings: dict = field(default_factory=dict)

    def describe(self) -> dict:
        """The record in `results.json`."""
        return {
            "checkpoint": self.checkpoint,
            "source": self.source,
            "task": self.task,
            "metrics": {
                name: {
                    "value": finite(e.value),
                    "ci95": [finite(e.low), finite(e.high)],
                    "num_examples": e.num_examples,
                }
                for name, e in self.metrics.items()
            },
            "majority_share": self.majority_share,
            "num_parameters": self.num_parameters,
            "bytes": self.num_bytes,
            "flops_per_token": finite(self.flops_per_token),
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory,
            "settings": self.settings,
        }


def finite(value: float) -> float | None:
    """The value, None for NaN and infinite ones, which JSON does not know."""
    return value if math.isfinite(value) else None


def results_frame(results: Sequence[TaskResult]):
    """A pandas DataFrame, one row per (checkpoint, task, metric), in the order of the results.

    Columns:
        checkpoint, task, metric: names.
        value: of the metric; exact_match, accuracy, accuracy_norm and macro_f1 from 0 to 1, loss and kl in nats per
            target token, from 0, perplexity from 1.
        low, high: ends of its 95 % confidence interval, in the unit of `value`.
        num_examples: examples that the metric was measured on.
        majority_share: share of the most frequent target, 0 to 1; missing for tasks without a small set of labels.
        num_parameters: parameters of the model.
        num_bytes: bytes of its weights on disk (Int64, missing for a model in memory).
        flops_per_token: of one forward pass, multiply-adds counted twice; missing if not counted.
        seconds: time of the evaluation of all metrics of the task.
        peak_memory: bytes resident at most in the process so far.
    """
    import pandas as pd

    shared = ("majority_share", "num_parameters", "num_bytes", "flops_per_token", "seconds", "peak_memory")
    columns = ["checkpoint", "task", "metric", "value", "low", "high", "num_examples", *shared]
    rows = [
        (r.checkpoint, r.task, metric, e.value, e.low, e.high, e.num_examples, *(getattr(r, name) for name in shared))
        for r in results
        for metric, e in r.metrics.items()
    ]
    frame = pd.DataFrame(rows, columns=pd.Index(columns))
    numbers = ("value", "low", "high", "majority_share", "flops_per_token", "seconds")
    counts = ("num_examples", "num_parameters", "peak_memory")
    return frame.astype(dict.fromkeys(numbers, "float64") | dict.fromkeys(counts, "int64") | {"num_bytes": "Int64"})


def save_results(results: Sequence[TaskResult], path: str | Path, *, force: bool = False) -> None:
    """Write `results.json`.

    Raises:
        UserError: if the file exists and `force` is not given, or cannot be written.
    """
    check_place(Path(path), FILE, force=force)
    content = {"format": FORMAT, "results": [result.describe() for result in results]}
    write_whole(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
