"""Fine-tune a checkpoint, as student of another one or by itself: one call from data to a new checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from msmoe.calibration.records import Source
from msmoe.recovery.options import RecoverOptions

ADVICE = "lower --batch-size and raise --accumulate, lower --max-source-length, or give --cache-teacher"


@dataclass(frozen=True)
class RecoverReport:
    """What `recover` did.

    Attributes:
        out: the new checkpoint.
        steps: of the run; best_step: the one whose weights were written, 0 for the student as it was.
        validation_before, validation_after: cross-entropy per target token on the validation records.
        num_train, num_validation: records.
        log: metrics of every step, JSON Lines.
    """

    out: Path
    steps: int
    best_step: int
    validation_before: float
    validation_after: float
    num_train: int
    num_validation: int
    num_parameters: int
    num_bytes: int
    log: Path


def recover(
    student: str | Path,
    out: str | Path,
    *,
    data: Source,
    teacher: str | Path | None,
    validation: Source | None = None,
    cache_teacher: bool = False,
    force: bool = False,
    resume: bool = False,
    progress: Callable[..., None] | None = None,
    **options,
) -> RecoverReport:
    """Train a checkpoint and write the weights of its best step.

    The loss is cross-entropy plus `kd_weight` T^2 KL(teacher || student), per target token. The student trains with
    dropout, the teacher is in evaluation mode. The state of the run, its log and TensorBoard events are kept in
    `<out>.training`.

    Args:
        student: any checkpoint that `msmoe.load` reads; it is never changed.
        out: folder to write; complete or absent at any moment.
        data: a file or data set with targets, or records: see `read_records`.
        teacher: checkpoint to learn from, or None for plain fine-tuning.
        validation: data that choose the best step; by default a share of `data` that is not trained on.
        cache_teacher: ask the teacher once about every record, keep its likeliest tokens on disk, and free it.
        force: replace an existing `out`.
        resume: go on with a killed run; the learning rate may differ from its own, nothing else.
        progress: called with (steps done, steps in all, note).
        **options: any attribute of `RecoverOptions`.

    Raises:
        UserError: for an input or an option that cannot be used, a loss that is not finite, or an output that cannot
            be written.
    """
    from msmoe.device import memory_explained
    from msmoe.recovery.trainer import Trainer

    chosen = RecoverOptions(**options)
    chosen.check(has_teacher=teacher is not None)
    with memory_explained(ADVICE):
        trainer = Trainer(student, out, data, teacher, validation, chosen, cache_teacher=cache_teacher, force=force)
        with trainer:
            trainer.prepare(resume=resume, progress=progress)
            trainer.run(progress)
            sizes = trainer.finish()
    return RecoverReport(
        trainer.out, trainer.steps, trainer.best_step, trainer.first_loss, trainer.best_loss,
        len(trainer.train_records), len(trainer.held_out), *sizes, log=trainer.folder / "metrics.jsonl",
    )  # fmt: skip
