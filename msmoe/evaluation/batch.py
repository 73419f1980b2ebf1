"""A batch of records under evaluation: its losses, those of other answers to it, and what the model writes itself.

Shapes: B batch, S source length, T tokens written.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from msmoe.calibration.batches import IGNORE, collate, collate_prompts, pad
from msmoe.calibration.causal import answered, prompt_length
from msmoe.calibration.spans import TokenRecord
from msmoe.calibration.targets import Targets, log_probabilities, targets_of
from msmoe.calibration.tokenizer import is_causal
from msmoe.evaluation.answers import generating


class Batch(Protocol):
    """Records before a model."""

    def targets(self) -> Targets:
        """The records' own target tokens."""
        ...

    def losses(self, answers: Sequence[Sequence[int] | None]) -> np.ndarray:
        """Summed cross-entropy (B,) of one other answer per record, infinite where there is none."""
        ...

    def write(self, settings: Any) -> list[list[int]]:
        """What the model writes for each record: token ids, up to the first end of sequence."""
        ...


class Seq2SeqBatch:
    """Records of an encoder-decoder, whose encoder runs once for all that is asked."""

    def __init__(self, model: Any, records: Sequence[TokenRecord], *, pad_id: int):
        self.model = model
        self.inputs = on(model, collate(records, pad_id=pad_id))
        self.encoded = model.get_encoder()(
            input_ids=self.inputs["input_ids"], attention_mask=self.inputs["attention_mask"]
        )

    def targets(self) -> Targets:
        return targets_of(self.model, self.inputs, encoded=self.encoded)

    def losses(self, answers: Sequence[Sequence[int] | None]) -> np.ndarray:
        labels = on(self.model, {"labels": pad([answer or [] for answer in answers], IGNORE)})
        targets = targets_of(self.model, self.inputs | labels, encoded=self.encoded)
        return without(-targets.by_record(log_probabilities(targets)), answers)

    def write(self, settings: Any) -> list[list[int]]:
        with generating(self.model, settings):
            written = self.model.generate(
                encoder_outputs=self.encoded, attention_mask=self.inputs["attention_mask"], generation_config=settings
            )
        return written.tolist()


class CausalBatch:
    """Records of a decoder-only model: prompts and their answers."""

    def __init__(self, model: Any, records: Sequence[TokenRecord], *, pad_id: int):
        self.model, self.records, self.pad_id = model, records, pad_id
        self.prompts = [record.input_ids[: prompt_length(record)] for record in records]

    def targets(self) -> Targets:
        return targets_of(self.model, on(self.model, collate(self.records, pad_id=self.pad_id)))

    def losses(self, answers: Sequence[Sequence[int] | None]) -> np.ndarray:
        records = [answered(p, answer or []) for p, answer in zip(self.prompts, answers, strict=True)]
        targets = targets_of(self.model, on(self.model, collate(records, pad_id=self.pad_id)))
        return without(-targets.by_record(log_probabilities(targets)), answers)

    def write(self, settings: Any) -> list[list[int]]:
        prompts = on(self.model, collate_prompts(self.prompts, pad_id=self.pad_id))
        with generating(self.model, settings):
            written = self.model.generate(**prompts, generation_config=settings)
        ends = set(settings.eos_token_id or [])
        return [until_end(ids, ends) for ids in written[:, prompts["input_ids"].shape[1] :].tolist()]


def batch_of(model: Any, records: Sequence[TokenRecord], *, pad_id: int) -> Batch:
    """Records before a model of either kind."""
    kind = CausalBatch if is_causal(model.config) else Seq2SeqBatch
    return kind(model, records, pad_id=pad_id)


def on(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}


def without(losses: np.ndarray, answers: Sequence[Sequence[int] | None]) -> np.ndarray:
    """The losses (B,), infinite where there is no answer."""
    return np.where([answer is None for answer in answers], np.inf, losses)


def until_end(ids: Sequence[int], ends: set[int]) -> list[int]:
    """The ids before the first end of sequence."""
    return list(ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))])


__all__ = ["Batch", "CausalBatch", "Seq2SeqBatch", "batch_of"]
