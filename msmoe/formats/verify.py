"""Open a written checkpoint again, and compare it with what it stands for: the stock model with merged weights."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from msmoe.checkpoint import Checkpoint
from msmoe.errors import UserError
from msmoe.families import family_of, find_family
from msmoe.families.loading import check_complete, is_decoder, load
from msmoe.families.loading_decoders import why_not_run

TRIED_BYTES = 256 * 2**20  # of a model in float32, up to which it is run as well
TRIED_TOKENS = 8
TOLERANCE = 1e-3  # of logits, relative to their largest


def check_written(folder: Path, *, original: Path | None = None) -> None:
    """Check that a written checkpoint is whole: configuration, names and shapes; small models are run as well.

    A model of up to 256 MB in float32 is loaded and run on a few tokens, unless it is quantised in a way that cannot
    be undone. Where it is an `exact` export and `original`
    is given, its logits must be those of the stock model with the stored experts in every member's place.

    Raises:
        UserError: if it cannot be loaded, or computes something else.
    """
    checkpoint = Checkpoint(folder)
    check_complete(checkpoint)
    if 4 * checkpoint.num_parameters > TRIED_BYTES or (is_decoder(checkpoint) and why_not_run(checkpoint)):
        return
    logits = trial(load(checkpoint))
    if not logits.isfinite().all():
        raise UserError(f"the checkpoint written to {folder} gives logits that are not finite")
    if original is None or not has_reference(Path(original), folder):
        return
    expected = trial(reference_model(original, folder))
    if float((logits - expected).abs().max()) > TOLERANCE * float(expected.abs().max()):
        raise UserError(f"the checkpoint written to {folder} does not compute what its plan says: check the disk")


@torch.inference_mode()
def trial(model: Any) -> Tensor:
    """Logits (2, T, V) for a few tokens."""
    ids = torch.arange(2 * TRIED_TOKENS).view(2, TRIED_TOKENS) % model.config.vocab_size
    return model(input_ids=ids, labels=ids.flip(1), use_cache=False).logits.float()


def has_reference(original: Path, compressed: Path) -> bool:
    """Whether a stock model stands for an `exact` export: its routers kept their rows, and its original is small."""
    source, target = Checkpoint(original), Checkpoint(compressed)
    family = find_family(target)
    if family is None or not family.is_exact(target):
        return False
    changed = not family.keeps_routing(target)
    origin = find_family(source)
    is_original = origin is not None and not origin.is_exact(source)
    return is_original and not changed and 4 * source.num_parameters <= TRIED_BYTES


@torch.no_grad()
def reference_model(original: str | Path, compressed: str | Path) -> nn.Module:
    """The original architecture, each expert overwritten by the merged expert of its group (`exact` export).

    Knows nothing of the compressed model's code: it reads the stored tensors and the maps, and runs the stock class.

    Raises:
        UserError: for a checkpoint that no stock model stands for: its routers lost rows, or it holds mean outputs.
    """
    source, target = Checkpoint(original), Checkpoint(compressed)
    family = family_of(source)
    model = family.load_model(source.path, dtype=torch.float32)
    for layer in family.layers(source):
        mapping = target.read(family.expert_map_key(target, layer.name)).tolist()
        if len(mapping) < layer.num_experts or family.constants_key(target, layer.name) in target:
            raise UserError(f"no stock model stands for {target.path}: {layer.name} has removed experts")
        stored = {g: family.load_expert(target, layer.name, g) for g in set(mapping)}
        for e, g in enumerate(mapping):
            for part in family.memory_parts(source, layer.name, e):
                part.place_in(model.get_parameter(part.key)).copy_(part.join(stored[g].weights))
    return model
