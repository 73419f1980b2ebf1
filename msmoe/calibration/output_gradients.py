"""Gradients of the log-likelihood at the outputs of the MoE layers: what the diagonal Fisher of an expert is made of.

With the gradient delta at a layer's output y = g f(x), the gradient of any expert matrix at one token is an outer
product of two known vectors, so the Fisher of every expert follows later from weights and token sample. Labels are
drawn from the model's own distribution, one per target position (the sampled estimator of E_y, arXiv 2111.09832);
records do not see each other, so one backward pass serves a batch.

Shapes: B batch, S sampled tokens, N target length, D d_model, V vocabulary.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from msmoe.calibration.batches import IGNORE, batch_indices, collate, record_key
from msmoe.calibration.records import TokenRecord
from msmoe.calibration.stats import LayerStats
from msmoe.calibration.tokenizer import special_tokens
from msmoe.families import Family
from msmoe.layer.tokens import token_keys


def output_gradients(
    family: Family,
    model: Any,
    layers: Mapping[str, LayerStats],
    records: Sequence[TokenRecord],
    *,
    batch_size: int,
    seed: int,
) -> dict[str, Tensor]:
    """Gradient at every sampled token that stands in one of the records.

    Args:
        model: in evaluation mode; no gradient of a parameter is computed.
        layers: statistics whose samples say which tokens are wanted.

    Returns:
        layer -> (S, D) float32, NaN for tokens of other records.
    """
    samples = {name: layer.tokens() for name, layer in layers.items()}
    result = {name: torch.full_like(sample.inputs, float("nan")) for name, sample in samples.items()}
    device = next(model.parameters()).device
    pad_id = special_tokens(model.config.to_dict(), "the model's configuration").pad_id
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in required:
        parameter.requires_grad_(False)
    try:
        for chosen in batch_indices(records, batch_size):
            keys = [record_key(records[i]) for i in chosen]
            batch = {k: t.to(device) for k, t in collate([records[i] for i in chosen], pad_id=pad_id).items()}
            with zero_leaves(family, model, layers) as leaves:
                log_likelihood(model, batch, keys, seed=seed).backward()
            for name, sample in samples.items():
                for row, key in enumerate(keys):
                    at = (sample.record == key).nonzero().flatten()
                    if len(at) and name in leaves:
                        gradient_BSD = leaves[name].grad.view(len(keys), -1, sample.inputs.shape[1])
                        result[name][at] = gradient_BSD[row, sample.position[at].to(device)].float().cpu()
    finally:
        for parameter, value in required:
            parameter.requires_grad_(value)
    return result


@contextlib.contextmanager
def zero_leaves(family: Family, model: nn.Module, names: Mapping[str, LayerStats]) -> Iterator[dict[str, Any]]:
    """Add zeros to the output of every layer, or of its experts; their gradients are those of the outputs."""
    leaves: dict[str, Any] = {}
    outputs = family.expert_outputs(model)

    def hook(name: str):
        def add(module: nn.Module, inputs: tuple, given: Any) -> Any:
            output = family.layer_output(given) if name in outputs.layers else given
            first = output[: len(output) // outputs.repeats.get(name, 1)]
            leaves[name] = torch.zeros_like(first, requires_grad=True)
            total = torch.cat([first + leaves[name], output[len(first) :]])
            return family.with_layer_output(given, total) if name in outputs.layers else total

        return add

    modules = {name: module for name, module in (outputs.layers | outputs.calls).items() if name in names}
    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield leaves
    finally:
        for handle in handles:
            handle.remove()


def log_likelihood(model: Any, batch: dict[str, Tensor], keys: Sequence[int], *, seed: int) -> Tensor:
    """Summed log-probability of labels drawn from the model, one for each target position.

    The draw of a position depends on the seed, its record and where it stands, not on the batch.

    Args:
        keys: (B,) identities of the records.
    """
    labels = batch["labels"]
    logits_BNV = logits_of(model, batch)
    positions = np.arange(labels.shape[1])
    drawn = [token_keys(np.full(len(positions), key), positions, seed=seed + 1) / 2.0**63 for key in keys]
    uniform_BN1 = torch.from_numpy(np.stack(drawn)).to(labels.device)[..., None]
    log_probabilities = logits_BNV.log_softmax(-1)
    with torch.no_grad():
        cumulative = log_probabilities.double().exp().cumsum(-1)
        chosen = torch.searchsorted(cumulative, uniform_BN1 * cumulative[..., -1:])
        chosen = chosen.clamp(max=cumulative.shape[-1] - 1)
    is_target = labels != IGNORE
    if not model.config.is_encoder_decoder:
        is_target[:, 0] = False  # no position before it predicts it
    return log_probabilities.gather(-1, chosen).squeeze(-1)[is_target].sum()


def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits (B, N, V) float32 that predict the label at each position; of a decoder-only model, 0 at the first."""
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    if model.config.is_encoder_decoder:
        decoder_ids = model.prepare_decoder_input_ids_from_labels(batch["labels"])
        return model(**given, decoder_input_ids=decoder_ids).logits.float()
    logits_BSV = model(**given).logits.float()
    return torch.cat([torch.zeros_like(logits_BSV[:, :1]), logits_BSV[:, :-1]], dim=1)
