"""Per-example results of one task: loss, generated answers, label likelihoods.

The encoder runs once per batch; loss, generation and label scores share its output. Target tokens are scored in slices:
the logits of a whole batch are never there at once.

Shapes: B batch, S' target length, N valid target tokens, V vocabulary, D d_model.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from msmoe.calibration.batches import IGNORE, collate
from msmoe.calibration.tokenization import TokenRecords
from msmoe.calibration.tokenizer import SpecialTokens, encode
from msmoe.errors import UserError
from msmoe.evaluation import metrics as metric
from msmoe.evaluation.answers import MORE_TOKENS, canonical, decode, generating, greedy
from msmoe.evaluation.metrics import Estimate

METRICS = ("exact_match", "accuracy", "macro_f1", "loss")
FLOP_RECORDS = 8
SLICE = 2**24  # logits that are there at once, at most: 64 MiB in float32


@dataclass(frozen=True)
class Task:
    """What a model is scored on.

    Attributes:
        tokens: the records scored.
        targets: their target texts, as they stand in the file; "" without texts.
        every_target: those of the whole file, which says what the labels are.
        places: where the records stand.
    """

    tokens: TokenRecords
    targets: list[str]
    every_target: list[str]
    places: list[str]


class Scorer:
    """Scores of one task, filled batch by batch."""

    def __init__(self, model: Any, tokenizer: Any, task: Task, metrics: tuple[str, ...], special: SpecialTokens):
        self.model, self.tokenizer, self.task, self.metrics = model, tokenizer, task, metrics
        self.special = special
        self.settings = greedy(special, max_new_tokens=task.tokens.longest_target + MORE_TOKENS)
        self.losses = np.zeros(len(task.tokens))
        self.num_tokens = np.array([sum(label != IGNORE for label in r.labels) for r in task.tokens])
        self.answers = [""] * len(task.tokens)
        self.likeliest = [""] * len(task.tokens)
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
        if not {"accuracy", "macro_f1"} & set(self.metrics):
            return []
        return sorted(set(self._canonicals(self.task.every_target)))

    @cached_property
    def label_ids(self) -> list[list[int]]:
        return [encode(self.tokenizer, label, f"label {label!r}") for label in self.labels]

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
        batch = self._batch(chosen)
        mask = batch["attention_mask"]
        encoded = self.model.get_encoder()(input_ids=batch["input_ids"], attention_mask=mask)
        self.losses[chosen] = target_losses(self.model, encoded, mask, batch["labels"])
        if not np.isfinite(self.losses[chosen]).all():
            raise self._not_finite(chosen)
        if "accuracy" in self.metrics:
            labels = [torch.tensor([ids] * len(chosen), device=mask.device) for ids in self.label_ids]
            scores = [target_losses(self.model, encoded, mask, ids) for ids in labels]
            for i, best in zip(chosen, np.argmin(scores, axis=0), strict=True):
                self.likeliest[i] = self.labels[best]
        if self.generates:
            with generating(self.model, self.settings):
                written = self.model.generate(
                    encoder_outputs=encoded, attention_mask=mask, generation_config=self.settings
                )
            for i, text in zip(chosen, decode(self.tokenizer, written), strict=True):
                self.answers[i] = text

    def _batch(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        device = next(self.model.parameters()).device
        batch = collate([self.task.tokens[i] for i in chosen], pad_id=self.special.pad_id)
        return {name: tensor.to(device) for name, tensor in batch.items()}

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
        with FlopCounterMode(display=False) as counter:
            for i in chosen:
                batch = self._batch([i])
                mask = batch["attention_mask"]
                encoded = self.model.get_encoder()(input_ids=batch["input_ids"], attention_mask=mask)
                target_losses(self.model, encoded, mask, batch["labels"])
        return counter.get_total_flops() / sum(len(records[i].input_ids) + len(records[i].labels) for i in chosen)

    @property
    def right(self) -> np.ndarray:
        """(N,) bool, whether the generated answer is the target."""
        return np.array([answer == target for answer, target in zip(self.answers, self.targets, strict=True)])

    def estimates(self) -> dict[str, Estimate]:
        """The metrics asked for, in the order of `METRICS`."""
        available = {
            "exact_match": lambda: metric.mean(self.right.astype(float)),
            "accuracy": lambda: metric.mean(np.array(self.likeliest, dtype=object) == np.array(self.targets, object)),
            "macro_f1": lambda: metric.macro_f1(self.answers, self.targets, self.labels),
            "loss": lambda: metric.loss_per_token(self.losses, self.num_tokens),
        }
        return {name: available[name]() for name in METRICS if name in self.metrics}


def target_losses(model: Any, encoded: Any, mask: Tensor, labels: Tensor) -> np.ndarray:
    """Summed cross-entropy (B,) of target tokens (B, S'), -100 for none, given the encoder's output.

    The model runs up to its output embeddings, which then score the valid tokens in slices of `SLICE` logits.
    """
    head = model.get_output_embeddings()
    kept: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple) -> tuple:
        kept.append(inputs[0])
        return (inputs[0][:, :0],)

    handle = head.register_forward_pre_hook(keep)
    try:
        model(
            encoder_outputs=encoded,
            attention_mask=mask,
            decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels),
            use_cache=False,
        )
    finally:
        handle.remove()
    valid = labels != IGNORE
    states_ND, labels_N = kept[0][valid], labels[valid]
    size = max(1, SLICE // head.out_features)
    parts = [
        nn.functional.cross_entropy(head(states).float(), ids, reduction="none")
        for states, ids in zip(states_ND.split(size), labels_N.split(size), strict=True)
    ]
    rows_N = valid.nonzero()[:, 0].cpu()
    total_B = torch.zeros(len(labels), dtype=torch.float64)
    return total_B.index_add_(0, rows_N, torch.cat(parts).cpu().double()).numpy()
