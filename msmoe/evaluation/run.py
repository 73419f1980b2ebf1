"""Run a model over a task: what it is measured on, how, and the result."""

import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from msmoe.calibration.batches import batch_indices
from msmoe.calibration.chat import conversation
from msmoe.calibration.files import STANDARD_INPUT, stem_of
from msmoe.calibration.records import Columns, Records, Source, choose_records, kind_of, read_records
from msmoe.calibration.subject import loaded_from
from msmoe.calibration.tokenization import tokenize
from msmoe.calibration.tokenizer import SpecialTokens, load_tokenizer, special_tokens
from msmoe.checkpoint import Checkpoint
from msmoe.compression.provenance import original_fingerprint
from msmoe.device import AUTO, choose_device, choose_dtype, memory_explained
from msmoe.errors import UserError
from msmoe.evaluation.answers import describe
from msmoe.evaluation.results import TaskResult
from msmoe.evaluation.scorer import METRICS, Scorer, Task
from msmoe.families.loading import load

MAX_LABELS = 64
ADVICE = "lower --batch-size or --max-source-length, or give --device cpu or --dtype bfloat16"
Progress = Callable[[int, int], None]  # (examples done, examples in all)


@torch.no_grad()
def evaluate(
    model: Any,
    data: Source,
    *,
    metrics: Sequence[str] | None = None,
    tokenizer: Any = None,
    batch_size: int = 64,
    samples: int | None = None,
    seed: int = 0,
    count_flops: bool = True,
    device: str | None = None,
    dtype: str = AUTO,
    max_source_length: int | None = None,
    max_target_length: int | None = None,
    columns: Columns | None = None,
    task: str | None = None,
    progress: Progress | None = None,
) -> TaskResult:
    """Measure a model on a task.

    Nothing is cut unless asked for, and answers are compared with the whole target. Of the checkpoint's stored settings
    of generation only the special tokens count: answers are greedy, at most two tokens longer than the longest target.

    Args:
        model: a transformers sequence-to-sequence model, or a checkpoint folder. A model that is no longer what its
            folder holds is called `model`, without bytes and source.
        data: a file, a data set or records, see `read_records`; those with source and target (or messages) allow every
            metric, others the loss only.
        metrics: names out of `METRICS`; by default all that the data allow. `exact_match` compares what `generate`
            writes with the target; `accuracy` takes the label of highest likelihood; `macro_f1` is of the generated
            answers, one that is no label counts as wrong; `loss` is per target token. Labels and the share of the most
            frequent one are those of all data.
        tokenizer: by default the checkpoint's own.
        samples: use a seeded choice of this many records.
        count_flops: count the operations of a few records; takes a second or so.
        device: where a folder's model runs, by default `auto`; a model in memory is moved only if this is given.
        dtype: in which a folder's model runs: `auto` (float32), `float32`, `bfloat16` or `float16`.
        max_source_length, max_target_length: cut longer sources, and targets for the loss; cuts are counted.
        columns: field of a record -> the column that holds it.
        task: name of the task; by default that of the file.

    Raises:
        UserError: for a checkpoint or data that cannot be used, a metric that the data do not allow, a loss that is not
            finite, or where memory is too small.

    Warns:
        DataWarning: for records that are blank or cut, and fields that are not used.
    """
    started = time.perf_counter()
    if batch_size < 1 or (samples is not None and samples < 1):
        raise UserError(f"batch size and samples must be at least 1, got {batch_size} and {samples}")
    with memory_explained(ADVICE):
        checkpoint = checkpoint_of(model)
        unchanged = checkpoint if isinstance(model, str | Path) else loaded_from(model)
        if isinstance(model, str | Path):
            model, device = load(model, dtype=choose_dtype(dtype)), device or AUTO
        if device is not None:
            model = model.to(choose_device(device))
        name, num_bytes, source = "model", None, None
        if unchanged is not None:
            name, num_bytes = unchanged.path.name, unchanged.num_bytes
            source = original_fingerprint(unchanged)
        if checkpoint is not None:
            tokenizer = tokenizer or load_tokenizer(checkpoint.path)
        special = special_tokens_of(model, checkpoint)
        every = data if isinstance(data, Records) else read_records(data, columns=columns)
        wanted = check_metrics(metrics, every, data) if metrics else allowed_metrics(every)
        raw = every if samples is None else choose_records(every, samples, seed=seed)
        tokens = tokenize(
            raw, tokenizer, pad_id=special.pad_id, eos_id=special.eos_id, vocab_size=special.vocab_size,
            max_source_length=max_source_length, max_target_length=max_target_length, seed=seed,
        )  # fmt: skip
        kept = [raw[i] for i in tokens.kept]
        places = [record.place for record in kept]
        scored = Task(tokens, [*map(target_of, kept)], [*map(target_of, every)], places)
        scorer = Scorer(model.eval(), tokenizer, scored, wanted, special)
        done = 0
        for chosen in batch_indices(tokens, batch_size):
            scorer.score(chosen)
            done += len(chosen)
            if progress:
                progress(done, len(tokens))
        flops = scorer.flops_per_token() if count_flops else float("nan")
    settings = {
        "generation": describe(scorer.settings) if scorer.generates else None,
        "dtype": str(model.dtype).removeprefix("torch."), "samples": samples, "seed": seed,
        "max_source_length": max_source_length, "max_target_length": max_target_length, "num_cut": tokens.num_cut,
        "num_skipped": every.num_skipped + len(raw) - len(kept),
    }  # fmt: skip
    return TaskResult(
        checkpoint=name,
        task=task or name_of(data),
        metrics=scorer.estimates(),
        majority_share=scorer.majority_share,
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_bytes=num_bytes,
        flops_per_token=flops,
        seconds=time.perf_counter() - started,
        peak_memory=peak_memory(),
        right=scorer.right.astype(int).tolist() if "exact_match" in scorer.metrics else [],
        losses=list(zip(scorer.losses.tolist(), scorer.num_tokens.tolist(), strict=True)),
        source=source,
        settings=settings,
    )


def checkpoint_of(model: Any) -> Checkpoint | None:
    """The checkpoint of a folder's or hub repository's name, or that a model in memory was loaded from."""
    if isinstance(model, str | Path):
        return Checkpoint(model)
    path = getattr(getattr(model, "config", None), "_name_or_path", "")
    return Checkpoint(path) if path and Path(path).is_dir() else None


def special_tokens_of(model: Any, checkpoint: Checkpoint | None) -> SpecialTokens:
    """The special tokens of a model's configuration, within its embeddings."""
    config = model.config.to_dict()
    rows = model.get_input_embeddings().num_embeddings
    config["vocab_size"] = min(config.get("vocab_size", rows), rows)
    return special_tokens(config, checkpoint.path / "config.json" if checkpoint else "the model's configuration")


def name_of(data: Source) -> str:
    """Name of a task by its data."""
    if not isinstance(data, str | Path):
        return "records"
    return "standard input" if str(data) == STANDARD_INPUT else stem_of(data)


def target_of(record: dict) -> str:
    """The text that a record wants; "" for one without texts."""
    kind = kind_of(record)
    return conversation(record["messages"])[1] if kind == "chat" else record["target"] if kind == "pair" else ""


def allowed_metrics(records: Sequence[dict]) -> tuple[str, ...]:
    """Metrics that records have: all for a task with few different targets, the loss for anything."""
    if not all(kind_of(record) in ("pair", "chat") for record in records):
        return ("loss",)
    labelled = len({target_of(record) for record in records}) <= MAX_LABELS
    return METRICS if labelled else ("exact_match", "loss")


def check_metrics(metrics: Sequence[str], records: Sequence[dict], data: Source) -> tuple[str, ...]:
    """The metrics; `UserError` for an unknown one or one that the records do not have."""
    for name in metrics:
        if name not in METRICS:
            raise UserError(f"unknown metric {name!r}; choose from {', '.join(METRICS)}")
        if name not in allowed_metrics(records):
            raise UserError(
                f"{name} needs records with source and at most {MAX_LABELS} different targets; "
                f"{data if isinstance(data, str | Path) else name_of(data)} has others"
            )
    return tuple(metrics)


def peak_memory() -> int:
    """Most bytes that were ever resident in this process.

    `getrusage` would count the parent's memory at the time of the fork as well, so Linux is asked for its own figure.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
