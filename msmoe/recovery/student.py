"""The student: what is trained of it, by which optimiser, and its forward pass.

Shapes: B batch, S target length (of a decoder-only model, of the whole sequence), D d_model, V vocabulary.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from msmoe.calibration.batches import IGNORE
from msmoe.calibration.tokenizer import is_causal, load_tokenizer
from msmoe.checkpoint import Checkpoint
from msmoe.errors import UserError
from msmoe.families import Family
from msmoe.recovery.options import RecoverOptions


def forward(model: Any, batch: dict[str, Tensor], *, hidden: bool) -> tuple[Tensor, list[Tensor]]:
    """Logits (B, S, V), and the hidden states of the valid tokens of every block where asked for.

    The logits at a position are those that predict the label there. The labels of a decoder-only model are its inputs,
    so its logits are those of one position before; the first, where no label counts, says nothing.
    """
    unwrapped = getattr(model, "module", model)
    if is_causal(unwrapped.config):
        return forward_of_decoder(model, unwrapped, batch, hidden=hidden)
    labels = batch["labels"]
    output = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        decoder_input_ids=unwrapped.prepare_decoder_input_ids_from_labels(labels),
        use_cache=False,
        output_hidden_states=hidden,
    )
    if not hidden:
        return output.logits, []
    sides = ((output.encoder_hidden_states, batch["attention_mask"].bool()),
             (output.decoder_hidden_states, labels != IGNORE))  # fmt: skip
    return output.logits, [states[valid] for blocks, valid in sides for states in blocks[1:]]


def forward_of_decoder(
    model: Any, unwrapped: Any, batch: dict[str, Tensor], *, hidden: bool
) -> tuple[Tensor, list[Tensor]]:
    with one_later(unwrapped.get_output_embeddings()):
        output = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            use_cache=False,
            output_hidden_states=hidden,
        )
    if not hidden:
        return output.logits, []
    valid = batch["attention_mask"].bool()
    return output.logits, [states[valid] for states in output.hidden_states[1:]]


@contextlib.contextmanager
def one_later(head: nn.Module) -> Iterator[None]:
    """Let output embeddings read states (B, S, D) one position later than they are: no copy of the logits is made."""
    handle = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].roll(1, dims=1),))
    try:
        yield
    finally:
        handle.remove()


def tokens_per_block(config: Any, num_inputs: int, num_targets: int) -> list[int]:
    """Valid tokens in each of the hidden states that `forward` gives.

    Args:
        num_inputs: tokens that the encoder, or the decoder-only model, reads; num_targets: target tokens.
    """
    if is_causal(config):
        return [num_inputs] * config.num_hidden_layers
    return [num_inputs] * config.num_layers + [num_targets] * config.num_decoder_layers


def schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the learning rate at a step, counted from 0: linear rise, then linear fall to 0 at the end."""
    rise = int(warmup * steps)
    return (step + 1) / (rise + 1) if step < rise else (steps - step) / (steps - rise)


def trainable_parameters(model: Any, family: Family | None, train: str) -> dict[str, nn.Parameter]:
    """The parameters that a choice of `RecoverOptions.train` moves; all others are frozen.

    Raises:
        UserError: if the model has none.
    """
    part = {"experts": "experts", "router": "routers"}.get(train)
    chosen = {
        name: parameter
        for name, parameter in model.named_parameters()
        if part is None or (family is not None and family.part(name) == part)
    }
    if not chosen:
        raise UserError(f"the student has no {part}: use --train all")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return chosen


def aliases(model: Any) -> dict[str, str]:
    """Other names of tied parameters -> their first name; checkpoints may store either."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in every if first[id(parameter)] != name}


def adamw(parameters: dict[str, nn.Parameter], options: RecoverOptions) -> torch.optim.AdamW:
    """AdamW; norms and biases, the parameters with one axis, are not decayed."""
    groups = [
        {"params": [p for p in parameters.values() if p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters.values() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=options.learning_rate)


def check_same_vocabulary(student: Checkpoint, teacher: Checkpoint) -> None:
    """Raise `UserError` if the two checkpoints name tokens differently."""
    sizes = [c.config.get("vocab_size") for c in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"student and teacher must share their vocabulary: {student.path} has {sizes[0]} tokens, "
            f"{teacher.path} has {sizes[1]}"
        )
    tokenizers = [load_tokenizer(c.path) for c in (student, teacher)]
    if all(tokenizers) and tokenizers[0].get_vocab() != tokenizers[1].get_vocab():  # type: ignore[union-attr]
        raise UserError(f"student and teacher must share their vocabulary: the tokenizers of {student.path} and "
                        f"{teacher.path} differ")  # fmt: skip


def check_same_blocks(student: Checkpoint, teacher: Checkpoint) -> None:
    """Raise `UserError` if the hidden states of two checkpoints cannot be compared block by block."""
    decoders = is_causal(student.config) and is_causal(teacher.config)
    names = ("hidden_size", "num_hidden_layers") if decoders else ("d_model", "num_layers", "num_decoder_layers")
    for name in names:
        ours, theirs = (c.config.get(name) for c in (student, teacher))
        if ours != theirs:
            raise UserError(f"--hidden-weight compares block by block: {student.path} has {name} {ours}, "
                            f"{teacher.path} has {theirs}")  # fmt: skip
