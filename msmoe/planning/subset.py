"""Which subset of a layer's experts reproduces the layer best (NAEE, arXiv 2402.14800).

With experts dropped, the router chooses among the others: each token goes to the kept expert of highest logit, at the
softmax probability over the kept logits. The squared error of a subset needs no expert output, only inner products:
|y - g f_e|^2 = |y|^2 - 2 g <y, f_e> + g^2 |f_e|^2, so a subset costs O(T K), and so do all K subsets with one less.
A router of several experts per token is asked about each subset, and products of two experts' outputs come in.

Shapes: E experts, K kept, T tokens, N subsets, C experts of a token.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from msmoe.layer.routing import Router

MAX_SUBSETS = 20_000  # tried one by one; beyond, a beam search
BEAM_WIDTH = 8
MAX_VALUES = 2**24  # of a block of subsets at once


@dataclass(frozen=True)
class SubsetErrors:
    """What the error of every subset follows from.

    Attributes:
        logits: (T, E) router logits; inner: (T, E) <y_t, f_e(x_t)>; square: (T, E) |f_e(x_t)|^2; target: (T,) |y_t|^2,
            y being the layer's output; weights: (T,) tokens that each stands for.
    """

    logits: np.ndarray
    inner: np.ndarray
    square: np.ndarray
    target: np.ndarray
    weights: np.ndarray

    @property
    def num_experts(self) -> int:
        return self.logits.shape[1]

    @property
    def total(self) -> float:
        """Weighted squared norm of the layer's output."""
        return float(self.weights @ self.target)

    def __call__(self, subsets: np.ndarray) -> np.ndarray:
        """Weighted squared error (N,) of subsets (N, K) of expert indices."""
        size = max(1, MAX_VALUES // max(1, self.logits.shape[0] * subsets.shape[1]))
        blocks = [self._errors(subsets[start : start + size]) for start in range(0, len(subsets), size)]
        return np.concatenate(blocks)

    def _errors(self, subsets_NK: np.ndarray) -> np.ndarray:
        logits_TNK = self.logits[:, subsets_NK]
        best_TN1 = logits_TNK.argmax(-1)[..., None]
        largest_TN1 = np.take_along_axis(logits_TNK, best_TN1, -1)
        gate_TN = 1 / np.exp(logits_TNK - largest_TN1).sum(-1)
        expert_TN = np.take_along_axis(np.broadcast_to(subsets_NK, logits_TNK.shape), best_TN1, -1)[..., 0]
        return self.weights @ self._token_errors(gate_TN, expert_TN)

    def _token_errors(self, gate_TN: np.ndarray, expert_TN: np.ndarray) -> np.ndarray:
        """Squared error (T, N) of giving each token to an expert at a gate value."""
        rows = np.arange(len(self.logits))[:, None]
        inner_TN, square_TN = self.inner[rows, expert_TN], self.square[rows, expert_TN]
        return self.target[:, None] - 2 * gate_TN * inner_TN + gate_TN**2 * square_TN

    def without_one(self, subset: tuple[int, ...]) -> np.ndarray:
        """As `__call__`, errors (K,) of the K subsets that lack one expert of `subset`; at least two experts.

        A token changes its expert only where its best goes: to the second best.
        """
        subset_K, rows = np.array(subset), np.arange(len(self.logits))
        logits_TK = self.logits[:, subset_K]
        best_T = logits_TK.argmax(1)
        terms_TK = np.exp(logits_TK - logits_TK[rows, best_T][:, None])
        total_T1 = terms_TK.sum(1, keepdims=True)
        terms_TK[rows, best_T] = 0.0  # the sum without its largest term is taken anew below: no cancellation
        errors_TK = self._token_errors(1 / (total_T1 - terms_TK), subset_K[best_T][:, None])
        logits_TK[rows, best_T] = -np.inf
        second_T = logits_TK.argmax(1)
        gate_T = 1 / np.exp(logits_TK - logits_TK[rows, second_T][:, None]).sum(1)
        errors_TK[rows, best_T] = self._token_errors(gate_T[:, None], subset_K[second_T][:, None])[:, 0]
        return self.weights @ errors_TK


@dataclass(frozen=True)
class RoutedSubsetErrors:
    """The same for any router.

    Attributes:
        router: of all experts; inputs: (T, D) what it sees.
        inner: (T, E) <y_t, f_e(x_t)>; products: (T, E, E) <f_e(x_t), f_e'(x_t)>; target: (T,) |y_t|^2.
        weights: (T,) tokens that each stands for.
    """

    router: Router
    inputs: Tensor
    inner: Tensor
    products: Tensor
    target: Tensor
    weights: np.ndarray

    @property
    def num_experts(self) -> int:
        return self.inner.shape[1]

    @property
    def total(self) -> float:
        return float(self.weights @ self.target.numpy())

    def __call__(self, subsets: np.ndarray) -> np.ndarray:
        """Weighted squared error (N,) of subsets (N, K) of expert indices."""
        return np.array([self._error(torch.from_numpy(subset)) for subset in subsets])

    def _error(self, subset_K: Tensor) -> float:
        experts_TC, gate_TC = self.router.keeping(subset_K.tolist())(self.inputs)
        experts_TC, gate_TC = subset_K[experts_TC], gate_TC.double()
        rows = torch.arange(len(experts_TC))[:, None]
        inner_TC = self.inner[rows, experts_TC].double()
        products_TCC = self.products[rows[..., None], experts_TC[:, :, None], experts_TC[:, None, :]].double()
        square_T = torch.einsum("tc,td,tcd->t", gate_TC, gate_TC, products_TCC)
        errors_T = self.target.double() - 2 * (gate_TC * inner_TC).sum(1) + square_T
        return float(self.weights @ errors_T.numpy())

    def without_one(self, subset: tuple[int, ...]) -> np.ndarray:
        """As `__call__`, errors (K,) of the K subsets that lack one expert of `subset`."""
        return self(np.array([subset[:i] + subset[i + 1 :] for i in range(len(subset))]))


@dataclass(frozen=True)
class Subset:
    """Experts to keep, ascending; the relative error that dropping the others makes; and how they were found."""

    experts: tuple[int, ...]
    error: float
    search: str


def best_subset(errors: SubsetErrors | RoutedSubsetErrors, count: int, *, max_subsets: int = MAX_SUBSETS) -> Subset:
    """The subset of `count` experts of least error, ties by lower indices.

    All subsets are tried where there are at most `max_subsets`. Otherwise experts are taken away one at a time, the
    `BEAM_WIDTH` best sets of each size being followed.
    """
    num_experts = errors.num_experts
    total = max(errors.total, 1e-30)
    num_subsets = math.comb(num_experts, count)
    if num_subsets <= max_subsets:
        subsets = np.array(list(itertools.combinations(range(num_experts), count)), dtype=np.int64)
        values = errors(subsets)
        best = int(values.argmin())
        searched = f"exhaustive, {num_subsets:,} subsets"
        return Subset(tuple(subsets[best].tolist()), float(values[best]) / total, searched)
    beam = [tuple(range(num_experts))]
    while len(beam[0]) > count:
        found: dict[tuple[int, ...], float] = {}
        for subset in beam:
            for i, value in enumerate(errors.without_one(subset).tolist()):
                found.setdefault(subset[:i] + subset[i + 1 :], value)
        beam = sorted(found, key=lambda subset: (found[subset], subset))[:BEAM_WIDTH]
    error = float(errors(np.array(beam[:1]))[0])
    searched = f"beam of {BEAM_WIDTH} ({num_subsets:.1e} subsets are too many to try)"
    return Subset(beam[0], error / total, searched)
