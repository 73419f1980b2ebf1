"""Statistics of one layer, from a recorder or from a file.

Shapes: E experts, D d_model, S sampled tokens.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from msmoe.calibration.records import OTHER
from msmoe.calibration.statistics import STATISTICS, Sums
from msmoe.calibration.stored import DOMAINS, StoredLayer
from msmoe.errors import warn
from msmoe.layer.tokens import TokenSample

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LayerStats(Sums):
    """Sums over the valid tokens of one layer (see `Sums`), and some of the tokens.

    Attributes:
        sample: the token sample, or how to read it.
        sample_size: the bound under which the sample was drawn.
        domain_routed: domain -> (E,) int64 choices of its records, names ascending; they sum to `routed`. Empty for
            data without domains.
        top_k: experts that a token chooses.
        is_bounded: whether no weight exceeds 1, as where it is the probability of the one expert chosen.
    """

    sample: TokenSample | Callable[[], TokenSample]
    sample_size: int
    domain_routed: "Mapping[str, Tensor]" = field(default_factory=dict)
    top_k: int = 1
    is_bounded: bool = True

    @property
    def num_experts(self) -> int:
        return len(self.array("routed"))

    @property
    def num_tokens(self) -> int:
        return int(self.array("routed").sum()) // self.top_k

    @property
    def dropped(self) -> int:
        return int((self.array("routed") - self.array("dispatched")).sum())

    @property
    def usage(self) -> np.ndarray:
        """(E,) float64, sums to 1; uniform for a layer that saw no token."""
        return frequency(self.array("routed"))

    @property
    def usage_frequency(self) -> "Tensor":
        """`usage` as a tensor."""
        import torch

        return torch.from_numpy(self.usage)

    @property
    def has_output_gradients(self) -> bool:
        """Whether gradients at the layer's outputs were recorded."""
        return self.tokens().output_gradient.shape[1] > 0

    def array(self, name: str) -> np.ndarray:
        """One of the sums, by the name of its attribute: reading it so needs no torch."""
        return getattr(self, name).numpy()

    def domain_arrays(self) -> dict[str, np.ndarray]:
        """domain -> (E,) routed tokens, as `domain_routed`."""
        return {name: counts.numpy() for name, counts in self.domain_routed.items()}

    def sample_arrays(self) -> dict[str, np.ndarray]:
        """The token sample as it is stored, by the names of its attributes, read from disk if need be."""
        return {name: tensor.numpy() for name, tensor in self.tokens().stored().items()}

    def has(self, name: str) -> bool:
        """Whether the statistics hold an optional sum."""
        return getattr(self, name) is not None

    def tokens(self) -> TokenSample:
        """The token sample, read from disk if need be."""
        return self.sample() if callable(self.sample) else self.sample

    def __add__(self, other: "LayerStats") -> "LayerStats":
        if any(side.has(row.name) for side in (self, other) for row in STATISTICS if row.add is None):
            warn("gradient similarities do not add up: the sum has none")
        if self.has_output_gradients != other.has_output_gradients:
            warn("only one side has output gradients: the sum has none")
        size = min(self.sample_size, other.sample_size)
        return LayerStats(
            **self.add(other),
            sample=TokenSample.concatenate([self.tokens(), other.tokens()]).drawn(size, self.num_experts),
            sample_size=size,
            domain_routed=self._added_domains(other),
            top_k=self.top_k,
            is_bounded=self.is_bounded and other.is_bounded,
        )

    def _added_domains(self, other: "LayerStats") -> "dict[str, Tensor]":
        """Routed tokens per domain of both sides together; a side without domains counts as the domain `other`."""
        import torch

        if not self.domain_routed and not other.domain_routed:
            return {}
        sides = [side.domain_routed or {OTHER: side.routed} for side in (self, other)]
        names = sorted({*sides[0], *sides[1]})
        return {name: torch.stack([side[name] for side in sides if name in side]).sum(0) for name in names}

    def drop_rate(self, expert_map: "Tensor", capacity: int) -> float:
        """Share of routed tokens over capacity if each group of experts had `capacity` places per sequence.

        Args:
            expert_map: (E,) group of each expert.
        """
        import torch

        groups = torch.zeros(len(self.sequence_counts), int(expert_map.max()) + 1, dtype=torch.int64)
        groups.index_add_(1, expert_map, self.sequence_counts.long())
        return float((groups - capacity).clamp(min=0).sum()) / max(int(self.array("routed").sum()), 1)

    def describe(self) -> dict:
        """What `stats.json` says of the layer; without `top_k`, weights are probabilities of the one expert chosen."""
        return {
            "num_experts": self.num_experts,
            "num_tokens": self.num_tokens,
            **({} if self.top_k == 1 and self.is_bounded else {"top_k": self.top_k}),
            "routed": self.array("routed").tolist(),
            "dispatched": self.array("dispatched").tolist(),
            "dropped": self.dropped,
            "usage_frequency": self.usage.tolist(),
            "gate_mass": self.array("gate_mass").tolist(),
            "sample_size": self.sample_size,
        }


class Lazy:
    """An attribute of `LoadedLayer`: the tensor of a stored array, made when it is first asked for."""

    def __init__(self, name: str):
        self.name = name

    def __get__(self, layer: Any, owner: type | None = None) -> "Tensor | None":
        if layer is None:
            return None
        import torch

        array = layer.stored.arrays.get(self.name)
        layer.__dict__[self.name] = None if array is None else torch.from_numpy(array)
        return layer.__dict__[self.name]


class LoadedLayer(LayerStats):
    """`LayerStats` of a file: arrays, which become tensors when an algorithm asks for them."""

    stored: StoredLayer

    @classmethod
    def of(cls, stored: StoredLayer) -> "LoadedLayer":
        layer = object.__new__(cls)  # `dataclasses.replace` makes others, from tensors
        layer.__dict__.update(
            stored=stored, sample_size=stored.sample_size, sample=layer._read_sample, top_k=stored.top_k,
            is_bounded=stored.is_bounded,
        )  # fmt: skip
        return layer

    @cached_property
    def domain_routed(self) -> "dict[str, Tensor]":
        import torch

        return {name: torch.from_numpy(counts) for name, counts in self.domain_arrays().items()}

    def array(self, name: str) -> np.ndarray:
        return self.stored.arrays[name] if "stored" in self.__dict__ else super().array(name)

    def domain_arrays(self) -> dict[str, np.ndarray]:
        if "stored" not in self.__dict__:
            return super().domain_arrays()
        rows = self.stored.arrays.get(DOMAINS, ())
        return dict(zip(self.stored.domains, rows, strict=True))

    def sample_arrays(self) -> dict[str, np.ndarray]:
        return self.stored.sample() if "stored" in self.__dict__ else super().sample_arrays()

    @property
    def has_output_gradients(self) -> bool:
        return self.stored.has_gradient if "stored" in self.__dict__ else super().has_output_gradients

    def has(self, name: str) -> bool:
        return name in self.stored.arrays if "stored" in self.__dict__ else super().has(name)

    def _read_sample(self) -> TokenSample:
        import torch

        return TokenSample.from_stored({name: torch.from_numpy(a) for name, a in self.stored.sample().items()})


for _statistic in STATISTICS:
    setattr(LoadedLayer, _statistic.name, Lazy(_statistic.name))


def frequency(counts: np.ndarray) -> np.ndarray:
    """Share of each count (E,) in their sum, float64; uniform if all are zero."""
    total = int(counts.sum())
    return counts / total if total else np.full(len(counts), 1 / len(counts))


def with_gradients(layer: LayerStats, gradient_gram: "Tensor", weight_gradient_gram: "Tensor") -> LayerStats:
    """The same statistics with the Gram matrices (E, E) of the experts' loss gradients."""
    return replace(layer, gradient_gram=gradient_gram, weight_gradient_gram=weight_gradient_gram)


def with_output_gradient(layer: LayerStats, gradient: "Tensor") -> LayerStats:
    """The same statistics with the gradient (S, D) at the layer's output of every sampled token, NaN where unknown."""
    return replace(layer, sample=replace(layer.tokens(), output_gradient=gradient))
