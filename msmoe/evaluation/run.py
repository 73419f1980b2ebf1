"""Run a model over a task: what it is measured on, how, and the result."""

import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from msmoe.calibration.batches import batch_indices
from msmoe.calibration.causal import CausalReader
from msmoe.calibration.chat import conversation
from msmoe.calibration.files import STANDARD_INPUT, DataError, stem_of
from msmoe.calibration.records import Columns, Record, Records, Source, choose_records, kind_of, read_records
from msmoe.calibration.subject import loaded_from
from msmoe.calibration.tokenization import TokenRecords, tokenize
from msmoe.calibration.tokenizer import SpecialTokens, encode, is_causal, load_tokenizer, special_tokens
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
    reference: Any = None,
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
        model: a transformers model, sequence-to-sequence or decoder-only, or a checkpoint folder. A model that is no
            longer what its folder holds is called `model`, without bytes and source.
        data: a file, a data set or records, see `read_records`; those with source and target (or messages) have
            answers and perhaps labels, those with choices have an accuracy, all have a loss.
        metrics: names out of `METRICS`; by default all that the data allow, `perplexity` of decoder-only models alone,
            and `kl` where there is a reference. `exact_match` compares what `generate` writes with the target;
            `accuracy` takes the label of highest likelihood; `macro_f1` is of the generated answers, one that is no
            label counts as wrong. Labels and the share of the most frequent one are those of all data. Of records with
            choices, `accuracy` takes the choice of highest likelihood, `accuracy_norm` that of highest likelihood per
            token; a decoder reads choices without an end of sequence. `loss` is in nats per target token, `perplexity`
            its exponential, and `kl` the divergence KL(reference || model) per target token, also in nats. Target
            tokens of a decoder-only model are those of answers; of a text, all but the first.
        reference: model or checkpoint folder that `kl` compares the model with; a folder's runs where the model does,
            in its dtype.
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
        if reference is not None:
            reference = reference_of(reference, model)
        name, num_bytes, source = "model", None, None
        if unchanged is not None:
            name, num_bytes = unchanged.path.name, unchanged.num_bytes
            source = original_fingerprint(unchanged)
        if checkpoint is not None:
            tokenizer = tokenizer or load_tokenizer(checkpoint.path)
        special = special_tokens_of(model, checkpoint)
        every = data if isinstance(data, Records) else read_records(data, columns=columns)
        if metrics:
            wanted = check_metrics(metrics, every, data, has_reference=reference is not None)
        else:
            wanted = default_metrics(every, causal=special.is_causal, has_reference=reference is not None)
        raw = every if samples is None else choose_records(every, samples, seed=seed)
        tokens = tokenize(
            raw, tokenizer, pad_id=special.pad_id, eos_id=special.eos_id, vocab_size=special.vocab_size,
            max_source_length=max_source_length, max_target_length=max_target_length, seed=seed,
            causal=special.is_causal,
        )  # fmt: skip
        kept = [raw[i] for i in tokens.kept]
        ends = (*special.eos_ids, getattr(tokenizer, "eos_token_id", None))
        special = replace(special, eos_ids=tuple(dict.fromkeys(end for end in ends if end is not None)))
        scored = task_of(tokens, kept, every, tokenizer, special)
        scorer = Scorer(model.eval(), tokenizer, scored, wanted, special, reference)
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
    if "kl" in wanted:
        settings["reference"] = Path(reference.config._name_or_path).name or "model"
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


def reference_of(given: Any, model: Any) -> Any:
    """The model that another is compared with, ready to run beside it.

    Raises:
        UserError: if it cannot be loaded, or does not read and write the same tokens.
    """
    if isinstance(given, str | Path):
        given = load(given, dtype=model.dtype).to(next(model.parameters()).device)
    kinds = [is_causal(m.config) for m in (model, given)]
    own, other = (m.get_output_embeddings().weight.shape[0] for m in (model, given))
    if kinds[0] != kinds[1]:
        raise UserError("kl compares models of one kind: one of the two is decoder-only, the other has an encoder")
    if own != other:
        raise UserError(f"kl compares models of one vocabulary: the model has {own} tokens, the reference {other}")
    return given.eval()


def task_of(
    tokens: TokenRecords, kept: Sequence[Record], every: Sequence[Record], tokenizer: Any, special: SpecialTokens
) -> Task:
    """What is scored: the records kept, as token ids and as texts."""
    reader = CausalReader(tokenizer, pad_id=special.pad_id, eos_id=special.eos_id)
    have_choices = all(kind_of(record) == "choices" for record in every)

    def answer_ids(i: int, text: str) -> list[int]:
        place = f"answer {text!r} of {kept[i].place}"
        if not special.is_causal:
            return encode(tokenizer, text, place)
        ids = reader.answer(kept[i], place, text, ends=not have_choices)
        if not ids:
            raise DataError(f"{place} is no token")
        return ids

    return Task(
        tokens,
        targets=[*map(target_of, kept)],
        every_target=[*map(target_of, every)],
        places=[record.place for record in kept],
        answer_ids=answer_ids,
        choices=[record["choices"] for record in kept] if have_choices else [],
        right=[record["answer"] for record in kept] if have_choices else [],
    )


def target_of(record: dict) -> str:
    """The text that a record wants; "" for one without texts."""
    kind = kind_of(record)
    return conversation(record["messages"])[1] if kind == "chat" else record["target"] if kind == "pair" else ""


def allowed_metrics(records: Sequence[dict], *, has_reference: bool = False) -> tuple[str, ...]:
    """Metrics that records have: of answers and of labels where there are few, of choices, and the loss of anything."""
    kinds = {kind_of(record) for record in records}
    names = {"loss", "perplexity"} | ({"kl"} if has_reference else set())
    if kinds == {"choices"}:
        names |= {"accuracy", "accuracy_norm"}
    elif kinds <= {"pair", "chat"}:
        labelled = len({target_of(record) for record in records}) <= MAX_LABELS
        names |= {"exact_match", "accuracy", "macro_f1"} if labelled else {"exact_match"}
    return tuple(name for name in METRICS if name in names)


def default_metrics(records: Sequence[dict], *, causal: bool, has_reference: bool) -> tuple[str, ...]:
    """Metrics that are measured unless the user says which."""
    allowed = allowed_metrics(records, has_reference=has_reference)
    return tuple(name for name in allowed if causal or name != "perplexity")


def check_metrics(
    metrics: Sequence[str], records: Sequence[dict], data: Source, *, has_reference: bool
) -> tuple[str, ...]:
    """The metrics; `UserError` for an unknown one or one that the records do not have."""
    for name in metrics:
        if name not in METRICS:
            raise UserError(f"unknown metric {name!r}; choose from {', '.join(METRICS)}")
        if name in allowed_metrics(records, has_reference=has_reference):
            continue
        if name == "kl":
            raise UserError("kl compares with another model: give it by --reference")
        needed = "choices" if name == "accuracy_norm" else f"source and at most {MAX_LABELS} different targets"
        raise UserError(
            f"{name} needs records with {needed}; {data if isinstance(data, str | Path) else name_of(data)} has others"
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
