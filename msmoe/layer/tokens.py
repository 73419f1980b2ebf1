"""The token sample: tokens of a layer, kept so that expert outputs can be computed later without the model.

Every token has a pseudo-random key made from the seed, the record it stands in and its position. The sample holds
the tokens with the smallest keys of the layer, and those with the smallest keys of each expert: the same tokens
whatever the batches and their order, and two samples merge into the sample of the union.

Shapes: S sampled tokens, T tokens, E experts, K experts of a token, n some experts, D d_model.
"""

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

OPTIONAL = ("router_inputs", "chance")  # fields that may have no columns, and are then not stored


@dataclass(frozen=True)
class TokenSample:
    """Dispatched tokens of one layer.

    Attributes:
        inputs: (S, D) float32, what the experts saw.
        expert: (S, K) int64 routed experts, all different for a token.
        gate: (S, K) float32 gate values, what the experts' outputs are multiplied by.
        record: (S,) int64 identity of the record; position: (S,) int64 position in it.
        key: (S,) int64 sampling key.
        output_gradient: (S, D) float32 gradient of the log-likelihood with respect to the layer's output, NaN for
            tokens of records that it was not asked for; (S, 0) where it was not recorded.
        router_inputs: (S, D') float32, what the router saw; (S, 0) where that is `inputs`.
        chance: (S, 1) float64 chance of a token to be sampled, up to a common factor; (S, 0) where a token has one
            expert and it follows from counts. By default that of tokens which are all there.
    """

    inputs: "Tensor"
    expert: "Tensor"
    gate: "Tensor"
    record: "Tensor"
    position: "Tensor"
    key: "Tensor"
    output_gradient: "Tensor"
    router_inputs: "Tensor"
    chance: "Tensor | None" = None

    def __post_init__(self) -> None:
        if self.chance is None:
            object.__setattr__(self, "chance", self.inputs.double().new_ones(len(self.key), int(self.top_k > 1)))

    def __len__(self) -> int:
        return len(self.expert)

    def select(self, chosen: "Tensor") -> "TokenSample":
        """Tokens at the indices, or under the mask, `chosen`."""
        return TokenSample(*(getattr(self, f.name)[chosen] for f in fields(self)))

    def drawn(self, size: int, num_experts: int) -> "TokenSample":
        """The sample of at most `size` tokens, in the order of the keys."""
        import torch

        arrays = self.key.numpy(), self.expert.numpy()
        if self.top_k == 1:
            kept = self.select(torch.from_numpy(sample_mask(*arrays, num_experts, size)))
        else:
            mask, chance = draw(*arrays, num_experts, size)
            chance = torch.minimum(self.chance, torch.from_numpy(chance)[:, None])
            kept = replace(self, chance=chance).select(torch.from_numpy(mask))
        return kept.select(torch.from_numpy(np.lexsort((kept.position.numpy(), kept.record.numpy(), kept.key.numpy()))))

    @property
    def top_k(self) -> int:
        """Experts of a token."""
        return self.expert.shape[1]

    @property
    def routed_on(self) -> "Tensor":
        """(S, D') what the router saw."""
        return self.router_inputs if self.router_inputs.shape[1] else self.inputs

    def of(self, expert: int) -> "tuple[Tensor, Tensor]":
        """The tokens of an expert: their positions (T,), ascending, and the expert's gate values (T,)."""
        rows, columns = (self.expert == expert).nonzero(as_tuple=True)
        return rows, self.gate[rows, columns]

    def among(self, experts: "Tensor") -> "tuple[Tensor, Tensor]":
        """Whether each token goes to each of some experts (n,): (S, n) bool, and gate values (S, n), 0 elsewhere."""
        chosen = self.expert[:, :, None] == experts
        return chosen.any(1), (self.gate[:, :, None] * chosen).sum(1)

    @property
    def held_out(self) -> "Tensor":
        """(S,) bool: about half of the tokens, whole records at a time, so that both halves are independent."""
        import torch

        return torch.from_numpy(mix(self.record.numpy().astype(np.uint64)) >> np.uint64(63) == 1)

    def weights(self, dispatched: "Tensor") -> "Tensor":
        """(S,) float64: tokens of the calibration data that each sampled token stands for.

        With one expert per token, dispatched by sampled tokens of the expert. With several, the inverse of `chance`,
        scaled so that the sum is the number of tokens.

        Args:
            dispatched: (E,) dispatched tokens of each expert.
        """
        import torch

        if self.top_k == 1:
            sampled = torch.bincount(self.expert[:, 0], minlength=len(dispatched))
            return (dispatched.double() / sampled.clamp(min=1))[self.expert[:, 0]]
        weights = 1 / self.chance[:, 0]
        return weights * (float(dispatched.sum()) / self.top_k / weights.sum().clamp(min=1e-300))

    @property
    def has_gradient(self) -> "Tensor":
        """(S,) bool: tokens whose output gradient is known."""
        import torch

        if self.output_gradient.shape[1] == 0:
            return torch.zeros(len(self), dtype=torch.bool)
        return self.output_gradient[:, 0].isfinite()

    @staticmethod
    def concatenate(samples: "list[TokenSample]") -> "TokenSample":
        """All tokens of some samples of one layer; without gradients unless every sample has them."""
        import torch

        if len({s.output_gradient.shape[1] for s in samples}) > 1:
            samples = [replace(s, output_gradient=s.output_gradient[:, :0]) for s in samples]
        return TokenSample(*(torch.cat([getattr(s, f.name) for s in samples]) for f in fields(TokenSample)))

    def stored(self) -> "dict[str, Tensor]":
        """The fields as they are stored: an axis of one expert and fields without columns are left out."""
        content = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.top_k == 1:
            content |= {name: content[name][:, 0] for name in ("expert", "gate")}
        return {name: t for name, t in content.items() if name not in OPTIONAL or t.shape[1]}

    @staticmethod
    def from_stored(content: "dict[str, Tensor]") -> "TokenSample":
        """The sample of stored fields."""
        shaped = {name: content[name].reshape(len(content["key"]), -1) for name in ("expert", "gate")}
        return TokenSample(**{"router_inputs": content["inputs"][:, :0]} | content | shaped)


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
    """Which tokens (T,) belong to a sample of at most `size`; arguments as of `draw`."""
    if expert.shape[1] == 1 and len(keys) <= size:
        return np.ones(len(keys), dtype=bool)
    return draw(keys, expert, num_experts, size)[0]


def draw(keys: np.ndarray, expert: np.ndarray, num_experts: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens (T,) belong to a sample, and with which chance they had to (T,).

    Half of the places go to the smallest keys of each expert in equal shares, so that rarely used experts are
    represented; the others, and what an expert leaves of its share, to the smallest keys among the rest. The sample
    of a union is the sample of the parts' samples. For that to hold, a token in the shares of several experts takes
    a place of each of them: the sample is then smaller than `size`.

    A token is in the sample if its key is at most the largest one among the rest, or in the share of one of its
    experts. Of k keys below a threshold, uniform, the threshold times k / (k - 1) is the chance to be below it.

    Args:
        keys: (T,); expert: (T, K) int64.
    """
    num_tokens, top_k = expert.shape
    share = size // 2 // num_experts
    flat, repeated = expert.reshape(-1), np.repeat(keys, top_k)
    order = np.lexsort((repeated, flat))
    starts = np.searchsorted(flat[order], np.arange(num_experts))
    rank = np.empty(len(flat), dtype=np.int64)
    rank[order] = np.arange(len(flat)) - starts[flat[order]]
    chosen = rank.reshape(num_tokens, top_k) < share
    mask = chosen.any(1)
    others = np.flatnonzero(~mask)
    room = size - np.count_nonzero(chosen)
    rest = others[np.argsort(keys[others], kind="stable")[:room]]
    mask[rest] = True

    limits = np.where(np.bincount(flat, minlength=num_experts) < share, 1.0, 0.0)
    last = rank == share - 1
    limits[flat[last]] = chance_below(repeated[last], share)
    of_rest = 1.0 if len(rest) < room else chance_below(keys[rest].max(), room) if room else 0.0
    return mask, np.maximum(limits[expert].max(1), of_rest)


def chance_below(threshold: np.ndarray, count: int) -> np.ndarray:
    """Chance of a key to be at most a threshold, which is the largest of `count` keys."""
    return np.minimum(threshold.astype(np.float64) / 2.0**63 * count / max(count - 1, 0.5), 1.0)
