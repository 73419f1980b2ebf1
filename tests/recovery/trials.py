"""Short recoveries of tiny checkpoints, and readers of what they leave."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from tiny import VOCAB, load_tensors
from torch import nn

from msmoe.calibration.records import TokenRecord
from msmoe.checkpoint import Checkpoint
from msmoe.recovery.data import load_split
from msmoe.recovery.options import RecoverOptions
from msmoe.recovery.run import RecoverReport, recover
from msmoe.recovery.trainer import Trainer

# Without dropout and router noise two ways to the same number can agree.
QUIET = {
    "num_layers": 2, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
    "num_experts": 4, "dropout_rate": 0.0, "router_jitter_noise": 0.0,
}  # fmt: skip
LAYERS = ("encoder.block.1.layer.1.mlp", "decoder.block.1.layer.2.mlp")
SHORT = {"steps": 4, "batch_size": 8, "learning_rate": 1e-2, "validation_share": 0.2}


def lesson(count: int, *, seed: int = 3) -> list[dict]:
    """Records whose targets use 8 tokens of the vocabulary: something to learn that holds for unseen records too."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 13, size=(count, 2))
    return [
        {"input_ids": rng.integers(2, VOCAB, size=s).tolist(), "labels": rng.integers(2, 10, size=t).tolist()}
        for s, t in lengths
    ]


def short(student: Path, out: Path, **options) -> RecoverReport:
    return recover(student, out, **SHORT | options)


def started(
    student: Path, out: Path, *, data: Path, teacher: Path | None = None, validation: Path | None = None, **options
) -> Trainer:
    """A run before its first step."""
    chosen = RecoverOptions(**SHORT | options)
    trainer = Trainer(student, out, data, teacher, validation, chosen, cache_teacher=False, force=False)
    trainer.prepare(resume=False, progress=None)
    return trainer


def split_of(student: Path, data: Path, **options) -> tuple[list[TokenRecord], list[TokenRecord]]:
    """Training and validation records of a run."""
    return load_split(Checkpoint(student), data, None, RecoverOptions(**SHORT | options))


def stop_after(steps: int):
    """A progress function that interrupts the run, as Ctrl-C does."""

    def progress(done: int, total: int, note: str) -> None:
        if done == steps:
            raise KeyboardInterrupt

    return progress


def read_log(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def values_of(log: Path, name: str) -> dict[int, float]:
    """Step -> value of one number of `metrics.jsonl`."""
    return {record["step"]: record[name] for record in read_log(log) if name in record}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def check_same_weights(ours: Path, theirs: Path, start: Path) -> None:
    """Two runs from the same start agree but for a small part of what training moved; bit for bit where it moved none.

    AdamW turns the rounding of a gradient near zero into a step of any size: 2 % of the largest step are allowed.
    """
    first, second, before = (load_tensors(folder) for folder in (ours, theirs, start))
    for name in before:
        distance = float((first[name].double() - before[name].double()).abs().max())
        assert float((first[name].double() - second[name].double()).abs().max()) <= 0.02 * distance, name


def edited(checkpoint: Path, to: Path, **config) -> Path:
    """A copy of a checkpoint with other entries in its configuration."""
    shutil.copytree(checkpoint, to)
    content = json.loads((to / "config.json").read_text(encoding="utf-8"))
    (to / "config.json").write_text(json.dumps(content | config), encoding="utf-8")
    return to


@torch.no_grad()
def loss_per_token(model, records) -> float:
    """Cross-entropy per target token, one unpadded record at a time, by the model's own forward pass."""
    total, num_tokens = 0.0, 0
    for record in records:
        labels = torch.tensor([record.labels])
        logits = model(input_ids=torch.tensor([record.input_ids]), labels=labels).logits[0]
        total += float(nn.functional.cross_entropy(logits, labels[0], reduction="sum"))
        num_tokens += labels.numel()
    return total / num_tokens
