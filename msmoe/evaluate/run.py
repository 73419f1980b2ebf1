"""Run a model over a task: loss, generated answers, label likelihoods.

The encoder runs once per batch; loss, generation and label scores share its output.

Shapes: B batch, S source length, N examples, L labels, V vocabulary.
"""

import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from msmoe.calibration.batches import IGNORE, batch_indices, collate
from msmoe.calibration.profile import load_tokenizer
from msmoe.calibration.records import TokenRecord, choose_records, read_records, tokenize
from msmoe.checkpoint import Checkpoint
from msmoe.errors import UserError
from msmoe.evaluate import metrics as metric
from msmoe.evaluate.metrics import Estimate
from msmoe.evaluate.results import TaskResult
from msmoe.loading import load
from msmoe.provenance import original_fingerprint

METRICS = ("exact_match", "accuracy", "macro_f1", "loss")
MAX_LABELS = 64
FLOP_RECORDS = 8
Progress = Callable[[int, int], None]  # (examples done, examples in all)


@torch.inference_mode()
def evaluate(
    model: Any,
    data: str | Path,
    *,
    metrics: Sequence[str] | None = None,
    tokenizer=None,
    batch_size: int = 64,
    samples: int | None = None,
    seed: int = 0,
    count_flops: bool = True,
    progress: Progress | None = None,
) -> TaskResult:
    """Measure a model on a task.

    Args:
        model: a transformers sequence-to-sequence model, or a checkpoint folder.
        data: JSON Lines task; `source`/`target` records allow every metric, others the loss only.
        metrics: names out of `METRICS`; by default all that the data allow. `exact_match` compares what `generate`
            writes with the target; `accuracy` takes the label of highest likelihood; `macro_f1` is of the generated
            answers, one that is no label counts as wrong; `loss` is per target token.
        tokenizer: by default the checkpoint's own.
        samples: use a seeded choice of this many records.
        count_flops: count the operations of a few records; takes a second or so.

    Raises:
        UserError: for a checkpoint or data that cannot be used, or a metric that the data do not allow.
    """
    started = time.perf_counter()
    if batch_size < 1 or (samples is not None and samples < 1):
        raise UserError(f"batch size and samples must be at least 1, got {batch_size} and {samples}")
    name, num_bytes, source = "model", None, None
    path = model if isinstance(model, str | Path) else getattr(getattr(model, "config", None), "_name_or_path", "")
    if isinstance(model, str | Path):
        model = load(model)
    if path and Path(path).is_dir():
        checkpoint = Checkpoint(path)
        name, num_bytes, source = Path(path).name, checkpoint.num_bytes, original_fingerprint(checkpoint)
        tokenizer = tokenizer or load_tokenizer(Path(path))
    raw = read_records(data)
    wanted = check_metrics(metrics, raw, data) if metrics else allowed_metrics(raw)
    raw = raw if samples is None else choose_records(raw, samples, seed=seed)
    pad_id = model.config.pad_token_id or 0
    records = tokenize(raw, tokenizer, pad_id=pad_id, vocab_size=model.config.vocab_size, seed=seed)
    scorer = Scorer(model.eval(), tokenizer, raw, records, wanted, pad_id=pad_id)
    done = 0
    for chosen in batch_indices(records, batch_size):
        scorer.score(chosen)
        done += len(chosen)
        if progress:
            progress(done, len(records))
    return TaskResult(
        checkpoint=name,
        task=Path(data).stem,
        metrics=scorer.estimates(),
        majority_share=scorer.majority_share,
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_bytes=num_bytes,
        flops_per_token=scorer.flops_per_token() if count_flops else float("nan"),
        seconds=time.perf_counter() - started,
        peak_memory=peak_memory(),
        right=scorer.right.astype(int).tolist() if "exact_match" in scorer.metrics else [],
        losses=list(zip(scorer.losses.tolist(), scorer.num_tokens.tolist(), strict=True)),
        source=source,
    )


def allowed_metrics(records: Sequence[dict]) -> tuple[str, ...]:
    """Metrics that records have: all for a task with few different targets, the loss for anything."""
    if not all("source" in record for record in records):
        return ("loss",)
    labelled = len({record["target"] for record in records}) <= MAX_LABELS
    return METRICS if labelled else ("exact_match", "loss")


def check_metrics(metrics: Sequence[str], records: Sequence[dict], data: str | Path) -> tuple[str, ...]:
    """The metrics; `UserError` for an unknown one or one that the records do not have."""
    for name in metrics:
        if name not in METRICS:
            raise UserError(f"unknown metric {name!r}; choose from {', '.join(METRICS)}")
        if name not in allowed_metrics(records):
            raise UserError(
                f"{name} needs records with source and at most {MAX_LABELS} different targets; {data} has others"
            )
    return tuple(metrics)


class Scorer:
    """Per-example results of one task, filled batch by batch."""

    def __init__(
        self,
        model: Any,
        tokenizer,
        raw: Sequence[dict],
        records: list[TokenRecord],
        metrics: tuple[str, ...],
        *,
        pad_id: int,
    ):
        self.model, self.tokenizer, self.records, self.pad_id = model, tokenizer, records, pad_id
        self.metrics = metrics
        self.targets = [record.get("target", "") for record in raw]
        self.labels = sorted(set(self.targets)) if {"accuracy", "macro_f1"} & set(metrics) else []
        self.label_ids = tokenizer(self.labels).input_ids if self.labels else []
        self.losses = np.zeros(len(records))
        self.num_tokens = np.array([sum(label != IGNORE for label in r.labels) for r in records])
        self.answers = [""] * len(records)
        self.likeliest = [""] * len(records)
        self.longest = max(len(r.labels) for r in records) + 2

    @property
    def majority_share(self) -> float | None:
        return max(Counter(self.targets).values()) / len(self.targets) if self.labels else None

    def score(self, chosen: list[int]) -> None:
        """Add the examples at the indices `chosen`."""
        batch = collate([self.records[i] for i in chosen], pad_id=self.pad_id)
        device = next(self.model.parameters()).device
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        mask, labels = batch["attention_mask"], batch["labels"]
        encoded = self.model.get_encoder()(input_ids=batch["input_ids"], attention_mask=mask)
        self.losses[chosen] = self._loss(encoded, mask, labels)
        if "accuracy" in self.metrics:
            scores = [
                self._loss(encoded, mask, torch.tensor([ids] * len(chosen), device=device)) for ids in self.label_ids
            ]
            for i, best in zip(chosen, np.argmin(scores, axis=0), strict=True):
                self.likeliest[i] = self.labels[best]
        if {"exact_match", "macro_f1"} & set(self.metrics):
            written = self.model.generate(
                encoder_outputs=encoded,
                attention_mask=mask,
                max_new_tokens=self.longest,
                do_sample=False,
                num_beams=1,
            )
            texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
            for i, text in zip(chosen, texts, strict=True):
                self.answers[i] = text.strip()

    def flops_per_token(self) -> float:
        """Floating-point operations per source and target token, counted on single unpadded records."""
        chosen = self.records[:: max(1, len(self.records) // FLOP_RECORDS)][:FLOP_RECORDS]
        device = next(self.model.parameters()).device
        with FlopCounterMode(display=False) as counter:
            for record in chosen:
                batch = {name: t.to(device) for name, t in collate([record], pad_id=self.pad_id).items()}
                encoded = self.model.get_encoder()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
                self._loss(encoded, batch["attention_mask"], batch["labels"])
        return counter.get_total_flops() / sum(len(r.input_ids) + len(r.labels) for r in chosen)

    def _loss(self, encoded, mask: Tensor, labels: Tensor) -> np.ndarray:
        """Summed cross-entropy (B,) of target tokens (B, S'), given the encoder's output."""
        output = self.model(
            encoder_outputs=encoded,
            attention_mask=mask,
            decoder_input_ids=self.model.prepare_decoder_input_ids_from_labels(labels),
            use_cache=False,
        )
        losses = nn.functional.cross_entropy(
            output.logits.float().transpose(1, 2), labels, ignore_index=IGNORE, reduction="none"
        )
        return losses.double().sum(1).cpu().numpy()

    @property
    def right(self) -> np.ndarray:
        """(N,) bool, whether the generated answer is the target."""
        return np.array([answer == target for answer, target in zip(self.answers, self.targets, strict=True)])

    def estimates(self) -> dict[str, Estimate]:
        """The metrics asked for, in the order of `METRICS`."""
        right = self.right
        likely = np.array([answer == target for answer, target in zip(self.likeliest, self.targets, strict=True)])
        available = {
            "exact_match": lambda: metric.mean(right.astype(float)),
            "accuracy": lambda: metric.mean(likely.astype(float)),
            "macro_f1": lambda: metric.macro_f1(self.answers, self.targets),
            "loss": lambda: metric.loss_per_token(self.losses, self.num_tokens),
        }
        return {name: available[name]() for name in METRICS if name in self.metrics}


def peak_memory() -> int:
    """Most bytes that were ever resident in this process.

    `getrusage` would count the parent's memory at the time of the fork as well, so Linux is asked for its own figure.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
