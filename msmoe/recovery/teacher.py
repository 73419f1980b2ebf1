"""The teacher: asked at every step, or once for all records, its likeliest tokens kept on disk.

Shapes: N valid target tokens, V vocabulary, K likeliest tokens kept.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msmoe.calibration.batches import IGNORE, batch_indices, collate
from msmoe.calibration.records import TokenRecord
from msmoe.files import explain_os_errors, reserve, write_whole
from msmoe.recovery.loss import TeacherOutput, with_rest

CACHED_TOKENS = 64  # kept per target token; the mass of all others is kept as one number
Forward = Callable[..., tuple[Tensor, list[Tensor]]]  # model, batch, hidden -> logits, hidden states


class LiveTeacher:
    """Runs the teacher beside the student."""

    def __init__(self, model: Any, forward: Forward, *, temperature: float, hidden: bool):
        self.model, self.forward = model, forward
        self.temperature, self.hidden = temperature, hidden

    @torch.no_grad()
    def __call__(self, chosen: Sequence[int], batch: dict[str, Tensor]) -> TeacherOutput:
        """What the teacher says about the records `chosen`, collated in `batch`."""
        logits, hidden = self.forward(self.model, batch, hidden=self.hidden)
        scaled = logits[batch["labels"] != IGNORE].float() / self.temperature
        return TeacherOutput(scaled.log_softmax(-1), hidden=hidden)


class CachedTeacher:
    """Reads what the teacher said from two files; the teacher itself is not in memory."""

    def __init__(self, folder: Path, records: Sequence[TokenRecord]):
        self.tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        self.log_probabilities = np.load(folder / "log_probabilities.npy", mmap_mode="r")
        self.starts = starts_of(records)

    def __call__(self, chosen: Sequence[int], batch: dict[str, Tensor]) -> TeacherOutput:
        rows = np.concatenate([np.arange(self.starts[i], self.starts[i + 1]) for i in chosen])
        device = batch["labels"].device
        return TeacherOutput(
            torch.from_numpy(self.log_probabilities[rows]).to(device),
            torch.from_numpy(self.tokens[rows].astype(np.int64)).to(device),
        )


def starts_of(records: Sequence[TokenRecord]) -> np.ndarray:
    """Position of each record's first target token among all, and their number at the end."""
    counts = [sum(label != IGNORE for label in r.labels) for r in records]
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def mapped(path: Path, dtype: type, shape: tuple[int, int]) -> np.memmap:
    """A new file of numbers in memory, its room on the disk reserved: a write to a full one would end the process."""
    numbers = np.lib.format.open_memmap(path, "w+", dtype, shape)
    with path.open("r+b") as stream:
        reserve(stream.fileno())
    return numbers


def fill_cache(
    folder: Path,
    identity: dict,
    load_teacher: Callable[[], LiveTeacher],
    records: Sequence[TokenRecord],
    *,
    batch_size: int,
    pad_id: int,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Ask the teacher about every record, unless `folder` holds just that already.

    Raises:
        UserError: if the folder cannot be written.
    """
    wanted = json.dumps(identity, sort_keys=True)
    try:
        if (folder / "identity.json").read_text(encoding="utf-8") == wanted:
            return
    except OSError:
        pass
    with explain_os_errors(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        teacher = load_teacher()
        starts = starts_of(records)
        kept = min(CACHED_TOKENS, teacher.model.config.vocab_size)
        shape = int(starts[-1]), kept
        tokens = mapped(folder / "tokens.npy", np.int32, shape)
        width = kept + (kept < teacher.model.config.vocab_size)
        values = mapped(folder / "log_probabilities.npy", np.float32, (shape[0], width))
        done = 0
        for chosen in batch_indices(records, batch_size):
            batch = {k: t.to(device) for k, t in collate([records[i] for i in chosen], pad_id=pad_id).items()}
            said = teacher(chosen, batch).log_probabilities
            ids = said.topk(kept, dim=-1).indices
            rows = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in chosen])
            tokens[rows] = ids.cpu().numpy()
            values[rows] = with_rest(said, ids).cpu().numpy()
            done += len(chosen)
            if progress:
                progress(done, len(records))
        tokens.flush()
        values.flush()
    write_whole(folder / "identity.json", wanted)
