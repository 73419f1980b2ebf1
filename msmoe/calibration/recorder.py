"""Hooks on the routers and MoE layers: sums over tokens of everything that later steps need.

No expert runs a second time: what an expert gave is the layer's output over the gate value.

Shapes: B batch, S sequence, T valid tokens, E experts, D d_model, K domains.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from msmoe.calibration.stats import LayerStats, sort_rows
from msmoe.families import Family, Routing
from msmoe.layer.tokens import TokenSample, sample_mask, token_keys


class LayerRecorder:
    """Running sums of one layer; float64, so that the order of the batches does not show."""

    def __init__(self, *, sample_size: int, seed: int, domains: Sequence[str] = ()):
        self.sample_size = sample_size
        self.seed = seed
        self.domains = domains
        self.sums: dict[str, Tensor] = {}
        self.num_experts = 0
        self._parts: list[TokenSample] = []
        self._sequence_counts: list[Tensor] = []
        self._buffered = 0

    def update(self, routing: Routing, outputs: Tensor, valid: Tensor, records: Tensor, domain: Tensor) -> None:
        """Add a batch.

        Args:
            routing: what the router did, (B, S, ...).
            outputs: (B, S, D) what the layer gave, gate included.
            valid: (B, S) bool; padding is False.
            records: (B,) int64 identities of the records.
            domain: (B,) int64 positions of their domains; read only where there are domains.
        """
        where = valid.cpu().nonzero()
        logits_TE = routing.logits[valid].cpu().double()
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
        self._add_outputs(outputs[valid].float().cpu()[dispatched], gate[dispatched], expert[dispatched])

        counts_BE = torch.zeros(len(records), self.num_experts, dtype=torch.int32)
        counts_BE.index_put_((where[:, 0], expert), torch.ones(len(expert), dtype=torch.int32), accumulate=True)
        self._sequence_counts.append(counts_BE)
        if self.domains:
            counts_KE = torch.zeros(len(self.domains), self.num_experts, dtype=torch.int64)
            self._add("domain_routed", counts_KE.index_add_(0, domain, counts_BE.long()))

        record, position = records[where[:, 0]], where[:, 1]
        key = torch.from_numpy(token_keys(record.numpy(), position.numpy(), seed=self.seed))
        gradient = torch.empty(len(expert), 0)
        batch = TokenSample(
            inputs_TD, expert[:, None], gate[:, None], record, position, key, gradient, inputs_TD[:, :0]
        ).select(dispatched)
        kept = sample_mask(batch.key.numpy(), batch.expert.numpy(), self.num_experts, self.sample_size)
        self._parts.append(batch.select(torch.from_numpy(kept)))
        self._buffered += int(np.count_nonzero(kept))
        if self._buffered > 2 * self.sample_size:
            self._draw()

    def _add_outputs(self, outputs: Tensor, gate: Tensor, expert: Tensor) -> None:
        """Sums of what the experts gave to dispatched tokens, before the gate.

        Args:
            outputs: (T, D) with the gate; gate: (T,); expert: (T,).
        """
        gated_norm_T = outputs.norm(dim=1).double()
        gate_T = gate.double().clamp(min=torch.finfo(torch.float32).tiny)
        norm_T = gated_norm_T / gate_T
        sums = torch.zeros(3, self.num_experts, dtype=torch.float64)
        sums.index_add_(1, expert, torch.stack([norm_T, gated_norm_T, norm_T.square()]))
        for name, value in zip(("output_norm_sum", "gated_norm_sum", "output_square_sum"), sums, strict=True):
            self._add(name, value)
        total_ED = torch.zeros(self.num_experts, outputs.shape[1], dtype=torch.float64)
        self._add("output_sum", total_ED.index_add_(0, expert, outputs.double() / gate_T[:, None]))

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def _draw(self) -> TokenSample:
        sample = TokenSample.concatenate(self._parts).drawn(self.sample_size, self.num_experts)
        self._parts, self._buffered = [sample], len(sample)
        return sample

    def stats(self) -> LayerStats:
        """The sums so far; at least one batch must have been added."""
        counts = {name: self.sums[name].round().long() for name in ("routed", "dispatched")}
        sums = self.sums | counts
        domain_routed = sums.pop("domain_routed", ())
        return LayerStats(
            **sums,
            sequence_counts=sort_rows(torch.cat(self._sequence_counts)),
            sample=self._draw(),
            sample_size=self.sample_size,
            domain_routed=dict(zip(self.domains, domain_routed, strict=True)),
        )


class Recorder:
    """Recorders of all layers of a model, fed by forward hooks between `attached()` and its end.

    A layer's router runs before the layer returns: what the router did waits for what the layer gives.

    Attributes:
        valid: (B, S) bool of the sequence that is running; records: (B,) identities of the batch's records;
            domain: (B,) positions of their domains among `domains`. Set by whoever runs the model.
    """

    def __init__(self, family: Family, model: nn.Module, *, sample_size: int, seed: int, domains: Sequence[str] = ()):
        self.family = family
        self.routers = family.routers(model)
        self.modules = {name: model.get_submodule(name) for name in self.routers}
        self.routings: dict[str, Routing] = {}
        self.layers = {
            name: LayerRecorder(sample_size=sample_size, seed=seed, domains=domains) for name in self.routers
        }
        self.valid = torch.empty(0)
        self.records = torch.empty(0, dtype=torch.int64)
        self.domain = torch.empty(0, dtype=torch.int64)

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks on every router and MoE layer; removed on the way out, whatever happens."""
        handles = [router.register_forward_hook(self._router_hook(name)) for name, router in self.routers.items()]
        handles += [module.register_forward_hook(self._layer_hook(name)) for name, module in self.modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _router_hook(self, name: str):
        def hook(module: nn.Module, inputs: tuple, outputs: tuple) -> None:
            self.routings[name] = self.family.routing(inputs, outputs)

        return hook

    def _layer_hook(self, name: str):
        def hook(module: nn.Module, inputs: tuple, outputs: Any) -> None:
            given = self.family.layer_output(outputs)
            self.layers[name].update(self.routings.pop(name), given, self.valid, self.records, self.domain)

        return hook
