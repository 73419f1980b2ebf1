"""The content of results.json, checked: runs by method, size and recovery steps.

Shapes: N examples.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from msmoe.comparison.fields import Field, load_json
from msmoe.comparison.summary import FULL, REFERENCE, Task, count
from msmoe.errors import UserError

FORMAT = "msmoe-comparison/1"
METRICS = ("exact_match", "loss")

Key = tuple[str, float, int]  # method, experts, recovery steps: what a score is of


@dataclass(frozen=True)
class Run:
    """One cell of the file.

    Attributes:
        examples: task -> right or wrong (N,), bool, or loss and number of tokens (N, 2).
        not_finite: tasks whose loss is no number; they are not in `examples`.
    """

    key: Key
    seed: int
    average_kept: float
    num_bytes: int
    examples: dict[str, np.ndarray]
    not_finite: tuple[str, ...]
    layer_loss: dict[str, float]
    export: str = ""  # where the file names it

    def __str__(self) -> str:
        return f"{describe(self.key)}, seed {self.seed}"


@dataclass(frozen=True)
class Comparison:
    """The file, checked. `groups` holds the runs of each key by ascending seed, in the order of the file."""

    checkpoint: str
    num_parameters: int
    num_bytes: int
    calibration: str
    num_samples: int  # different choices of calibration records
    tasks: tuple[Task, ...]
    kinds: dict[str, str]
    groups: dict[Key, list[Run]]
    settings: dict
    budgets: dict[float, int]
    export: str = ""  # of the methods that it can hold, where the file names it

    @property
    def mean_metric(self) -> str:
        return "exact_match" if any(task.metric == "exact_match" for task in self.tasks) else "loss"

    @property
    def recover_steps(self) -> tuple[int, ...]:
        return tuple(sorted({steps for _, _, steps in self.groups}))

    @property
    def sizes(self) -> list[float]:
        """Sizes with a method, from the largest; with references only, those that were asked for."""
        measured = {experts for method, experts, _ in self.groups if not self.is_reference(method)}
        asked = {float(experts) for experts in self.settings.get("experts", [])}
        return sorted(measured or asked or {experts for _, experts, _ in self.groups}, reverse=True)

    def is_reference(self, method: str) -> bool:
        return self.kinds[method] == REFERENCE

    def place(self, method: str, experts: float) -> float | None:
        """Size at which a method stands in the table of `experts`: that size, for a reference else its largest."""
        sizes = {at for name, at, _ in self.groups if name == method}
        if experts in sizes:
            return experts
        return max(sizes) if self.is_reference(method) else None

    def full_model(self, recover_steps: int) -> Key | None:
        """The full model trained for as many steps, else untrained."""
        keys = [key for steps in (recover_steps, 0) for key in self.groups if key[0] == FULL and key[2] == steps]
        return keys[0] if keys else None


def load_comparison(path: Path) -> dict:
    """Content of a results.json, checked.

    Raises:
        UserError: naming the file, if it cannot be read, is no comparison or is damaged.
    """
    content = load_json(path)
    try:
        read(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    assert isinstance(content, dict)
    return content


def read(results: object) -> Comparison:
    """Check the content of results.json.

    Raises:
        UserError: if it is no comparison, or a field is missing, of a wrong type or range, or contradicts another.
    """
    found = results.get("format") if isinstance(results, dict) else None
    if not isinstance(results, dict) or found != FORMAT:
        raise UserError(f"not the results of `msmoe compare`: format is {found!r}, expected {FORMAT!r}")
    if not results.get("cells"):
        raise UserError("the comparison has no cells: nothing was measured")
    try:
        return read_fields(Field(results))
    except UserError as error:
        raise UserError(f"the comparison is damaged: {error}") from error


def read_fields(results: Field) -> Comparison:
    tasks = tuple(read_task(name, entry) for name, entry in results["tasks"].items())
    groups: dict[Key, list[Run]] = defaultdict(list)
    for run in sorted((read_run(cell, tasks) for cell in results["cells"].elements()), key=lambda run: run.seed):
        if any(run.seed == other.seed for other in groups[run.key]):
            raise UserError(f"the comparison has two cells for {run}")
        groups[run.key].append(run)
    original, calibration = results["checkpoint"], results["calibration"]
    if (fingerprint := original.get("fingerprint")) is not None:
        fingerprint.text()
    kinds = {name: entry["kind"].text() for name, entry in results["methods"].items()}
    if (costs := results.get("cost")) is not None:
        check_costs(costs)
    budgets = results.get("budgets")
    return Comparison(
        checkpoint=original["name"].text(),
        num_parameters=original["num_parameters"].integer(),
        num_bytes=original["bytes"].integer(),
        calibration=calibration["source"].text(),
        num_samples=len({digest.text() for digest in calibration["sha256"].elements()}),
        tasks=tasks,
        kinds={name: kinds.get(name, REFERENCE if name == FULL else "") for name, _, _ in groups},
        groups=dict(groups),
        settings=read_settings(results["settings"]),
        budgets={read_size(name, limit): limit.integer() for name, limit in budgets.items()} if budgets else {},
        export="" if (export := results["settings"].get("export")) is None else export.text(),
    )


def read_settings(settings: Field) -> dict:
    """What was asked for: methods, sizes, seeds and lengths of the recovery, each where the file has it."""
    checks = {
        "methods": Field.text,
        "experts": lambda size: size.number(least=1),
        "seeds": Field.integer,
        "recover_steps": Field.integer,
    }
    return {
        name: [check(element) for element in asked.elements()]
        for name, check in checks.items()
        if (asked := settings.get(name)) is not None
    }


def read_size(name: str, field: Field) -> float:
    """A number of experts that is the name of a field."""
    try:
        size = float(name)
    except ValueError:
        size = math.nan
    if not math.isfinite(size):
        raise UserError(f"{field.place}: {name!r} must be a number of experts")
    return size


def read_task(name: str, entry: Field) -> Task:
    share = entry.get("majority_share")
    return Task(
        name,
        entry["metric"].one_of(METRICS),
        entry["num_examples"].integer(least=1),
        None if share is None else share.number(least=0, most=1),
    )


def read_run(cell: Field, tasks: Sequence[Task]) -> Run:
    key = (cell["method"].text(), cell["experts"].number(least=0), cell["recover_steps"].integer())
    seed, scores = cell["seed"].integer(), dict(cell["tasks"].items())
    where = f"{describe(key)}, seed {seed}"
    unknown = scores.keys() - {task.name for task in tasks}
    if unknown:
        raise UserError(f"{where}: task {min(unknown)!r} is not among the comparison's tasks")
    examples = {
        task.name: read_examples(scores[task.name]["examples"].value, task, where)
        for task in tasks
        if task.name in scores
    }
    for score in scores.values():
        check_loss(score)
    broken = tuple(name for name, values in examples.items() if not np.isfinite(values).all())
    losses, kept = cell.get("layer_loss"), cell.get("kept")
    for _, stored in kept.items() if kept else []:
        stored.integer()
    return Run(
        key=key,
        seed=seed,
        average_kept=cell["average_kept"].number(least=0),
        num_bytes=cell["bytes"].integer(),
        examples={name: values for name, values in examples.items() if name not in broken},
        not_finite=broken,
        layer_loss={layer: loss.number() for layer, loss in losses.items()} if losses else {},
        export="" if (export := cell.get("export")) is None else export.text(),
    )


def check_loss(score: Field) -> None:
    """Check the loss of a task, which forecasts are held against; it may be NaN where examples are."""
    metrics = score.get("metrics")
    loss = metrics.get("loss") if metrics else None
    if loss is not None and not isinstance(loss["value"].value, float):
        loss["value"].number()


def read_examples(examples: object, task: Task, where: str) -> np.ndarray:
    if not isinstance(examples, str | list):
        raise UserError(f"{where}: examples of {task.name} must be a text or a list, got {type(examples).__name__}")
    if len(examples) != task.num_examples:
        raise UserError(f"{where}: {len(examples)} examples of {task.name}, the task has {task.num_examples}")
    if task.lower_is_better:
        values_N2 = as_numbers(examples)
        if values_N2.shape != (task.num_examples, 2) or not values_N2[:, 1].sum() > 0 or (values_N2[:, 1] < 0).any():
            raise UserError(f"{where}: examples of {task.name} must be pairs of summed loss and number of tokens")
        return values_N2
    if not isinstance(examples, str) or set(examples) - set("01"):
        raise UserError(f"{where}: examples of {task.name} must be a text of 0 and 1, one per example")
    return np.frombuffer(examples.encode(), dtype=np.uint8) == ord("1")


def as_numbers(values: object) -> np.ndarray:
    """Nested lists of numbers as an array; empty for anything else."""
    try:
        found = np.asarray(values)
    except (ValueError, OverflowError):  # rows of different lengths
        return np.empty(0)
    return found.astype(float) if found.dtype.kind in "if" else np.empty(0)


def check_costs(costs: Field) -> None:
    """Check the measured costs: every number of a method at a size, and of the full model beside it."""
    for name, entry in costs.items():
        read_size(name.rpartition("/")[2], entry)
        for side in (entry, entry["full"]):
            for stage in ("prefill", "generation"):
                for measure in ("tokens_per_second", "p50_seconds", "p95_seconds"):
                    side[stage][measure].number(above=0)
            for measure in ("flops_per_token", "peak_memory_bytes"):
                side[measure].number(above=0)


def describe(key: Key) -> str:
    method, experts, steps = key
    return f"{method} at {count(experts, 'expert')}" + (f" after {steps} steps" if steps else "")
