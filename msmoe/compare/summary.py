"""What a comparison says: scores with intervals, tests, ranks and warnings, from the content of results.json alone.

The nouns of the answer come first (`Summary` of `Size`s of `Row`s), then reading, scoring and warning.

Shapes: C runs, N examples, R resamples, M methods, T tasks.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from msmoe.compare.significance import (
    ALPHA,
    Resampled,
    detectable_difference,
    holm,
    mean_of,
    mean_ranks,
    p_value,
    resample_means,
    resample_ratios,
)
from msmoe.errors import UserError

FORMAT = "msmoe-comparison/1"
FULL, REFERENCE = "full", "reference"
METRICS = ("exact_match", "loss")
SAME_AS_FULL, SAME_AS_BEST = "≈", "†"  # not significantly different from it
MISSING = "-"
LABELS = ("method", "kind", "MB", "experts")

MAX_HALF_WIDTH = 0.03
MIN_EXAMPLES = 200
MAX_BYTES_APART = 0.01
MAX_LISTED = 4  # things that a warning names one by one

Key = tuple[str, float, int]  # method, experts, recovery steps: what a score is of


@dataclass(frozen=True)
class Task:
    """A task file; `majority_share` is the share of its most frequent answer, None without a small set of labels."""

    name: str
    metric: str
    num_examples: int
    majority_share: float | None

    @property
    def lower_is_better(self) -> bool:
        return self.metric == "loss"

    @property
    def heading(self) -> str:
        return f"{self.name} (loss)" if self.lower_is_better else self.name

    def __str__(self) -> str:
        metric = "loss per token, lower is better" if self.lower_is_better else "exact match"
        majority = "" if self.majority_share is None else f", most frequent answer {self.majority_share:.3f}"
        return f"{self.name}: {metric}, {self.num_examples:,} examples{majority}"


@dataclass(frozen=True)
class Score:
    """A method in one column, at one size and one number of recovery steps.

    Attributes:
        value: mean over seeds; low, high: 95 % interval over examples and seeds.
        num_examples, num_seeds: what it rests on.
        p_full, p_best: p-value against the full model and the best method of the column, after Holm's correction over
            the rows of the column; None for the full model and the best itself, and with nothing to compare with.
        is_best: best value of the column; references are no candidates.
    """

    value: float
    low: float
    high: float
    num_examples: int
    num_seeds: int
    p_full: float | None
    p_best: float | None
    is_best: bool

    @property
    def marks(self) -> str:
        """Symbols of what this score cannot be told from."""
        tests = ((self.p_full, SAME_AS_FULL), (self.p_best, SAME_AS_BEST))
        return "".join(mark for p, mark in tests if p is not None and p >= ALPHA)

    @property
    def with_interval(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def __str__(self) -> str:
        return f"{self.value:.3f}"


@dataclass(frozen=True)
class Measurement:
    """A method at one size after some recovery steps.

    Attributes:
        seeds: of its runs, ascending.
        num_bytes: stored, mean over seeds.
        scores: task -> score, of the tasks that were measured.
        mean: over tasks of one metric (`Summary.mean_metric`); None unless all of them were measured.
        rank: 1 is best, mean over all tasks, among methods that have all; None for others and references.
    """

    recover_steps: int
    seeds: tuple[int, ...]
    num_bytes: int
    scores: dict[str, Score]
    mean: Score | None
    rank: float | None


@dataclass(frozen=True)
class Column:
    """A column of numbers in a table: the mean, the rank or one task, after some recovery steps."""

    quantity: Literal["mean", "rank", "task"]
    title: str
    task: str | None
    recover_steps: int

    @property
    def heading(self) -> str:
        return f"{self.title} @{self.recover_steps}" if self.recover_steps else self.title


@dataclass(frozen=True)
class Cell:
    """Text of a table's cell; `is_best` asks for emphasis."""

    text: str
    is_best: bool = False


@dataclass(frozen=True)
class Row:
    """A method at one size, or a reference beside it.

    Attributes:
        average_kept: experts stored per compressed layer, on average.
        measurements: recovery steps -> what was measured; at least one.
        layer_loss: layer -> loss per token above the full model with only this layer compressed, mean over seeds.
    """

    method: str
    kind: str
    average_kept: float
    measurements: dict[int, Measurement]
    layer_loss: dict[str, float]

    @property
    def is_reference(self) -> bool:
        return self.kind == REFERENCE

    @property
    def num_bytes(self) -> int:
        """Stored bytes, the most over recovery steps."""
        return max(measurement.num_bytes for measurement in self.measurements.values())

    @property
    def labels(self) -> tuple[str, str, str, str]:
        """Texts for the columns `LABELS`."""
        return self.method, self.kind or MISSING, megabytes(self.num_bytes), f"{self.average_kept:.4g}"

    def score(self, column: Column) -> Score | None:
        measured = self.measurements.get(column.recover_steps)
        if measured is None or column.quantity == "rank":
            return None
        return measured.mean if column.task is None else measured.scores.get(column.task)

    def rank(self, column: Column) -> float | None:
        measured = self.measurements.get(column.recover_steps)
        return None if measured is None else measured.rank

    def cell(self, column: Column) -> Cell:
        """Text of the row in a column; the mean has its interval, marks follow after a blank."""
        if column.quantity == "rank":
            rank = self.rank(column)
            return Cell(MISSING if rank is None else f"{rank:.1f}")
        score = self.score(column)
        if score is None:
            return Cell(MISSING)
        text = score.with_interval if column.quantity == "mean" else str(score)
        return Cell(f"{text} {score.marks}".rstrip(), score.is_best)

    def cells(self, columns: Sequence[Column]) -> list[Cell]:
        return [self.cell(column) for column in columns]


@dataclass(frozen=True)
class Size:
    """All that was measured at one average number of experts: references first, then methods by their mean.

    Attributes:
        budget: bytes that no method may exceed; None where none was set.
    """

    experts: float
    budget: int | None
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        return f"{count(self.experts, 'expert')} per layer"

    @property
    def methods(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if not row.is_reference)


@dataclass(frozen=True)
class Summary:
    """A whole comparison; `sizes` from the largest to the smallest, `recover_steps` ascending."""

    checkpoint: str
    num_parameters: int
    num_bytes: int
    calibration: str
    tasks: tuple[Task, ...]
    mean_metric: str
    recover_steps: tuple[int, ...]
    sizes: tuple[Size, ...]
    warnings: tuple[str, ...]

    @property
    def mean_tasks(self) -> tuple[Task, ...]:
        """Tasks that the mean is over: those scored by exact match, or all if there are none."""
        return tuple(task for task in self.tasks if task.metric == self.mean_metric)

    @property
    def mean_title(self) -> str:
        return "mean loss" if self.mean_metric == "loss" else "mean"

    def columns(self, *, tasks: bool = True, recover_steps: Sequence[int] | None = None) -> tuple[Column, ...]:
        """Columns of a table; the same quantity after different recovery steps stands side by side.

        Args:
            tasks: also one per task, not only mean and rank.
            recover_steps: of these only; default all that were measured.
        """
        steps = self.recover_steps if recover_steps is None else recover_steps
        every = [Column("mean", self.mean_title, None, 0), Column("rank", "rank", None, 0)]
        if tasks:
            every += [Column("task", task.heading, task.name, 0) for task in self.tasks]
        return tuple(replace(column, recover_steps=n) for column in every for n in steps)

    @property
    def legend(self) -> tuple[str, ...]:
        """What columns and marks mean, for below a table."""
        metric = "loss per token" if self.mean_metric == "loss" else "exact match"
        lines = [
            f"{SAME_AS_FULL} not significantly different from the full model; {SAME_AS_BEST} not significantly "
            f"different from the best method of the column (p ≥ {ALPHA} after Holm's correction over the rows of the "
            "column; McNemar's exact test for single runs, else a paired bootstrap over examples). The best method of "
            "a column is bold; references are no candidates.",
            f"{self.mean_title}: {metric} averaged over {count(len(self.mean_tasks), 'task')}, with the 95 % interval "
            "over examples and seeds; methods share the examples, so overlapping intervals may still differ "
            "significantly. rank: 1 is best, averaged over all tasks, ties share theirs. Rows follow the first mean.",
        ]
        trained = [str(steps) for steps in self.recover_steps if steps]
        if trained:
            lines.append(
                f"@{', @'.join(trained)}: after so many steps of recovery training; without @, or @0: no training."
            )
        return tuple(lines)


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


def summarise(results: dict) -> Summary:
    """Summarise a comparison. Pure and deterministic; takes seconds for hundreds of cells.

    Args:
        results: content of results.json, format `msmoe-comparison/1`.

    Raises:
        UserError: if it is no comparison, or a field is missing or contradicts another.
    """
    comparison = read(results)
    columns = resample(comparison)
    sizes = tuple(summarise_size(experts, comparison, columns) for experts in comparison.sizes)
    return Summary(
        checkpoint=comparison.checkpoint,
        num_parameters=comparison.num_parameters,
        num_bytes=comparison.num_bytes,
        calibration=comparison.calibration,
        tasks=comparison.tasks,
        mean_metric=comparison.mean_metric,
        recover_steps=comparison.recover_steps,
        sizes=sizes,
        warnings=(
            *missing_cells(comparison),
            *missing_tasks(comparison),
            *missing_references(comparison),
            *unequal_bytes(sizes),
            *single_seed(comparison),
            *small_tasks(comparison, columns),
        ),
    )


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


Columns = dict[str | None, dict[Key, Resampled]]  # task, or None for the mean -> what was measured


def resample(comparison: Comparison) -> Columns:
    """Resample all runs task by task, and their mean over the tasks of one metric."""
    columns: Columns = {task.name: resample_task(task, comparison.groups) for task in comparison.tasks}
    averaged = [columns[task.name] for task in comparison.tasks if task.metric == comparison.mean_metric]
    means = {
        key: mean_of([column[key] for column in averaged])
        for key in comparison.groups
        if averaged and all(key in column for column in averaged)
    }
    return columns | {None: {key: mean for key, mean in means.items() if mean is not None}}


def resample_task(task: Task, groups: dict[Key, list[Run]]) -> dict[Key, Resampled]:
    """Resample all runs of a task in one matrix product."""
    having = {key: [run for run in group if task.name in run.examples] for key, group in groups.items()}
    runs = [run for group in having.values() for run in group]
    if not runs:
        return {}
    examples = np.stack([run.examples[task.name] for run in runs])
    if task.lower_is_better:
        losses_CN, tokens_CN = examples[..., 0], examples[..., 1]
        values_C = losses_CN.sum(axis=1) / tokens_CN.sum(axis=1)
        resampled_RC = resample_ratios(losses_CN, tokens_CN, key=task.name)
    else:
        values_C = examples.mean(axis=1)
        resampled_RC = resample_means(examples.astype(float), key=task.name)
    column, start = {}, 0
    for key, group in having.items():
        own = slice(start, start := start + len(group))
        if group:
            outcomes = examples[own][0] if len(group) == 1 and not task.lower_is_better else None
            seeds = tuple(run.seed for run in group)
            column[key] = Resampled(seeds, values_C[own], resampled_RC[:, own], task.num_examples, outcomes)
    return column


def summarise_size(experts: float, comparison: Comparison, columns: Columns) -> Size:
    """All rows at one size."""
    places = {method: at for method in comparison.kinds if (at := comparison.place(method, experts)) is not None}
    measured: dict[str, dict[int, Measurement]] = defaultdict(dict)
    for steps in comparison.recover_steps:
        keys = [key for method, at in places.items() if (key := (method, at, steps)) in comparison.groups]
        for key, measurement in measure(keys, comparison, columns).items():
            measured[key[0]][steps] = measurement
    rows = [make_row(method, places[method], comparison, found) for method, found in measured.items()]
    return Size(experts, comparison.budgets.get(experts), tuple(sorted(rows, key=row_order(comparison))))


def measure(keys: Sequence[Key], comparison: Comparison, columns: Columns) -> dict[Key, Measurement]:
    """Score and rank the rows of a table after the same recovery steps."""
    scores = {name: score_column(column, keys, comparison, name) for name, column in columns.items()}
    names = [task.name for task in comparison.tasks]
    complete = [k for k in keys if not comparison.is_reference(k[0]) and all(k in scores[name] for name in names)]
    ranks = {}
    if complete and names:
        table_MT = np.array([[scores[name][key].value for name in names] for key in complete])
        lower = [task.lower_is_better for task in comparison.tasks]
        ranks = dict(zip(complete, mean_ranks(table_MT, lower_is_better=lower).tolist(), strict=True))
    measured = {}
    for key in keys:
        runs = comparison.groups[key]
        measured[key] = Measurement(
            recover_steps=key[2],
            seeds=tuple(run.seed for run in runs),
            num_bytes=round(float(np.mean([run.num_bytes for run in runs]))),
            scores={name: scores[name][key] for name in names if key in scores[name]},
            mean=scores[None].get(key),
            rank=ranks.get(key),
        )
    return measured


def score_column(
    column: dict[Key, Resampled], keys: Sequence[Key], comparison: Comparison, name: str | None
) -> dict[Key, Score]:
    """Score the rows of a table in one column; corrections are over these rows."""
    metrics: dict[str | None, str] = {task.name: task.metric for task in comparison.tasks}
    exact = metrics.get(name, comparison.mean_metric) == "exact_match"
    measured = [key for key in keys if key in column]
    candidates = [key for key in measured if not comparison.is_reference(key[0])]
    best = min(candidates, key=lambda key: (column[key].value * (-1 if exact else 1), key), default=None)
    full = comparison.full_model(keys[0][2]) if keys else None
    against_full, against_best = (compare_rows(column, measured, other) for other in (full, best))
    scores = {}
    for key in measured:
        found = column[key]
        low, high = np.clip(found.interval, 0.0, 1.0) if exact else found.interval
        scores[key] = Score(
            found.value, float(low), float(high), found.num_examples, len(found.values),
            against_full.get(key), against_best.get(key), key == best,
        )  # fmt: skip
    return scores


def compare_rows(column: dict[Key, Resampled], keys: Sequence[Key], other: Key | None) -> dict[Key, float]:
    """Corrected p-values of the rows against `other`, but for itself and the full model."""
    if other is None or other not in column:
        return {}
    tested = [key for key in keys if key != other and key[0] != FULL]
    return dict(zip(tested, holm([p_value(column[key], column[other]) for key in tested]), strict=True))


def make_row(method: str, place: float, comparison: Comparison, measured: dict[int, Measurement]) -> Row:
    runs = [run for steps in measured for run in comparison.groups[method, place, steps]]
    losses = defaultdict(list)
    for run in runs:
        for layer, loss in run.layer_loss.items():
            losses[layer].append(loss)
    return Row(
        method=method,
        kind=comparison.kinds[method],
        average_kept=float(np.mean([run.average_kept for run in runs])),
        measurements=measured,
        layer_loss={layer: float(np.mean(values)) for layer, values in losses.items()},
    )


def row_order(comparison: Comparison) -> Callable[[Row], tuple]:
    """Full model, other references, then methods by their means; those without a mean last."""
    sign = 1 if comparison.mean_metric == "loss" else -1

    def order(row: Row) -> tuple:
        found = [row.measurements.get(steps) for steps in comparison.recover_steps]
        means = [sign * m.mean.value if m is not None and m.mean is not None else float("inf") for m in found]
        return not row.is_reference, row.method != FULL, *means, row.method

    return order


def missing_cells(comparison: Comparison) -> list[str]:
    """Cells that the settings ask for and that are not there."""
    asked = comparison.settings
    seeds = asked.get("seeds", [])
    wanted = [
        (method, float(experts), int(steps))
        for method in asked.get("methods", [])
        if comparison.kinds.get(method) != REFERENCE
        for experts in asked.get("experts", [])
        for steps in asked.get("recover_steps", [0])
    ]
    gaps = {key: sorted(set(seeds) - {run.seed for run in comparison.groups.get(key, [])}) for key in wanted}
    texts = [
        describe(key) + ("" if len(absent) == len(seeds) else f" (seed {', '.join(map(str, absent))})")
        for key, absent in gaps.items()
        if absent
    ]
    if not texts:
        return []
    return [f"missing {sum(map(len, gaps.values()))} of {count(len(wanted) * len(seeds), 'cell')}: {listed(texts)}"]


def missing_tasks(comparison: Comparison) -> list[str]:
    """Tasks that a cell lacks, or whose loss is no number."""
    lacking = [
        f"{run} on {task.name}" + (" (its loss is no number)" if task.name in run.not_finite else "")
        for runs in comparison.groups.values()
        for run in runs
        for task in comparison.tasks
        if task.name not in run.examples
    ]
    return [f"not measured: {listed(lacking)}; means and ranks leave these runs out"] if lacking else []


def missing_references(comparison: Comparison) -> list[str]:
    """Comparisons with the full model that cannot be made, or are with one that had less training."""
    steps_of = defaultdict(set)
    for method, _, steps in comparison.groups:
        steps_of[method == FULL].add(steps)
    if not any(comparison.full_model(steps) for steps in comparison.recover_steps):
        return ["the full model was not measured: nothing is compared with it"]
    untrained = sorted(steps_of[False] - steps_of[True] - {0})
    if not untrained:
        return []
    return [
        f"the full model was not trained for {', '.join(map(str, untrained))} steps: methods after recovery are "
        "compared with it untrained"
    ]


def unequal_bytes(sizes: Sequence[Size]) -> list[str]:
    """Methods of one size that differ in bytes, or exceed its budget."""
    warnings = []
    for size in sizes:
        stored = {row.method: row.num_bytes for row in size.methods}
        if not stored:
            continue
        least, most = min(stored, key=stored.__getitem__), max(stored, key=stored.__getitem__)
        apart = stored[most] / max(stored[least], 1) - 1
        if apart > MAX_BYTES_APART:
            warnings.append(
                f"{size.title}: stored bytes differ by {apart:.1%}, from {least} with {megabytes(stored[least])} MB to "
                f"{most} with {megabytes(stored[most])} MB"
            )
        over = [method for method, num_bytes in stored.items() if size.budget and num_bytes > size.budget]
        if over:
            warnings.append(f"{size.title}: over the budget of {megabytes(size.budget or 0)} MB: {listed(over)}")
    return warnings


def single_seed(comparison: Comparison) -> list[str]:
    """Intervals that know nothing of another calibration sample."""
    runs = [runs for key, runs in comparison.groups.items() if not comparison.is_reference(key[0])]
    if not runs or any(len(group) > 1 for group in runs):
        return []
    return ["one seed only: the intervals are over examples and hold no variation between calibration samples"]


def small_tasks(comparison: Comparison, columns: Columns) -> list[str]:
    """Tasks that can hardly tell methods apart, and those at which the full model itself is no good."""
    warnings = []
    full = comparison.full_model(0) or comparison.full_model(max(comparison.recover_steps))
    for task in comparison.tasks:
        measured = columns[task.name].get(full) if full else None
        low, high = measured.interval if measured else (0.0, 0.0)
        half_width = (high - low) / 2
        exact = task.metric == "exact_match"
        if task.num_examples < MIN_EXAMPLES or (exact and half_width > MAX_HALF_WIDTH):
            width = f", the full model's interval is ±{half_width:.3f}" if measured else ""
            warnings.append(f"{task.name} is small: {count(task.num_examples, 'example')}{width}"
                            + (smallest_difference(task, comparison) if exact else ""))  # fmt: skip
        if exact and measured and task.majority_share is not None and low <= task.majority_share:
            warnings.append(
                f"{task.name} measures little: the full model, {measured.value:.3f} [{low:.3f}, {high:.3f}], is not "
                f"above the share of the most frequent answer, {task.majority_share:.3f}"
            )
    return warnings


def smallest_difference(task: Task, comparison: Comparison) -> str:
    """The smallest difference that a pair of runs could show, from how often methods disagree with the full model."""
    disagreements = [
        float((run.examples[task.name] != other.examples[task.name]).mean())
        for key, runs in comparison.groups.items()
        if not comparison.is_reference(key[0]) and (full := comparison.full_model(key[2]))
        for other in comparison.groups[full][:1]
        for run in runs
        if task.name in run.examples and task.name in other.examples
    ]
    if not disagreements:
        return ""
    discordance = float(np.median(disagreements))
    return (
        f"; two runs would have to differ by about {detectable_difference(discordance, task.num_examples):.3f} to be "
        f"told apart with 80 % power (methods disagree with the full model on {discordance:.1%} of the examples)"
    )


def describe(key: Key) -> str:
    method, experts, steps = key
    return f"{method} at {count(experts, 'expert')}" + (f" after {steps} steps" if steps else "")


def listed(texts: Iterable[str]) -> str:
    """The first few, and how many more."""
    every = list(texts)
    more = f" and {len(every) - MAX_LISTED} more" if len(every) > MAX_LISTED else ""
    return ", ".join(every[:MAX_LISTED]) + more


def count(number: float, noun: str) -> str:
    return f"{number:,g} {noun}{'' if number == 1 else 's'}"


def megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.2f}"
