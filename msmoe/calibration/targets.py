"""What a model says at the target positions of a batch, in slices: the logits of a whole batch are never there at once.

The model runs up to its output embeddings once; what stands between its last block and its logits then scores the
target tokens, `SLICE` logits at a time.

Shapes: B batch, S sequence, S' target length, N valid target tokens, n tokens of a slice, D d_model, V vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from msmoe.calibration.spans import IGNORE
from msmoe.calibration.tokenizer import is_causal

SLICE = 2**24  # logits that are there at once, at most: 64 MiB in float32


@dataclass(frozen=True)
class Targets:
    """The target tokens of a batch, and what the model makes of the positions that predict them.

    Attributes:
        states: (N, D) what the output embeddings read for each target token.
        labels: (N,) the target tokens; rows: (N,) the records in the batch that they are of; positions: (N,) where they
            stand in the labels.
        num_records: B.
        vocabulary: V.
        logits: states (n, D) -> logits (n, V) float32.
    """

    states: Tensor
    labels: Tensor
    rows: Tensor
    positions: Tensor
    num_records: int
    vocabulary: int
    logits: Callable[[Tensor], Tensor]

    def slices(self) -> Iterator[tuple[slice, Tensor]]:
        """Logits (n, V) of a slice of the target tokens at a time."""
        size = max(1, SLICE // self.vocabulary)
        for start in range(0, len(self.labels), size):
            part = slice(start, start + size)
            yield part, self.logits(self.states[part])

    def by_record(self, values: Tensor) -> np.ndarray:
        """Sums (B,) of values (N,) of the target tokens, float64."""
        total_B = torch.zeros(self.num_records, dtype=torch.float64)
        return total_B.index_add_(0, self.rows.cpu(), values.detach().cpu().double()).numpy()


def targets_of(model: Any, batch: dict[str, Tensor], *, encoded: Any = None) -> Targets:
    """Run a model over a batch of `input_ids`, `attention_mask` (B, S) and `labels` (B, S'), up to its logits.

    Args:
        encoded: what the encoder of an encoder-decoder gave for the batch, if it has run already.
    """
    labels = batch["labels"]
    valid = labels != IGNORE
    if is_causal(model.config):
        valid[:, 0] = False  # no position before it predicts it
        states_BSD, last = states_of_decoder(model, batch)
        states, logits = states_BSD[:, :-1][valid[:, 1:]], lambda states_nD: scored(model, last, states_nD)
    else:
        states_BSD = decoder_states(model, batch, encoded)
        head = model.get_output_embeddings()
        states, logits = states_BSD[valid], lambda states_nD: head(states_nD).float()
    rows, positions = valid.nonzero(as_tuple=True)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    return Targets(states, labels[valid], rows, positions, len(labels), vocabulary, logits)


def target_log_probabilities(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Log-probability (N,) of every target token of a batch, in the order of the records and their positions."""
    return log_probabilities(targets_of(model, batch))


def log_probabilities(targets: Targets) -> Tensor:
    """Log-probability (N,) of every target token."""
    parts = [
        -nn.functional.cross_entropy(logits, targets.labels[part], reduction="none")
        for part, logits in targets.slices()
    ]
    return torch.cat(parts) if parts else targets.states.new_zeros(0)


def divergences(targets: Targets, reference: Targets) -> Tensor:
    """KL(reference || model) in nats (N,) at every target token of the same batch."""
    parts = []
    for (_, own), (_, wanted) in zip(targets.slices(), reference.slices(), strict=True):
        own, wanted = own.log_softmax(-1), wanted.log_softmax(-1)
        parts.append(nn.functional.kl_div(own, wanted, reduction="none", log_target=True).sum(-1))
    return torch.cat(parts) if parts else targets.states.new_zeros(0)


def decoder_states(model: Any, batch: dict[str, Tensor], encoded: Any) -> Tensor:
    """What the output embeddings of an encoder-decoder read (B, S', D)."""
    kept: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple) -> tuple:
        kept.append(inputs[0])
        return (inputs[0][:, :0],)

    given = {"input_ids": batch["input_ids"]} if encoded is None else {"encoder_outputs": encoded}
    handle = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        model(
            **given,
            attention_mask=batch["attention_mask"],
            decoder_input_ids=model.prepare_decoder_input_ids_from_labels(batch["labels"]),
            use_cache=False,
        )
    finally:
        handle.remove()
    return kept[0]


def states_of_decoder(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Any]:
    """The last hidden states (B, S, D) of a decoder-only model, and all that its stack of blocks gave."""
    output = blocks_of(model)(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, return_dict=True
    )
    return output.last_hidden_state, output


def scored(model: Any, output: Any, states: Tensor) -> Tensor:
    """Logits (n, V) float32 of last hidden states (n, D), as a decoder-only model's own forward pass makes them.

    Some scale or cap what the output embeddings give, so the model itself runs, with the states in the place of what
    its blocks would give.

    Args:
        output: of the blocks, for any input; its states are left out.
    """
    given = type(output)(**{**output, "last_hidden_state": states[None]})
    ids = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
    with giving(blocks_of(model), given):
        return model(input_ids=ids, use_cache=False, return_dict=True).logits[0].float()


def blocks_of(model: Any) -> nn.Module:
    """All of a decoder-only model below its output embeddings; Llama 4 names it otherwise than its class says."""
    return model.model if model.base_model is model else model.base_model


@contextlib.contextmanager
def giving(stack: nn.Module, output: Any) -> Iterator[None]:
    """Let a module give `output`, whatever it is asked."""
    own = vars(stack).get("forward")
    stack.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if own is None:
            del stack.forward
        else:
            stack.forward = own
