"""The content of results.json, checked: runs by method, size and recovery steps.

Shapes: N examples.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from msmoe.compare.summary import FULL, REFERENCE, Task, count
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


def read(results: object) -> Comparison:
    """Check the content of results.json.

    Raises:
        UserError: if it is no comparison, or a field is missing or contradicts another.
    """
    found = results.get("format") if isinstance(results, dict) else None
    if not isinstance(results, dict) or found != FORMAT:
        raise UserError(f"not the results of `msmoe compare`: format is {found!r}, expected {FORMAT!r}")
    if not results.get("cells"):
        raise UserError("the comparison has no cells: nothing was measured")
    try:
        return read_fields(results)
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"the comparison is damaged: a field {error} is missing") from error
    except (TypeError, AttributeError, ValueError) as error:
        raise UserError(f"the comparison is damaged: {error}") from error


def read_fields(results: dict) -> Comparison:
    tasks = tuple(
        Task(name, entry["metric"], entry["num_examples"], entry["majority_share"])
        for name, entry in results["tasks"].items()
    )
    for task in tasks:
        if task.metric not in METRICS:
            raise UserError(f"task {task.name}: metric must be one of {', '.join(METRICS)}, got {task.metric!r}")
    groups: dict[Key, list[Run]] = defaultdict(list)
    for run in sorted((read_run(cell, tasks) for cell in results["cells"]), key=lambda run: run.seed):
        if any(run.seed == other.seed for other in groups[run.key]):
            raise UserError(f"the comparison has two cells for {run}")
        groups[run.key].append(run)
    original = results["checkpoint"]
    kinds = {name: entry["kind"] for name, entry in results["methods"].items()}
    return Comparison(
        checkpoint=str(original["name"]),
        num_parameters=int(original["num_parameters"]),
        num_bytes=int(original["bytes"]),
        calibration=str(results["calibration"]["source"]),
        num_samples=len(set(results["calibration"]["sha256"])),
        tasks=tasks,
        kinds={name: kinds.get(name, REFERENCE if name == FULL else "") for name, _, _ in groups},
        groups=dict(groups),
        settings=results["settings"],
        budgets={float(experts): limit for experts, limit in results.get("budgets", {}).items()},
    )


def read_run(cell: dict, tasks: Sequence[Task]) -> Run:
    key = (cell["method"], float(cell["experts"]), int(cell["recover_steps"]))
    where = f"{describe(key)}, seed {cell['seed']}"
    unknown = cell["tasks"].keys() - {task.name for task in tasks}
    if unknown:
        raise UserError(f"{where}: task {min(unknown)!r} is not among the comparison's tasks")
    measured = [task for task in tasks if task.name in cell["tasks"]]
    examples = {task.name: read_examples(cell["tasks"][task.name]["examples"], task, where) for task in measured}
    broken = tuple(name for name, values in examples.items() if not np.isfinite(values).all())
    return Run(
        key=key,
        seed=int(cell["seed"]),
        average_kept=float(cell["average_kept"]),
        num_bytes=int(cell["bytes"]),
        examples={name: values for name, values in examples.items() if name not in broken},
        not_finite=broken,
        layer_loss=cell.get("layer_loss") or {},
    )


def read_examples(examples: str | list, task: Task, where: str) -> np.ndarray:
    if len(examples) != task.num_examples or not examples:
        raise UserError(f"{where}: {len(examples)} examples of {task.name}, the task has {task.num_examples}")
    if task.lower_is_better:
        values_N2 = np.asarray(examples, dtype=float)
        if values_N2.shape != (task.num_examples, 2) or not values_N2[:, 1].sum() > 0:
            raise UserError(f"{where}: examples of {task.name} must be pairs of summed loss and number of tokens")
        return values_N2
    if not isinstance(examples, str) or set(examples) - set("01"):
        raise UserError(f"{where}: examples of {task.name} must be a text of 0 and 1, one per example")
    return np.frombuffer(examples.encode(), dtype=np.uint8) == ord("1")


def describe(key: Key) -> str:
    method, experts, steps = key
    return f"{method} at {count(experts, 'expert')}" + (f" after {steps} steps" if steps else "")
