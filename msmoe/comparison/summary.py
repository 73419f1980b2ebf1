"""The answer of a comparison: a `Summary` of `Size`s of `Row`s, with the columns, marks and legend of its tables."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

ALPHA = 0.05
FULL, REFERENCE = "full", "reference"
SAME_AS_FULL, SAME_AS_BEST = "≈", "†"  # not significantly different from it
MISSING = "-"
METHODS_TESTED, CHECKPOINTS_TESTED = "method, over seeds", "checkpoint, one seed"
LABELS = ("method", "kind", "seeds", "MB", "experts")


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
        value: mean over seeds; low, high: 95 % interval over examples and seeds, of one seed over examples alone.
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
    def speaks_of(self) -> str:
        """What interval and p-values are a statement on."""
        return METHODS_TESTED if self.num_seeds > 1 else CHECKPOINTS_TESTED

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
        export: in which it was measured, where that is named.
    """

    method: str
    kind: str
    average_kept: float
    measurements: dict[int, Measurement]
    layer_loss: dict[str, float]
    export: str = ""

    @property
    def is_reference(self) -> bool:
        return self.kind == REFERENCE

    @property
    def num_bytes(self) -> int:
        """Stored bytes, the most over recovery steps."""
        return max(measurement.num_bytes for measurement in self.measurements.values())

    @property
    def num_seeds(self) -> int:
        """Runs of the method, the fewest over recovery steps."""
        return min(len(measurement.seeds) for measurement in self.measurements.values())

    @property
    def labels(self) -> tuple[str, ...]:
        """Texts for the columns `LABELS`."""
        size = megabytes(self.num_bytes), f"{self.average_kept:.4g}"
        return self.method, self.kind or MISSING, str(self.num_seeds), *size

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
    export: str = ""

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
    def marks_meaning(self) -> str:
        """What the marks of this comparison are a statement on: methods, or these checkpoints."""
        runs = [row.num_seeds for size in self.sizes for row in size.methods]
        level = f"(p ≥ {ALPHA} after Holm's correction over the rows of the column"
        pairs = "McNemar's exact test of right and wrong answers, a paired bootstrap over examples of losses and means"
        if max(runs, default=1) == 1:
            return (
                f"One seed: marks speak of these checkpoints, not of the methods. {SAME_AS_FULL} this checkpoint is "
                f"not significantly different from the full model; {SAME_AS_BEST} nor from the best checkpoint of the "
                f"column {level}; {pairs}). Another seed may give another answer: --seeds 5 tests the methods."
            )
        single = (
            " Of rows with one seed the marks speak of these checkpoints, not of the methods: against another single "
            f"run, {pairs}; against several seeds, theirs are taken to vary as much."
            if min(runs) == 1
            else ""
        )
        return (
            f"{SAME_AS_FULL} method not significantly different from the full model; {SAME_AS_BEST} nor from the best "
            f"method of the column {level}; a test over seeds and examples together, with Student's t for the few "
            f"seeds).{single}"
        )

    @property
    def exports_meaning(self) -> str:
        """In which export the rows were measured."""
        rows = [row for size in self.sizes for row in size.rows]
        others = list(dict.fromkeys(row.method for row in rows if row.export not in ("", self.export)))
        if not others:
            return f"Checkpoints are {self.export} exports."
        return (
            f"Checkpoints are {self.export} exports, but for {', '.join(others)}, which {self.export} cannot hold: "
            "these are exact, within the same bytes."
        )

    @property
    def legend(self) -> tuple[str, ...]:
        """What columns and marks mean, for below a table."""
        metric = "loss per token" if self.mean_metric == "loss" else "exact match"
        lines = [
            self.marks_meaning,
            f"{self.mean_title}: {metric} averaged over {count(len(self.mean_tasks), 'task')}, with the 95 % interval "
            "over examples and seeds (of one seed over examples alone); methods share the examples, so overlapping "
            "intervals may still differ significantly. rank: 1 is best, averaged over all tasks, ties share theirs. "
            "Rows are sorted by the first mean. The best method of a column is bold; references are no candidates.",
        ]
        if self.export:
            lines.append(self.exports_meaning)
        trained = [str(steps) for steps in self.recover_steps if steps]
        if trained:
            lines.append(
                f"@{', @'.join(trained)}: after so many steps of recovery training; without @, or @0: no training."
            )
        return tuple(lines)


def count(number: float, noun: str) -> str:
    return f"{number:,g} {noun}{'' if number == 1 else 's'}"


def megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.2f}"
