"""How a checkpoint is fine-tuned: the choices of a user, checked."""

from dataclasses import dataclass
from typing import Literal

from msmoe.errors import UserError

TRAINABLE = ("experts", "router", "all")
ROW_SCORES = ("sensitivity", "magnitude")


@dataclass(frozen=True)
class RecoverOptions:
    """Loss, optimiser, schedule and pruning of a recovery.

    Attributes:
        steps, epochs: length of the run, one of them; an epoch is one pass over the training records.
        train: which weights move: the `experts`, the `router`, or `all`.
        batch_size: records per forward pass and process; accumulate: forward passes per step.
        learning_rate: of AdamW at the end of the warm-up, from where it falls linearly to 0; warmup: share of the
            steps; weight_decay: of matrices, never of norms and biases; clip: largest gradient norm.
        ce_weight, kd_weight, hidden_weight: of cross-entropy, distillation and hidden states in the loss.
        temperature: of the distillation.
        validation_share: of the records, chosen by their content, that pick the best step and are not trained on.
        evaluate_every: steps between validations; None stands for a tenth of the run.
        save_every: steps between states from which a killed run goes on; None saves after each validation.
        rank: factorise dense experts at this rank in memory before the first step.
        keep_rows: prune the kept rows of factorised experts to this share of the output rows.
        prune_warmup, prune_final: shares of the steps before pruning starts and after it is complete.
        row_score: `sensitivity` |s ds/dL| smoothed over steps, or `magnitude`.
        beta: of the smoothing.
        columns: field of a record -> the column of the data that holds it.
        device: `auto` takes what accelerate chooses; dtype: of the forward passes, `auto` as accelerate is configured;
            weights and optimiser are float32.
        seed: of data order, dropout and validation split.
    """

    steps: int | None = None
    epochs: float | None = None
    train: Literal["experts", "router", "all"] = "experts"
    batch_size: int = 16
    accumulate: int = 1
    learning_rate: float = 3e-4
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    ce_weight: float = 1.0
    kd_weight: float = 0.2
    hidden_weight: float = 0.0
    temperature: float = 2.0
    validation_share: float = 0.1
    evaluate_every: int | None = None
    save_every: int | None = None
    rank: int | None = None
    keep_rows: float | None = None
    prune_warmup: float = 0.04
    prune_final: float = 0.16
    row_score: Literal["sensitivity", "magnitude"] = "sensitivity"
    beta: float = 0.85
    max_source_length: int = 512
    max_target_length: int = 128
    columns: dict[str, str] | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    seed: int = 0

    def check(self, *, has_teacher: bool) -> None:
        """Raise `UserError` for a value out of range or a combination that means nothing."""
        if (self.steps is None) == (self.epochs is None):
            raise UserError("give one of --steps and --epochs")
        positive = ("steps", "epochs", "batch_size", "accumulate", "learning_rate", "clip", "temperature",
                    "evaluate_every", "save_every", "rank", "max_source_length", "max_target_length")  # fmt: skip
        for name in positive:
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"{flag(name)} must be above 0{' and finite' if value > 0 else ''}, got {value:g}")
        for name in ("ce_weight", "kd_weight", "hidden_weight", "weight_decay", "seed"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{flag(name)} must not be negative, got {getattr(self, name):g}")
        for name in ("warmup", "prune_warmup", "prune_final", "beta"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{flag(name)} must be at least 0 and below 1, got {getattr(self, name):g}")
        if not 0 < self.validation_share < 1:
            raise UserError(f"--validation-share must be between 0 and 1, got {self.validation_share:g}")
        if self.keep_rows is not None and not 0 < self.keep_rows <= 1:
            raise UserError(f"--keep-rows must be above 0 and at most 1, got {self.keep_rows:g}")
        if self.prune_warmup + self.prune_final >= 1:
            raise UserError("--prune-warmup and --prune-final leave no step to prune in: their sum must be below 1")
        for name, allowed in (("train", TRAINABLE), ("row_score", ROW_SCORES)):
            if getattr(self, name) not in allowed:
                raise UserError(f"unknown {flag(name)} {getattr(self, name)!r}; choose one of {', '.join(allowed)}")
        if self.rank is not None and self.keep_rows is None:
            raise UserError("--rank factorises in memory with every row kept: give --keep-rows to prune them")
        if self.keep_rows is not None and self.train == "router":
            raise UserError("--keep-rows prunes rows of the experts, which --train router does not train")
        if not self.ce_weight and not has_teacher:
            raise UserError("without a teacher the loss is the cross-entropy: --ce-weight must be above 0")
        if not (self.ce_weight or self.kd_weight or self.hidden_weight):
            raise UserError("every weight of the loss is 0")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")
