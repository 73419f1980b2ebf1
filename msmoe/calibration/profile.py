"""Run a model over calibration data with hooks on its routers: checkpoint + data -> stats."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from msmoe.calibration.batches import IGNORE, batch_indices, collate, record_key
from msmoe.calibration.output_gradients import output_gradients
from msmoe.calibration.recorder import Recorder
from msmoe.calibration.records import (
    Data,
    Record,
    TokenRecord,
    choose_records,
    data_paths,
    digest_records,
    join_paths,
    read_calibration,
    tokenize,
)
from msmoe.calibration.stats import Stats, with_gradients, with_output_gradient
from msmoe.checkpoint import Checkpoint
from msmoe.errors import UserError
from msmoe.families import Family, family_of, inspectable_family_of
from msmoe.registration import register

Progress = Callable[[int, int], None]  # (records done, records in all)


def profile(
    checkpoint: str | Path,
    data: Data,
    *,
    samples: int = 256,
    batch_size: int = 16,
    token_sample: int = 4096,
    seed: int = 0,
    gradients: bool = False,
    fisher: int = 0,
    device: str = "cpu",
    max_source_length: int = 512,
    max_target_length: int = 128,
    progress: Progress | None = None,
) -> Stats:
    """Record how the routers of a checkpoint use their experts on calibration data.

    The model runs in float32 and evaluation mode. Padding never counts. The result does not depend on the batch
    size or the order of the records, but for logits that tie to float32 rounding.

    Args:
        checkpoint: checkpoint folder, original or compressed.
        data: JSON Lines file (see the README), or the name of a `datasets` data set; or several of them, read as one
            in the order given. Records with a `domain`, and those of several files, are also counted per domain
            (see `read_calibration`).
        samples: records used, a seeded choice if there are more in all.
        batch_size: records per forward pass.
        token_sample: tokens kept per layer for everything that depends on expert outputs.
        gradients: also record what the `gradient` similarities need: one backward pass, and memory for the
            gradients of all experts.
        fisher: records for which the gradients at the layers' outputs are recorded on top, that `fisher` merging
            needs: one more forward and a backward pass over these, without gradients of weights.
        device: where the model runs.
        progress: called after each batch with (records done, records in all).

    Raises:
        UserError: for a checkpoint or data that cannot be used.
    """
    source = Checkpoint(checkpoint)
    family = inspectable_family_of(source)
    stored = [layer for layer, _ in family.stored_layers(source)]
    if not stored:
        family_of(source)  # says why not
    if gradients and source.model_type == family.compressed_model_type:
        raise UserError(f"--gradients needs an original checkpoint; {source.path} is compressed")
    if fisher < 0:
        raise UserError(f"--fisher must not be negative, got {fisher}")
    if samples < 1 or batch_size < 1 or token_sample < 1:
        raise UserError(
            f"samples, batch size and token sample must be at least 1, got {samples}, {batch_size}, {token_sample}"
        )
    check_device(device)
    paths = data_paths(data)
    raw = choose_records(read_calibration(paths), samples, seed=seed)
    records = token_records(
        source, raw, seed=seed, max_source_length=max_source_length, max_target_length=max_target_length
    )
    domains = sorted({record.domain for record in raw} - {""})
    domain = torch.tensor([domains.index(record.domain) if domains else 0 for record in raw])
    pad_id = source.config.get("pad_token_id") or 0
    model = family.load_model(source.path, dtype=torch.float32)
    check_finite(source, model)
    model.to(device)
    keys = torch.tensor([record_key(r) for r in records])
    recorder = Recorder(family, model, sample_size=token_sample, seed=seed, domains=domains)
    done = 0
    with torch.inference_mode(), recorder.attached():
        for chosen in batch_indices(records, batch_size):
            recorder.records, recorder.domain = keys[chosen], domain[chosen]
            batch = {name: t.to(device) for name, t in collate([records[i] for i in chosen], pad_id=pad_id).items()}
            for recorder.valid in family.forward(model, batch):
                pass
            done += len(chosen)
            if progress:
                progress(done, len(records))
    layers = {layer.name: recorder.layers[layer.name].stats() for layer in stored}
    if fisher:
        chosen = keys.argsort()[:fisher].tolist()
        known = output_gradients(family, model, layers, [records[i] for i in chosen], batch_size=batch_size, seed=seed)
        layers = {name: with_output_gradient(layer, known[name]) for name, layer in layers.items()}
    if gradients:
        batches = [
            collate([records[i] for i in chosen], pad_id=pad_id) for chosen in batch_indices(records, batch_size)
        ]
        for name, grams in gradient_grams(family, source, model, batches, device=device).items():
            layers[name] = with_gradients(layers[name], *grams)
    per_domain = {name: [t for t, row in zip(records, raw, strict=True) if row.domain == name] for name in domains}
    return Stats(
        layers,
        data={
            "source": join_paths(paths), **count(records), "sha256": digest_records(raw), "seed": seed,
            "max_source_length": max_source_length, "max_target_length": max_target_length,
            **({"domains": {name: count(part) for name, part in per_domain.items()}} if domains else {}),
        },
        checkpoint={"model_type": source.model_type, "fingerprint": source.fingerprint},
    )  # fmt: skip


def count(records: Sequence[TokenRecord]) -> dict[str, int]:
    """Number of records, and of the tokens on both sides of them."""
    num_tokens = sum(len(r.input_ids) + sum(label != IGNORE for label in r.labels) for r in records)
    return {"num_records": len(records), "num_tokens": num_tokens}


def check_device(device: str) -> None:
    """Raise `UserError` if torch cannot use the device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error


def load_records(
    checkpoint: Checkpoint,
    data: Data,
    *,
    samples: int,
    seed: int,
    max_source_length: int,
    max_target_length: int,
) -> tuple[list[TokenRecord], str]:
    """Choose and tokenise calibration records; also the SHA-256 of the chosen ones.

    Raises:
        DataError: for data that cannot be used.
    """
    chosen = choose_records(read_calibration(data), samples, seed=seed)
    tokenized = token_records(
        checkpoint, chosen, seed=seed, max_source_length=max_source_length, max_target_length=max_target_length
    )
    return tokenized, digest_records(chosen)


def token_records(
    checkpoint: Checkpoint, records: Sequence[Record], *, seed: int, max_source_length: int, max_target_length: int
) -> list[TokenRecord]:
    """Tokenise records as the checkpoint reads them.

    Raises:
        DataError: for a record that cannot be used.
    """
    return tokenize(
        records,
        load_tokenizer(checkpoint.path),
        pad_id=checkpoint.config.get("pad_token_id") or 0,
        vocab_size=checkpoint.config.get("vocab_size"),
        max_source_length=max_source_length,
        max_target_length=max_target_length,
        seed=seed,
    )


def check_finite(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Raise `UserError` naming the first tensor of the model with a NaN or infinite value."""
    for name, parameter in model.named_parameters():
        if name in checkpoint and not parameter.detach().sum().isfinite():
            checkpoint.read_finite(name)


def load_tokenizer(path: Path):
    """The checkpoint's tokenizer, or None if it has none."""
    if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "spiece.model")):
        return None
    from transformers import AutoTokenizer

    register()  # a compressed checkpoint's configuration is then known without its own code
    return AutoTokenizer.from_pretrained(path)


def gradient_grams(
    family: Family, checkpoint: Checkpoint, model: nn.Module, batches: list[dict[str, Tensor]], *, device: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Inner products between the experts' gradients of the summed loss, per layer.

    Returns:
        layer -> (gram of flat gradients, gram of gradient times weight), both (E, E) float64. An expert without
        gradient has zero rows.
    """
    parameters = dict(model.named_parameters())
    expert_names = {
        key
        for layer in family.layers(checkpoint)
        for e in range(layer.num_experts)
        for key in family.expert_keys(layer.name, e)
    }
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in expert_names)
    for batch in batches:
        batch = {name: t.to(device) for name, t in batch.items()}
        num_targets = (batch["labels"] != -100).sum()
        (model(**batch).loss * num_targets).backward()

    grams = {}
    for layer in family.layers(checkpoint):
        gram = torch.zeros(2, layer.num_experts, layer.num_experts, dtype=torch.float64)
        for kind in (0, 1):  # wi and wo add up
            weights = [parameters[family.expert_keys(layer.name, e)[kind]] for e in range(layer.num_experts)]
            flat = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
            gradient = torch.stack(flat).flatten(1)
            scaled = gradient * torch.stack([w.detach() for w in weights]).flatten(1)
            gram += torch.stack([gradient @ gradient.T, scaled @ scaled.T]).double().cpu()
        grams[layer.name] = gram[0], gram[1]
    model.zero_grad(set_to_none=True)
    return grams
