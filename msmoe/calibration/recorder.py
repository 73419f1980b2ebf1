"""Hooks on the routers: sums over tokens of everything that later steps need.

Shapes: B batch, S sequence, T valid tokens, E experts, D d_model.
"""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from msmoe.calibration.sample import TokenSample, sample_mask, token_keys
from msmoe.calibration.stats import LayerStats, sort_rows
from msmoe.families import Family, Routing


class LayerRecorder:
    """Running sums of one layer; float64, so that the order of the batches does not show."""

    def __init__(self, *, sample_size: int, seed: int):
        self.sample_size = sample_size
        self.seed = seed
        self.sums: dict[str, Tensor] = {}
        self.num_experts = 0
        self._parts: list[TokenSample] = []
        self._sequence_counts: list[Tensor] = []
        self._buffered = 0

    def update(self, routing: Routing, valid: Tensor, records: Tensor) -> None:
        """Add a batch.

        Args:
            routing: what the router did, (B, S, ...).
            valid: (B, S) bool; padding is False.
            records: (B,) int64 identities of the records.
        """
        where = valid.cpu().nonzero()
        logits_TE = routing.logits[valid].double().cpu()
        inputs_TD = routing.inputs[valid].float().cpu()
        dispatched = routing.dispatched[valid].cpu()
        gate = routing.gate[valid].float().cpu()
        self.num_experts = logits_TE.shape[-1]
        expert = logits_TE.argmax(-1)
        chosen_TE = nn.functional.one_hot(expert, self.num_experts).double()
        gate_T = gate.double()
        inputs64_TD = inputs_TD.double()
        self._add("routed", chosen_TE.sum(0))
        self._add("dispatched", chosen_TE[dispatched].sum(0))
        self._add("gate_mass", gate_T @ chosen_TE)
        self._add("soft_mass", logits_TE.softmax(-1).sum(0))
        self._add("router_logits_gram", logits_TE.T @ logits_TE)
        self._add("input_sum", chosen_TE.T @ inputs64_TD)
        self._add("input_abs_sum", chosen_TE.T @ inputs64_TD.abs())
        self._add("input_square_sum", chosen_TE.T @ inputs64_TD.square())

        counts_BE = torch.zeros(len(records), self.num_experts, dtype=torch.int32)
        counts_BE.index_put_((where[:, 0], expert), torch.ones(len(expert), dtype=torch.int32), accumulate=True)
        self._sequence_counts.append(counts_BE)

        record, position = records[where[:, 0]], where[:, 1]
        key = torch.from_numpy(token_keys(record.numpy(), position.numpy(), seed=self.seed))
        batch = TokenSample(inputs_TD, expert, gate, record, position, key).select(dispatched)
        kept = sample_mask(batch.key.numpy(), batch.expert.numpy(), self.num_experts, self.sample_size)
        self._parts.append(batch.select(torch.from_numpy(kept)))
        self._buffered += int(np.count_nonzero(kept))
        if self._buffered > 2 * self.sample_size:
            self._draw()

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def _draw(self) -> TokenSample:
        sample = TokenSample.concatenate(self._parts).drawn(self.sample_size, self.num_experts)
        self._parts, self._buffered = [sample], len(sample)
        return sample

    def stats(self) -> LayerStats:
        """The sums so far; at least one batch must have been added."""
        counts = {name: self.sums[name].round().long() for name in ("routed", "dispatched")}
        sequences = sort_rows(torch.cat(self._sequence_counts))
        return LayerStats(
            **(self.sums | counts), sequence_counts=sequences, sample=self._draw(), sample_size=self.sample_size
        )


class Recorder:
    """Recorders of all layers of a model, fed by forward hooks between `attached()` and its end."""

    def __init__(self, family: Family, model: nn.Module, *, sample_size: int, seed: int):
        self.family = family
        self.routers = family.routers(model)
        self.layers = {name: LayerRecorder(sample_size=sample_size, seed=seed) for name in self.routers}
        self.valid = torch.empty(0)
        self.records = torch.empty(0, dtype=torch.int64)

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks on every router; removed on the way out, whatever happens."""
        handles = [router.register_forward_hook(self._hook(name)) for name, router in self.routers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str):
        def hook(module: nn.Module, inputs: tuple, outputs: tuple) -> None:
            self.layers[name].update(self.family.routing(inputs, outputs), self.valid, self.records)

        return hook
