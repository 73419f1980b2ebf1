"""Distillation loss, summed over target tokens; the caller divides by their number.

Shapes: B batch, S target length, N valid target tokens, V vocabulary, D d_model, K teacher's likeliest tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from msmoe.calibration.batches import IGNORE

LEAST_MASS = 1e-12


class TeacherOutput(NamedTuple):
    """What a teacher said about a batch.

    Attributes:
        log_probabilities: (N, V), or (N, K + 1) of its likeliest tokens and, last, of all others together (no such
            column if K = V); at the temperature of the distillation.
        tokens: (N, K) int64, those tokens; None for the whole vocabulary.
        hidden: per block the hidden states of the valid tokens (T, D); empty without hidden-state term.
    """

    log_probabilities: Tensor
    tokens: Tensor | None = None
    hidden: Sequence[Tensor] = ()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed cross-entropy of logits (B, S, V) at the labels (B, S) that are not -100."""
    return nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum"
    )


def distillation(logits: Tensor, labels: Tensor, teacher: TeacherOutput, temperature: float) -> Tensor:
    """T^2 KL(teacher || student), both at temperature T, summed over the valid target tokens (arXiv 1503.02531).

    T^2 keeps the size of the gradient comparable over temperatures. A teacher cut to its K likeliest tokens is
    compared on those and on the mass of all others.

    Args:
        logits: (B, S, V) of the student.
        labels: (B, S), -100 for padding.
    """
    student = (logits[labels != IGNORE].float() / temperature).log_softmax(-1)
    target = teacher.log_probabilities
    if teacher.tokens is not None:
        student = with_rest(student, teacher.tokens)
    return temperature**2 * nn.functional.kl_div(student, target, reduction="sum", log_target=True)


def with_rest(log_probabilities: Tensor, tokens: Tensor) -> Tensor:
    """(N, K + 1) log-probabilities of K tokens and, last, of all others together; (N, V) -> (N, K) where K = V.

    The others are summed themselves: one minus the sum of the kept would lose a small remainder to rounding.

    Args:
        log_probabilities: (N, V); tokens: (N, K) int64.
    """
    kept = log_probabilities.gather(-1, tokens)
    if tokens.shape[-1] == log_probabilities.shape[-1]:
        return kept
    others = log_probabilities.scatter(-1, tokens, float("-inf"))
    return torch.cat([kept, others.logsumexp(-1, keepdim=True)], -1)


def hidden_distance(
    student: Sequence[Tensor], teacher: Sequence[Tensor], num_tokens: Sequence[int] | None = None
) -> Tensor:
    """Squared distance of hidden states (T, D) relative to the teacher's square, averaged over tokens and blocks.

    Args:
        num_tokens: per block, the tokens that the average is over, where those given are a part of them.
    """
    counts = num_tokens or [len(s) for s in student]
    distances = [
        ((s.float() - t.float()).square().sum(-1) / t.float().square().sum(-1).clamp(min=LEAST_MASS)).sum() / count
        for s, t, count in zip(student, teacher, counts, strict=True)
    ]
    return torch.stack(distances).mean()
