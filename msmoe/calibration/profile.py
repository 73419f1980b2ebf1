"""Run a model over calibration data with hooks on its routers: checkpoint + data -> stats."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from msmoe.calibration.batches import IGNORE, batch_indices, collate, record_key
from msmoe.calibration.gradients import gradient_grams
from msmoe.calibration.output_gradients import output_gradients
from msmoe.calibration.recorder import Recorder
from msmoe.calibration.records import (
    Columns,
    Data,
    Record,
    TokenRecord,
    choose_records,
    digest_records,
    read_calibration,
)
from msmoe.calibration.stats import LayerStats, Stats, with_gradients, with_output_gradient
from msmoe.calibration.subject import Subject, check_finite, open_subject
from msmoe.calibration.tokenization import TokenRecords, tokenize
from msmoe.calibration.tokenizer import SpecialTokens, load_tokenizer, special_tokens
from msmoe.checkpoint import Checkpoint
from msmoe.device import AUTO, choose_device, choose_dtype, memory_explained
from msmoe.errors import UserError

Progress = Callable[[int, int], None]  # (records done, records in all)
ADVICE = "lower --batch-size, --max-source-length or --token-sample, or give --device cpu or --dtype bfloat16"


@dataclass(frozen=True)
class Calibration:
    """The records that a checkpoint is profiled on.

    Attributes:
        source: where they are from.
        raw: the records chosen; tokens: the same as token ids.
        described: what statistics say of them beside their numbers; only what is out of the ordinary, but for the seed
            and the greatest lengths.
        is_causal: whether they are read by a decoder-only model, in one sequence.
    """

    source: str
    raw: list[Record]
    tokens: TokenRecords
    described: dict
    is_causal: bool = False

    @property
    def domains(self) -> list[str]:
        return sorted({record.domain for record in self.raw} - {""})

    @property
    def sha256(self) -> str:
        return digest_records(self.raw)


def profile(
    checkpoint: str | Path | nn.Module,
    data: Data,
    *,
    samples: int = 256,
    batch_size: int = 16,
    token_sample: int = 4096,
    seed: int = 0,
    gradients: bool = False,
    fisher: int = 0,
    device: str = AUTO,
    dtype: str = AUTO,
    max_source_length: int = 512,
    max_target_length: int = 128,
    columns: Columns | None = None,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> Stats:
    """Record how the routers of a checkpoint use their experts on calibration data.

    The model runs in evaluation mode. Padding never counts. The result does not depend on the batch size or the order
    of the records, but for logits that tie to float32 rounding.

    Args:
        checkpoint: checkpoint folder, original or compressed; or a transformers model in memory, which runs where and
            as it is.
        data: a file or a data set (see `read_records`), or several of them, read as one in the order given; or records,
            a list or any iterable of dicts or texts. Records with a `domain`, and those of several files, are also
            counted per domain (see `read_calibration`).
        samples: records used, a seeded choice if there are more in all.
        batch_size: records per forward pass.
        token_sample: tokens kept per layer for everything that depends on expert outputs.
        gradients: also record what the `gradient` similarities need: one backward pass, and memory for the
            gradients of all experts.
        fisher: records for which the gradients at the layers' outputs are recorded on top, that `fisher` merging
            needs: one more forward and a backward pass over these, without gradients of weights.
        device: where the model runs: `auto` (CUDA where there is one), `cpu`, `cuda:1`, ...
        dtype: in which it runs: `auto` (float32), `float32`, `bfloat16` or `float16`.
        max_source_length, max_target_length: longer inputs and targets are cut, which is counted.
        columns: field of a record -> the column that holds it.
        tokenizer: by default the checkpoint's own.
        progress: called after each batch with (records done, records in all).

    Raises:
        UserError: for a checkpoint or data that cannot be used, or where memory is too small.

    Warns:
        DataWarning: for records that are blank or cut, and fields that are not used.
    """
    check_counts(samples, batch_size, token_sample, fisher)
    place, precision = choose_device(device), choose_dtype(dtype)
    with memory_explained(ADVICE), open_subject(checkpoint, tokenizer) as subject:
        source = subject.checkpoint
        if gradients and subject.family.is_exact(source):
            raise UserError(f"--gradients needs an original checkpoint; {source.path} is compressed")
        if fisher and (unseen := next((layer for layer in subject.layers if layer.unseen), None)):
            raise UserError(f"--fisher needs the outputs of the experts of {unseen.name}: {unseen.unseen}")
        calibration = calibrate(
            data, subject.tokenizer, subject.special, samples=samples, seed=seed, columns=columns,
            max_source_length=max_source_length, max_target_length=max_target_length,
        )  # fmt: skip
        with subject.running(place, precision) as model:
            ran_in = str(model.dtype).removeprefix("torch.")
            run = Run(subject, model, calibration.tokens, batch_size, seed)
            layers = run.layers(calibration, token_sample, progress)
            if fisher:
                layers = run.with_output_gradients(layers, fisher)
            if gradients:
                layers = run.with_gradients(layers)
        data_described = describe(calibration) | ({"dtype": ran_in} if dtype != AUTO or ran_in != "float32" else {})
        return Stats(layers, data_described, {"model_type": source.model_type, "fingerprint": source.fingerprint})


def check_counts(samples: int, batch_size: int, token_sample: int, fisher: int) -> None:
    """Raise `UserError` for a number out of range."""
    if fisher < 0:
        raise UserError(f"--fisher must not be negative, got {fisher}")
    if samples < 1 or batch_size < 1 or token_sample < 1:
        raise UserError(
            f"samples, batch size and token sample must be at least 1, got {samples}, {batch_size}, {token_sample}"
        )


class Run:
    """Passes of a model over token records."""

    def __init__(self, subject: Subject, model: Any, records: Sequence[TokenRecord], batch_size: int, seed: int):
        self.subject, self.model, self.records, self.seed = subject, model, records, seed
        self.batch_size = batch_size
        self.device = next(model.parameters()).device
        self.keys = torch.tensor([record_key(r) for r in records])

    def batch(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        return collate([self.records[i] for i in chosen], pad_id=self.subject.special.pad_id)

    def layers(self, calibration: Calibration, token_sample: int, progress: Progress | None) -> dict[str, LayerStats]:
        """Sums and token samples of every layer."""
        family, domains = self.subject.family, calibration.domains
        domain = torch.tensor([domains.index(record.domain) if domains else 0 for record in calibration.raw])
        recorder = Recorder(family, self.model, sample_size=token_sample, seed=self.seed, domains=domains)
        done = 0
        with torch.no_grad(), recorder.attached():  # inference mode would leave a model in memory unfit for training
            for chosen in batch_indices(self.records, self.batch_size):
                recorder.records, recorder.domain = self.keys[chosen], domain[chosen]
                batch = {name: t.to(self.device) for name, t in self.batch(chosen).items()}
                for recorder.valid in family.forward(self.model, batch):
                    pass
                done += len(chosen)
                if progress:
                    progress(done, len(self.records))
        return {layer.name: recorder.layers[layer.name].stats() for layer in self.subject.layers}

    def with_output_gradients(self, layers: dict[str, LayerStats], count: int) -> dict[str, LayerStats]:
        """The layers with the gradients at their outputs, for `count` records."""
        records = [self.records[i] for i in self.keys.argsort()[:count].tolist()]
        known = output_gradients(
            self.subject.family, self.model, layers, records, batch_size=self.batch_size, seed=self.seed
        )
        return {name: with_output_gradient(layer, known[name]) for name, layer in layers.items()}

    def with_gradients(self, layers: dict[str, LayerStats]) -> dict[str, LayerStats]:
        """The layers with the inner products of their experts' gradients."""
        batches = [self.batch(chosen) for chosen in batch_indices(self.records, self.batch_size)]
        found = gradient_grams(
            self.subject.family, self.subject.checkpoint, self.model, batches, device=str(self.device)
        )
        return layers | {name: with_gradients(layers[name], *grams) for name, grams in found.items()}


def calibrate(
    data: Data,
    tokenizer: Any,
    special: SpecialTokens,
    *,
    samples: int,
    seed: int,
    max_source_length: int,
    max_target_length: int,
    columns: Columns | None = None,
) -> Calibration:
    """Read, choose and tokenise calibration records.

    Raises:
        DataError: for data that cannot be used.
    """
    records = read_calibration(data, columns=columns)
    chosen = choose_records(records, samples, seed=seed)
    tokens = tokenize(
        chosen, tokenizer, pad_id=special.pad_id, eos_id=special.eos_id, vocab_size=special.vocab_size,
        max_source_length=max_source_length, max_target_length=max_target_length, seed=seed, causal=special.is_causal,
    )  # fmt: skip
    left_out = len(chosen) - len(tokens)
    described = {"seed": seed, "max_source_length": max_source_length, "max_target_length": max_target_length}
    if records.num_skipped or left_out:
        described["num_skipped"] = records.num_skipped + left_out
    if left_out:
        described["samples"] = samples
    if any(tokens.num_cut.values()):
        described["num_cut"] = tokens.num_cut
    if columns:
        described["columns"] = dict(columns)
    raw = [chosen[i] for i in tokens.kept]
    return Calibration(records.source, raw, tokens, described, is_causal=special.is_causal)


def describe(calibration: Calibration) -> dict:
    """What statistics say of the data."""
    domains, described, is_causal = calibration.domains, calibration.described, calibration.is_causal
    pairs = list(zip(calibration.tokens, calibration.raw, strict=True))
    parts = {name: count([t for t, row in pairs if row.domain == name], is_causal=is_causal) for name in domains}
    counts = count(calibration.tokens, is_causal=is_causal)
    if is_causal:
        counts["num_targets"] = sum(label != IGNORE for t in calibration.tokens for label in t.labels)
    counted = {"source": calibration.source} | counts | {"sha256": calibration.sha256} | described
    return counted | ({"domains": parts} if domains else {})


def count(records: Sequence[TokenRecord], *, is_causal: bool) -> dict[str, int]:
    """Number of records and of their tokens: on both sides, or in the one sequence that a decoder-only model reads."""
    num_tokens = sum(len(r.input_ids) for r in records)
    if not is_causal:
        num_tokens += sum(label != IGNORE for r in records for label in r.labels)
    return {"num_records": len(records), "num_tokens": num_tokens}


def load_records(
    checkpoint: Checkpoint,
    data: Data,
    *,
    samples: int,
    seed: int,
    max_source_length: int,
    max_target_length: int,
    columns: Columns | None = None,
) -> tuple[TokenRecords, str]:
    """Choose and tokenise calibration records as `profile` does; also the SHA-256 of the chosen ones.

    Raises:
        UserError: for data or a tokenizer that cannot be used.
    """
    special = special_tokens(checkpoint.config, checkpoint.path / "config.json")
    calibration = calibrate(
        data, load_tokenizer(checkpoint.path), special, samples=samples, seed=seed, columns=columns,
        max_source_length=max_source_length, max_target_length=max_target_length,
    )  # fmt: skip
    return calibration.tokens, calibration.sha256


__all__ = ["check_finite", "load_records", "load_tokenizer", "profile"]
