"""Records of a recovery: training and validation split, and the batches of every step."""

from collections.abc import Sequence

import numpy as np

from msmoe.calibration.batches import IGNORE, record_key
from msmoe.calibration.records import Source, TokenRecord, join_sources, read_records
from msmoe.calibration.tokenization import tokenize_for
from msmoe.checkpoint import Checkpoint
from msmoe.errors import UserError
from msmoe.layer.tokens import mix
from msmoe.recovery.options import RecoverOptions

WINDOW = 16  # batches among which records are sorted by length


def load_split(
    checkpoint: Checkpoint, data: Source, validation: Source | None, options: RecoverOptions
) -> tuple[list[TokenRecord], list[TokenRecord]]:
    """Training and validation records.

    Without a file of its own, validation takes a share of the records, chosen by their content and the seed: equal
    records never stand on both sides.

    Raises:
        UserError: if either side is empty.
    """
    records = tokens_of(checkpoint, data, options)
    if validation is not None:
        held_out = tokens_of(checkpoint, validation, options)
        known = {record_key(r) for r in held_out}
        train = [r for r in records if record_key(r) not in known]
    else:
        keys = np.array([record_key(r) for r in records], dtype=np.uint64)
        share = mix(keys ^ mix(np.array([options.seed + 1], dtype=np.uint64))).astype(np.float64) / 2.0**64
        threshold = max(options.validation_share, float(share.min()))
        held_out = [r for r, s in zip(records, share, strict=True) if s <= threshold]
        train = [r for r, s in zip(records, share, strict=True) if s > threshold]
    if not train:
        raise UserError(f"{join_sources([data])} leaves no record to train on beside {len(held_out)} for validation")
    return train, held_out


def tokens_of(checkpoint: Checkpoint, data: Source, options: RecoverOptions) -> list[TokenRecord]:
    return tokenize_for(
        checkpoint,
        read_records(data, columns=options.columns),
        max_source_length=options.max_source_length,
        max_target_length=options.max_target_length,
        seed=options.seed,
    )


def num_targets(records: Sequence[TokenRecord]) -> int:
    return sum(label != IGNORE for r in records for label in r.labels)


class BatchOrder:
    """Which records every step sees: each epoch a seeded permutation, records of similar length together."""

    def __init__(self, records: Sequence[TokenRecord], size: int, *, seed: int):
        self.lengths = np.array([len(r.input_ids) + len(r.labels) for r in records])
        self.size, self.seed = size, seed
        self.steps_per_epoch = -(-len(records) // size)
        self._epoch, self._batches = -1, []

    def batch(self, step: int) -> list[int]:
        """Indices of the records of a step, counted from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffled(epoch)
        return self._batches[position]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.lengths))
        window = self.size * WINDOW
        windows = [order[i : i + window] for i in range(0, len(order), window)]
        order = np.concatenate([w[np.argsort(-self.lengths[w], kind="stable")] for w in windows])
        batches = [order[i : i + self.size].tolist() for i in range(0, len(order), self.size)]
        return [batches[i] for i in rng.permutation(len(batches))]
