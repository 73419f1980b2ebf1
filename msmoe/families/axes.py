"""Where tensors hold experts, and which fields of a configuration count them.

Shapes: E experts.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor, nn

COUNT_FIELD = re.compile(r"num_experts|num_local_experts|n_routed_experts|moe_num_experts")
PREDICTED_LAYERS = "num_nextn_predict_layers"  # layers for multi-token prediction, beyond those of the model


class Axis(NamedTuple):
    """Where a tensor holds experts: along `dim`, `block` entries for each, in order, then `tail` entries of others.

    Others are shared experts, experts that compute nothing, and classes of a router that stand for no expert.
    """

    dim: int
    block: int
    tail: int = 0

    def entries(self, shape: Sequence[int], experts: Sequence[int]) -> list[int]:
        """Positions along `dim` of some experts, in their order, and of the others behind them."""
        first_other = shape[self.dim] - self.tail
        kept = [e * self.block + i for e in experts for i in range(self.block)]
        return [*kept, *range(first_other, shape[self.dim])]

    def select(self, tensor: Tensor, experts: Sequence[int]) -> Tensor:
        """The tensor with some experts only, in their order."""
        import torch

        return tensor.index_select(self.dim, torch.tensor(self.entries(tensor.shape, experts)))

    def shape(self, shape: Sequence[int], count: int) -> tuple[int, ...]:
        """Shape of the tensor with `count` experts."""
        changed = list(shape)
        changed[self.dim] = count * self.block + self.tail
        return tuple(changed)


def expert_axes(model: nn.Module, larger: nn.Module, num_experts: int, more: int) -> dict[str, Axis]:
    """Axes of every parameter and buffer of a model that has entries per expert, by name.

    They are read off the difference to the same model with `more` experts in the place of `num_experts`.

    Raises:
        ValueError: for a tensor that grows along several axes, or by no whole number of entries per expert.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in larger.state_dict().items()}
    axes = {}
    for name, tensor in model.state_dict().items():
        if name not in shapes or tuple(tensor.shape) == shapes[name]:
            continue
        grown = [dim for dim, pair in enumerate(zip(tensor.shape, shapes[name], strict=True)) if pair[0] != pair[1]]
        size = tensor.shape[grown[0]]
        block, rest = divmod(shapes[name][grown[0]] - size, more - num_experts)
        if len(grown) > 1 or rest or block < 1:
            raise ValueError(f"{name} grows from {list(tensor.shape)} to {list(shapes[name])} with {more} experts")
        axes[name] = Axis(grown[0], block, size - num_experts * block)
    return axes


def count_fields(config: dict) -> list[tuple[str, ...]]:
    """Paths of the fields of a configuration, nested ones included, that hold a number of experts."""

    def walk(at: dict, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        for name, value in at.items():
            if isinstance(value, dict) and name != "per_layer_config":
                yield from walk(value, (*path, name))
            elif COUNT_FIELD.fullmatch(str(name)) and is_count(value):
                yield (*path, name)

    return list(walk(config, ()))


def is_count(value: Any) -> bool:
    """Whether a value counts experts: an integer, or one for each kind of experts."""
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(type(v) is int and v > 0 for v in values)


def with_count(config: dict, fields: Sequence[tuple[str, ...]], count: int) -> dict:
    """A configuration with `count` experts in every one of some fields; fields that are not there are added."""
    changed = copy.deepcopy(config)
    for *path, name in fields:
        at = changed
        for step in path:
            at = at.setdefault(step, {})
        at[name] = [count] * len(at[name]) if isinstance(at.get(name), list) else count
    return changed


def without_predicted_layers(config: dict) -> dict:
    """A configuration that asks for no layers for multi-token prediction."""
    changed = {
        name: without_predicted_layers(value) if isinstance(value, dict) else value for name, value in config.items()
    }
    return changed | ({PREDICTED_LAYERS: 0} if changed.get(PREDICTED_LAYERS) else {})
