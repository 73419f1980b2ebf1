"""Task-specific expert pruning with its progressive schedule, replayed on calibration tokens.

The schedule is that of the task-specific baseline of M-SMoE (arXiv 2310.01334): a moving average of usage; at intervals
over the first half of the run the experts below beta / (live experts) are dropped, never below the number to keep; at
half time the most used that are still live stay. Dropped experts are masked before the softmax (the published code
multiplies their logits by a negative number, so that all tokens go to them), so the tokens of a dropped expert count
for the live one that takes them. The published method fine-tunes meanwhile; here the weights stand still.

Shapes: E experts, T tokens, K experts of a token.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from msmoe.layer.routing import Router

Routes = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Positions of tokens (T,), and which experts are live (E,) bool -> experts (T, K) of these tokens."""

NUM_STEPS = 64
NUM_PRUNES = 8
BETA = 0.1  # of an even share, below which an expert is dropped
DECAY = 0.6  # of the moving average per step
UPDATE_EVERY = 4


def progressive_subset(
    routed: Routes,
    num_experts: int,
    weights: np.ndarray,
    count: int,
    *,
    num_steps: int = NUM_STEPS,
    num_prunes: int = NUM_PRUNES,
    beta: float = BETA,
    decay: float = DECAY,
) -> tuple[int, ...]:
    """Experts to keep, ascending.

    Args:
        routed: where tokens go with experts masked; the tokens are in random order, and cut into `num_steps` batches.
        weights: (T,) tokens that each stands for.
        count: experts to keep.
    """
    live = np.ones(num_experts, dtype=bool)
    average = live / num_experts
    interval = max(1, num_steps // 2 // num_prunes)
    batches = np.array_split(np.arange(len(weights)), num_steps)
    for step in range(1, num_steps // 2 + 1):
        if (step - 1) % UPDATE_EVERY == 0:
            seen = np.concatenate(batches[step - 1 : step - 1 + UPDATE_EVERY])
            usage = live_usage(routed, seen, weights[seen], live)
            average = usage if step == 1 else decay * average + (1 - decay) * usage
        if step % interval == 0:
            share = np.where(live, average, 0.0)
            share = share / share.sum() if share.sum() > 0 else live / live.sum()
            doomed = np.flatnonzero(live & (share < beta / live.sum()))
            room = max(0, int(live.sum()) - count)
            live[doomed[np.lexsort((-doomed, share[doomed]))][:room]] = False
    share = np.where(live, average, -1.0)
    return tuple(sorted(np.lexsort((np.arange(num_experts), -share))[:count].tolist()))


def live_usage(routed: Routes, seen: np.ndarray, weights: np.ndarray, live: np.ndarray) -> np.ndarray:
    """Share (E,) of the tokens that each expert gets with the dropped ones masked; even among the live without any.

    Args:
        seen: (T,) positions of the tokens; weights: (T,).
    """
    if not len(seen):
        return live / live.sum()
    experts = routed(seen, live)
    flat = np.broadcast_to(weights[:, None], experts.shape).reshape(-1)
    counts = np.bincount(experts.reshape(-1), weights=flat, minlength=len(live))
    return counts / counts.sum() if counts.sum() > 0 else live / live.sum()


def logit_routes(logits: np.ndarray) -> Routes:
    """Every token to the live expert of highest logit (T, E)."""
    return lambda seen, live: np.where(live, logits[seen], -np.inf).argmax(1)[:, None]


def router_routes(router: Router, inputs: Tensor) -> Routes:
    """Every token (T, D) where the router sends it that keeps the rows of the live experts."""

    def routed(seen: np.ndarray, live: np.ndarray) -> np.ndarray:
        rows = np.flatnonzero(live)
        return rows[router.keeping(rows.tolist())(inputs[torch.from_numpy(seen)]).experts.numpy()]

    return routed
