"""What a comparison is asked to do, checked before anything runs."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from msmoe.calibration.datasets import task_files_in
from msmoe.calibration.records import Columns, read_records
from msmoe.errors import UserError
from msmoe.evaluation.run import allowed_metrics
from msmoe.planning.methods import resolve, variant

REFERENCES = ("full", "dense")
FISHER_RECORDS = 32  # output gradients cost a backward pass: a capped number of records


@dataclass(frozen=True)
class Settings:
    """A comparison.

    Attributes:
        methods: methods by name, the references included, perhaps with choices of their own: see `variant`.
        experts: sizes, as experts per compressible layer of the reference method m-smoe.
        recover_steps: lengths of the recovery that follows, 0 for none.
        seeds: of calibration sample, seeded choices and recovery.
        keep_layers: as `msmoe.plan`.
        samples, token_sample: as `msmoe.profile`.
        metric: the metric of labelled tasks; the others are scored by loss.
        max_examples: a seeded choice of so many examples per task.
        recovery: attributes of `RecoverOptions`, the same for every method.
        columns, device, dtype: as `msmoe.profile` and `msmoe.evaluate`; of the recovery too.
        export: of methods that it can hold, see `export_of`; None for encoder-decoders.
    """

    methods: tuple[str, ...]
    experts: tuple[float, ...]
    recover_steps: tuple[int, ...] = (0,)
    seeds: tuple[int, ...] = (0, 1, 2)
    keep_layers: tuple[str, ...] | None = None
    samples: int = 256
    token_sample: int = 4096
    metric: str = "exact_match"
    max_examples: int | None = None
    recovery: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, str] | None = None
    device: str = "auto"
    dtype: str = "auto"
    export: str | None = None

    def check(self) -> None:
        """Raise `UserError` for an unknown name or a value out of range."""
        for name in self.methods:
            try:
                resolve(*variant(name))
            except UserError as error:
                raise UserError(f"{name}: {error}" if ":" in name else str(error)) from error
        for values, what in ((self.experts, "--experts"), (self.recover_steps, "--recover-steps")):
            if not values:
                raise UserError(f"{what} names no number")
        if min(self.experts) < 1:
            raise UserError(f"--experts must be at least 1, got {min(self.experts):g}")
        if min(self.recover_steps) < 0:
            raise UserError(f"--recover-steps must not be negative, got {min(self.recover_steps)}")
        if not self.seeds:
            raise UserError("--seeds must be at least 1")
        if self.metric not in ("exact_match", "loss"):
            raise UserError(
                f"--metric is exact_match or loss, not {self.metric}: methods are compared example by example"
            )

    @property
    def kept(self) -> list[str] | None:
        return None if self.keep_layers is None else list(self.keep_layers)

    def describe(self) -> dict:
        """The settings in `results.json`; columns, device, dtype and export where they are not the usual ones."""
        every = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}
        plain = {name for name in ("columns", "device", "dtype", "export") if every[name] in (None, "auto")}
        return {name: value for name, value in every.items() if name not in plain}

    @property
    def unusual(self) -> dict:
        """What of columns and dtype decides numbers beside the usual settings."""
        return {name: value for name, value in self.describe().items() if name in ("columns", "dtype")}


def task_files(tasks: list[str | Path]) -> list[Path]:
    """Task files, a folder standing for its data files; names must differ.

    Raises:
        UserError: for a folder without tasks, a missing file or a name that comes twice.
    """
    files: list[Path] = []
    for task in tasks:
        files += task_files_in(task)
    names = [file.stem for file in files]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"two tasks are named {name}: rename one of {', '.join(str(f) for f in files if f.stem == name)}"
            )
    return files


def task_metric(file: Path, wanted: str, *, explicit: bool, columns: Columns | None = None) -> str:
    """The metric of a task: the one wanted where its records have labels, else the loss.

    Raises:
        UserError: if the metric was asked for explicitly and the task has no labels.
    """
    if not file.is_file():
        raise UserError(f"cannot read {file}: tasks of a comparison are files, or folders of them")
    allowed = allowed_metrics(read_records(file, columns=columns))
    if wanted in allowed:
        return wanted
    if explicit:
        raise UserError(f"task {file.stem} has no labels for {wanted}: its records need source and target; use "
                        "--metric loss, or leave the task out")  # fmt: skip
    return "loss"
