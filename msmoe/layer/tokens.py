"""The token sample: tokens of a layer, kept so that expert outputs can be computed later without the model.

Every token has a pseudo-random key made from the seed, the record it stands in and its position. The sample holds
the tokens with the smallest keys of the layer, and those with the smallest keys of each expert: the same tokens
whatever the batches and their order, and two samples merge into the sample of the union.

Shapes: S sampled tokens, T tokens, E experts, D d_model.
"""

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TokenSample:
    """Dispatched tokens of one layer.

    Attributes:
        inputs: (S, D) float32, what router and experts saw.
        expert: (S,) int64 routed expert.
        gate: (S,) float32 gate value.
        record: (S,) int64 identity of the record; position: (S,) int64 position in it.
        key: (S,) int64 sampling key.
        output_gradient: (S, D) float32 gradient of the log-likelihood with respect to the layer's output, NaN for
            tokens of records that it was not asked for; (S, 0) where it was not recorded.
    """

    inputs: "Tensor"
    expert: "Tensor"
    gate: "Tensor"
    record: "Tensor"
    position: "Tensor"
    key: "Tensor"
    output_gradient: "Tensor"

    def __len__(self) -> int:
        return len(self.expert)

    def select(self, chosen: "Tensor") -> "TokenSample":
        """Tokens at the indices, or under the mask, `chosen`."""
        return TokenSample(*(getattr(self, f.name)[chosen] for f in fields(self)))

    def drawn(self, size: int, num_experts: int) -> "TokenSample":
        """The sample of at most `size` tokens, in the order of the keys."""
        import torch

        kept = self.select(torch.from_numpy(sample_mask(self.key.numpy(), self.expert.numpy(), num_experts, size)))
        return kept.select(torch.from_numpy(np.lexsort((kept.position.numpy(), kept.record.numpy(), kept.key.numpy()))))

    @property
    def held_out(self) -> "Tensor":
        """(S,) bool: about half of the tokens, whole records at a time, so that both halves are independent."""
        import torch

        return torch.from_numpy(mix(self.record.numpy().astype(np.uint64)) >> np.uint64(63) == 1)

    def weights(self, dispatched: "Tensor") -> "Tensor":
        """(S,) float64: tokens of the calibration data that each sampled token stands for.

        Args:
            dispatched: (E,) dispatched tokens of each expert.
        """
        import torch

        sampled = torch.bincount(self.expert, minlength=len(dispatched))
        return (dispatched.double() / sampled.clamp(min=1))[self.expert]

    @property
    def has_gradient(self) -> "Tensor":
        """(S,) bool: tokens whose output gradient is known."""
        import torch

        if self.output_gradient.shape[1] == 0:
            return torch.zeros(len(self), dtype=torch.bool)
        return self.output_gradient[:, 0].isfinite()

    @staticmethod
    def concatenate(samples: "list[TokenSample]") -> "TokenSample":
        """All tokens of some samples; without gradients unless every sample has them."""
        import torch

        if len({s.output_gradient.shape[1] for s in samples}) > 1:
            samples = [replace(s, output_gradient=s.output_gradient[:, :0]) for s in samples]
        return TokenSample(*(torch.cat([getattr(s, f.name) for s in samples]) for f in fields(TokenSample)))


def mix(x: np.ndarray) -> np.ndarray:
    """Finaliser of SplitMix64: uint64 -> well-mixed uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def token_keys(records: np.ndarray, positions: np.ndarray, *, seed: int) -> np.ndarray:
    """Sampling keys (T,) int64, uniform and non-negative, from record identities and positions (T,)."""
    state = mix(records.astype(np.uint64) + np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64))
    return (mix(state + positions.astype(np.uint64) * np.uint64(0xD1B54A32D192ED03)) >> np.uint64(1)).astype(np.int64)


def sample_mask(keys: np.ndarray, expert: np.ndarray, num_experts: int, size: int) -> np.ndarray:
    """Which tokens (T,) belong to a sample of at most `size`.

    Half of the places go to the smallest keys of each expert in equal shares, so that rarely used experts are
    represented; the others, and what an expert leaves of its share, to the smallest keys among the rest. The sample
    of a union is the sample of the parts' samples.
    """
    if len(keys) <= size:
        return np.ones(len(keys), dtype=bool)
    share = size // 2 // num_experts
    order = np.lexsort((keys, expert))
    starts = np.searchsorted(expert[order], np.arange(num_experts))
    rank = np.empty(len(keys), dtype=np.int64)
    rank[order] = np.arange(len(keys)) - starts[expert[order]]
    mask = rank < share
    others = np.flatnonzero(~mask)
    mask[others[np.argsort(keys[others], kind="stable")[: size - np.count_nonzero(mask)]]] = True
    return mask
