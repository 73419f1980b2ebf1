"""Listen to the MoE layers of a running model: sums over tokens of everything that later steps need.

No expert runs a second time. Where a layer gives nothing but one expert's output times its weight, that output is the
layer's over the weight. Elsewhere the experts are called with one choice at a time, sorted by expert, in place of all
choices of a token: the recorder sums up what they give by expert, and then by token, as the experts would have.

Shapes: B batch, S sequence, T tokens, K chosen experts of a token, C = T K choices, E experts, D d_model.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from msmoe.calibration.layer_stats import LayerStats
from msmoe.calibration.statistics import sort_rows
from msmoe.calibration.stored import ROUNDING
from msmoe.calibration.sums import choice_output_sums, count, layer_output_sums, routing_sums
from msmoe.families import Family
from msmoe.layer.routing import Routed
from msmoe.layer.tokens import TokenSample, sample_mask, token_keys


class LayerRecorder:
    """Running sums of one layer; float64, so that the order of the batches does not show."""

    def __init__(self, *, sample_size: int, seed: int, domains: Sequence[str] = ()):
        self.sample_size = sample_size
        self.seed = seed
        self.domains = domains
        self.sums: dict[str, Tensor] = {}
        self.num_experts = 0
        self.top_k = 1
        self.is_bounded = True
        self._parts: list[TokenSample] = []
        self._sequence_counts: list[Tensor] = []
        self._buffered = 0

    def update(
        self, routed: Routed, output_sums: dict[str, Tensor], valid: Tensor, records: Tensor, domain: Tensor
    ) -> None:
        """Add a batch.

        Args:
            routed: what the layer did with the valid tokens, in the order of their positions.
            output_sums: statistics of the experts' outputs; none where they are not known.
            valid: (B, S) bool; padding is False.
            records: (B,) int64 identities of the records.
            domain: (B,) int64 positions of their domains; read only where there are domains.
        """
        self.num_experts, self.top_k = routed.logits.shape[-1], routed.experts.shape[1]
        for name, value in (routing_sums(routed, self.num_experts) | output_sums).items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        routed = each(routed, Tensor.cpu)
        if routed.weights.numel():
            self.is_bounded &= self.top_k == 1 and float(routed.weights.max()) <= 1 + ROUNDING
        row_T, position_T = valid.cpu().nonzero().unbind(1)
        self._count_sequences(routed.experts, row_T, records, domain)
        self._sample(routed, records[row_T], position_T)

    def _count_sequences(self, experts: Tensor, row: Tensor, records: Tensor, domain: Tensor) -> None:
        """Count the choices of each sequence.

        Args:
            experts: (T, K); row: (T,) sequence of each token.
        """
        cells = row[:, None] * self.num_experts + experts
        counts_BE = count(cells, len(records) * self.num_experts).view(len(records), self.num_experts)
        self._sequence_counts.append(counts_BE.int())
        if self.domains:
            counts = torch.zeros(len(self.domains), self.num_experts, dtype=torch.int64)
            counts.index_add_(0, domain, counts_BE)
            self.sums["domain_routed"] = self.sums.get("domain_routed", 0) + counts

    def _sample(self, routed: Routed, record: Tensor, position: Tensor) -> None:
        """Keep the tokens of a batch that the sample may need: dispatched ones.

        Args:
            record, position: (T,).
        """
        key = torch.from_numpy(token_keys(record.numpy(), position.numpy(), seed=self.seed))
        inputs_TD, none_T0 = routed.inputs.float(), torch.empty(len(key), 0)
        seen = none_T0 if routed.router_inputs is routed.inputs else routed.router_inputs.float()
        batch = TokenSample(inputs_TD, routed.experts, routed.weights.float(), record, position, key, none_T0, seen)
        if self.top_k == 1 and routed.dispatched is not None:
            batch = batch.select(routed.dispatched[:, 0])
        if len(batch) > self.sample_size:
            kept = sample_mask(batch.key.numpy(), batch.expert.numpy(), self.num_experts, self.sample_size)
            batch = batch.select(torch.from_numpy(kept))
        self._parts.append(batch)
        self._buffered += len(batch)
        if self._buffered > 2 * self.sample_size:
            self._draw()

    def _draw(self) -> TokenSample:
        sample = TokenSample.concatenate(self._parts).drawn(self.sample_size, self.num_experts)
        self._parts, self._buffered = [sample], len(sample)
        return sample

    def stats(self) -> LayerStats:
        """The sums so far; at least one batch must have been added."""
        sums = dict(self.sums)
        domain_routed = sums.pop("domain_routed", ())
        return LayerStats(
            **sums,
            sequence_counts=sort_rows(torch.cat(self._sequence_counts)),
            sample=self._draw(),
            sample_size=self.sample_size,
            domain_routed=dict(zip(self.domains, domain_routed, strict=True)),
            top_k=self.top_k,
            is_bounded=self.is_bounded,
        )


class Recorder:
    """Recorders of all layers of a model, fed between `attached()` and its end.

    Attributes:
        layers: name -> recorder, of the layers that have run.
        valid: (B, S) bool of the sequence that is running; records: (B,) identities of the batch's records;
            domain: (B,) positions of their domains among `domains`. Set by whoever runs the model.
    """

    def __init__(self, family: Family, model: nn.Module, *, sample_size: int, seed: int, domains: Sequence[str] = ()):
        self.family, self.model = family, model
        self.new_layer = partial(LayerRecorder, sample_size=sample_size, seed=seed, domains=domains)
        self.layers: dict[str, LayerRecorder] = {}
        self.outputs = family.expert_outputs(model)
        self.heard: dict[str, Routed] = {}
        self.valid = torch.empty(0)
        self.records = torch.empty(0, dtype=torch.int64)
        self.domain = torch.empty(0, dtype=torch.int64)

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Listen to every MoE layer; hooks are removed on the way out, whatever happens."""
        with self.family.listen(self.model, self._hear) as stack:
            for name, module in self.outputs.layers.items():
                stack.callback(module.register_forward_hook(self._layer_hook(name)).remove)
            for name, module in self.outputs.calls.items():
                call = partial(self._call, name, module.forward, inspect.signature(module.forward))
                stack.enter_context(replaced_forward(module, call))
            yield

    def _hear(self, name: str, routed: Routed) -> None:
        """What a router did waits for what the layer, or its experts, give."""
        if name in self.outputs.layers or name in self.outputs.calls:
            self.heard[name] = routed
        else:
            self._add(name, select(routed, self.valid.flatten()), {})

    def _add(self, name: str, routed: Routed, output_sums: dict[str, Tensor]) -> None:
        layer = self.layers.setdefault(name, self.new_layer())
        layer.update(routed, output_sums, self.valid, self.records, self.domain)

    def _layer_hook(self, name: str):
        def hook(module: nn.Module, inputs: tuple, outputs: Any) -> None:
            valid = self.valid.flatten()
            routed = each(select(self.heard.pop(name), valid), Tensor.cpu)
            given = self.family.layer_output(outputs)
            if name in self.outputs.repeats:
                given = given.view(self.outputs.repeats[name], 1, len(valid), -1).sum(0)
            given_TD = given.flatten(0, 1)[valid].cpu()
            self._add(name, routed, layer_output_sums(routed, given_TD, routed.logits.shape[-1]))

        return hook

    def _call(self, name: str, forward: Callable[..., Tensor], read: inspect.Signature, *args: Any, **kwargs: Any):
        """Take the place of the forward of an experts module.

        Args:
            read: signature of `forward`.
        """
        hidden, experts_TK, weights_TK = read.bind(*args, **kwargs).args
        routed, valid = self.heard.pop(name), self.valid.flatten().to(hidden.device)
        num_experts, top_k = routed.logits.shape[-1], routed.experts.shape[1]
        counted_TK = valid[:, None].expand_as(routed.experts)
        if routed.dispatched is not None:
            counted_TK = counted_TK & routed.dispatched
        order_C = torch.where(counted_TK, routed.experts, num_experts).flatten().argsort(stable=True)
        gates_C = weights_TK.flatten().index_select(0, order_C)
        tokens_CD = hidden.reshape(-1, hidden.shape[-1]).index_select(0, order_C // top_k)
        given_CD = forward(tokens_CD, experts_TK.reshape(-1, 1)[order_C], gates_C[:, None])
        counts_E = count(routed.experts[counted_TK], num_experts)
        self._add(name, select(routed, valid), choice_output_sums(given_CD, gates_C, counts_E))
        place_C = torch.empty_like(order_C)
        place_C[order_C] = torch.arange(len(order_C), device=order_C.device)
        return sum_of_choices(given_CD, place_C.view(-1, top_k)).view_as(hidden)


def sum_of_choices(given: Tensor, places: Tensor) -> Tensor:
    """(T, D) sums of the rows of `given` (C, D) at `places` (T, K)."""
    if given.dtype == torch.float32:
        return nn.functional.embedding_bag(places, given, mode="sum")
    return given[places].sum(1)


def select(routed: Routed, valid: Tensor) -> Routed:
    """The valid tokens (T,) of a batch."""
    if bool(valid.all()):
        return routed
    valid = valid.to(routed.inputs.device)
    return each(routed, lambda tensor: tensor[valid])


def each(routed: Routed, change: Callable[[Tensor], Tensor]) -> Routed:
    """Every tensor changed; router inputs that are the inputs stay the same tensor."""
    inputs = change(routed.inputs)
    seen = inputs if routed.router_inputs is routed.inputs else change(routed.router_inputs)
    dispatched = None if routed.dispatched is None else change(routed.dispatched)
    return Routed(inputs, change(routed.experts), change(routed.weights), change(routed.logits), seen, dispatched)


@contextlib.contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Another forward of a module for as long as the context lasts."""
    earlier = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if earlier is not None:
            module.forward = earlier
