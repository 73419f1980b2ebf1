"""Per-example results of one task: loss, generated answers, likelihoods of labels and choices.

An encoder runs once per batch; loss, generation and other answers share its output. Target tokens are scored in slices:
the logits of a whole batch are never there at once.

Shapes: B batch, N examples, C choices.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from msmoe.calibration.batches import IGNORE
from msmoe.calibration.spans import TokenRecord
from msmoe.calibration.targets import divergences, log_probabilities
from msmoe.calibration.tokenization import TokenRecords
from msmoe.calibration.tokenizer import SpecialTokens
from msmoe.errors import UserError
from msmoe.evaluation import metrics as metric
from msmoe.evaluation.answers import MORE_TOKENS, canonical, decode, greedy
from msmoe.evaluation.batch import Batch, batch_of
from msmoe.evaluation.flops import flop_counter
from msmoe.evaluation.metrics import Estimate

METRICS = ("exact_match", "accuracy", "macro_f1", "loss", "perplexity", "kl", "accuracy_norm")
FLOP_RECORDS = 8


@dataclass(frozen=True)
class Task:
    """What a model is scored on.

    Attributes:
        tokens: the records scored.
        targets: their target texts, as they stand in the file; "" without texts.
        every_target: those of the whole file, which says what the labels are.
        places: where the records stand.
        answer_ids: (index of a record, text) -> token ids of the text as an answer to the record.
        choices: per record the texts to choose from, and right the positions of the right ones; empty for records
            without.
    """

    tokens: TokenRecords
    targets: list[str]
    every_target: list[str]
    places: list[str]
    answer_ids: Callable[[int, str], list[int]]
    choices: list[list[str]] = field(default_factory=list)
    right: list[int] = field(default_factory=list)


class Scorer:
    """Scores of one task, filled batch by batch."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        task: Task,
        metrics: tuple[str, ...],
        special: SpecialTokens,
        reference: Any = None,
    ):
        self.model, self.tokenizer, self.task, self.metrics = model, tokenizer, task, metrics
        self.special, self.reference = special, reference
        self.settings = greedy(special, max_new_tokens=task.tokens.longest_target + MORE_TOKENS)
        self.losses = np.zeros(len(task.tokens))
        self.divergences = np.zeros(len(task.tokens))
        self.num_tokens = np.array([sum(label != IGNORE for label in r.labels) for r in task.tokens])
        self.answers = [""] * len(task.tokens)
        self.likeliest = [""] * len(task.tokens)
        self.chosen = np.zeros((len(task.tokens), 2), dtype=int)  # by likelihood, and by likelihood per token
        self._canonical: dict[str, str] = {}

    @property
    def generates(self) -> bool:
        return bool({"exact_match", "macro_f1"} & set(self.metrics))

    @cached_property
    def targets(self) -> list[str]:
        """The targets that answers are compared with, one per record."""
        return self._canonicals(self.task.targets)

    @cached_property
    def labels(self) -> list[str]:
        """The task's labels, ascending; none where no metric is about labels."""
        if self.task.choices or not {"accuracy", "macro_f1"} & set(self.metrics):
            return []
        return sorted(set(self._canonicals(self.task.every_target)))

    @cached_property
    def label_texts(self) -> list[str]:
        """The labels as they are scored: for a decoder with the white space that they have where they stand first."""
        if not self.special.is_causal:
            return self.labels
        first: dict[str, str] = {}
        for text, label in zip(self.task.every_target, self._canonicals(self.task.every_target), strict=True):
            first.setdefault(label, text)
        return [first[label] for label in self.labels]

    @property
    def majority_share(self) -> float | None:
        """Share of the most frequent target in the whole file."""
        targets = self._canonicals(self.task.every_target) if self.labels else []
        return max(Counter(targets).values()) / len(targets) if targets else None

    def _canonicals(self, texts: Sequence[str]) -> list[str]:
        for text in texts:
            if text not in self._canonical:
                self._canonical[text] = canonical(self.tokenizer, text, f"target {text!r}")
        return [self._canonical[text] for text in texts]

    def score(self, chosen: list[int]) -> None:
        """Add the examples at the indices `chosen`.

        Raises:
            UserError: if the loss of one is not finite.
        """
        records = [self.task.tokens[i] for i in chosen]
        batch = self._batch(self.model, records)
        targets = batch.targets()
        self.losses[chosen] = -targets.by_record(log_probabilities(targets))
        if not np.isfinite(self.losses[chosen]).all():
            raise self._not_finite(chosen)
        if "kl" in self.metrics:
            reference = self._batch(self.reference, records).targets()
            self.divergences[chosen] = targets.by_record(divergences(targets, reference))
        if self.task.choices:
            self._choose(batch, chosen)
        elif "accuracy" in self.metrics:
            scores = [
                batch.losses([self.task.answer_ids(i, text) for i in chosen]) for text in self.label_texts
            ]  # fmt: skip
            for i, best in zip(chosen, np.argmin(scores, axis=0), strict=True):
                self.likeliest[i] = self.labels[best]
        if self.generates:
            for i, text in zip(chosen, decode(self.tokenizer, batch.write(self.settings)), strict=True):
                self.answers[i] = text

    def _choose(self, batch: Batch, chosen: list[int]) -> None:
        """Take the choice of highest likelihood, and of highest likelihood per token."""
        if not {"accuracy", "accuracy_norm"} & set(self.metrics):
            return
        choices = [[self.task.answer_ids(i, text) for text in self.task.choices[i]] for i in chosen]
        count = max(map(len, choices))
        answers = [[own[c] if c < len(own) else None for own in choices] for c in range(count)]
        losses_BC = np.stack([batch.losses(answer) for answer in answers], axis=1)
        lengths_BC = np.array([[len(answer[row] or [0]) for answer in answers] for row in range(len(chosen))])
        self.chosen[chosen, 0] = losses_BC.argmin(1)
        self.chosen[chosen, 1] = (losses_BC / lengths_BC).argmin(1)

    def _batch(self, model: Any, records: Sequence[TokenRecord]) -> Batch:
        return batch_of(model, records, pad_id=self.special.pad_id)

    def _not_finite(self, chosen: list[int]) -> UserError:
        """What is wrong with a model that gives no finite loss."""
        name = next((name for name, p in self.model.named_parameters() if not p.isfinite().all()), None)
        if name is not None:
            return UserError(f"the model gives no finite loss: its tensor {name} holds NaN or infinite values")
        worst = next(i for i in chosen if not np.isfinite(self.losses[i]))
        dtype = str(self.model.dtype).removeprefix("torch.")
        return UserError(
            f"the loss of {self.task.places[worst]} is {self.losses[worst]} though every weight is finite: the model "
            f"overflows in {dtype}; try --dtype float32"
        )

    def flops_per_token(self) -> float:
        """Floating-point operations per source and target token, counted on single unpadded records."""
        records = self.task.tokens
        chosen = range(0, len(records), max(1, len(records) // FLOP_RECORDS))[:FLOP_RECORDS]
        with flop_counter() as counter:
            for i in chosen:
                log_probabilities(self._batch(self.model, [records[i]]).targets())
        return counter.get_total_flops() / sum(self._length(records[i]) for i in chosen)

    def _length(self, record: TokenRecord) -> int:
        """Tokens that the model reads: of a decoder-only one, the labels are among the inputs."""
        return len(record.input_ids) + (0 if self.special.is_causal else len(record.labels))

    @property
    def right(self) -> np.ndarray:
        """(N,) bool, whether the generated answer is the target."""
        return np.array([answer == target for answer, target in zip(self.answers, self.targets, strict=True)])

    def accuracy(self, column: int) -> Estimate:
        """Share of examples whose likeliest label, or choice, is the right one.

        Args:
            column: of `chosen`, for choices.
        """
        if self.task.choices:
            return metric.mean(self.chosen[:, column] == np.array(self.task.right))
        return metric.mean(np.array(self.likeliest, dtype=object) == np.array(self.targets, object))

    def estimates(self) -> dict[str, Estimate]:
        """The metrics asked for, in the order of `METRICS`."""
        available = {
            "exact_match": lambda: metric.mean(self.right.astype(float)),
            "accuracy": lambda: self.accuracy(0),
            "macro_f1": lambda: metric.macro_f1(self.answers, self.targets, self.labels),
            "loss": lambda: metric.loss_per_token(self.losses, self.num_tokens),
            "perplexity": lambda: metric.perplexity(metric.loss_per_token(self.losses, self.num_tokens)),
            "kl": lambda: metric.loss_per_token(self.divergences, self.num_tokens),
            "accuracy_norm": lambda: self.accuracy(1),
        }
        return {name: available[name]() for name in METRICS if name in self.metrics}
