"""A family's own router, to be asked about tokens without the model: its block, its experts replaced by a listener.

Shapes: T tokens, K chosen experts of a token, E experts, D d_model, D' inputs of the router's weight.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from msmoe.errors import UserError
from msmoe.families.blocks import Block
from msmoe.families.listening import flat, raw_logits, real_choices
from msmoe.layer.routing import Routing

if TYPE_CHECKING:
    from torch import Tensor


class ModuleRouter:
    """The router of a block, run as the family wrote it, in float32.

    Args:
        block: of the model.
        weights: parameter or buffer of the block -> its values with all rows; of the experts and of what is shared
            beside them nothing is needed.
        build: number of experts -> the model's skeleton with as many.
        rows: that stay, in their order; None for all.
    """

    def __init__(
        self,
        block: Block,
        weights: Mapping[str, Tensor],
        build: Callable[[int], Any],
        *,
        rows: tuple[int, ...] | None = None,
    ):
        self._all, self._weights, self._build, self._rows = block, weights, build, rows
        self.num_experts = block.num_experts if rows is None else len(rows)
        self.top_k = block.top_k
        self._block = replace(block, num_experts=self.num_experts)
        self._asked: Tensor | None = None

    def keeping(self, rows: Sequence[int]) -> ModuleRouter:
        """The router with the rows that stay; its configuration is that of a model with as many experts.

        Raises:
            UserError: for fewer rows than each token is sent to.
        """
        kept = tuple(rows) if self._rows is None else tuple(self._rows[row] for row in rows)
        if len(kept) < self.top_k:
            raise UserError(
                f"{self._block.name} sends each token to {self.top_k} experts: keep at least as many router rows, "
                f"got {len(kept)}"
            )
        return ModuleRouter(self._all, self._weights, self._build, rows=kept)

    @property
    def rows(self) -> Tensor:
        """The rows of the router's weight, float32."""
        chosen = list(range(self._all.num_experts)) if self._rows is None else list(self._rows)
        return self._weights[self._all.router].float()[chosen]

    def with_rows(self, rows: Tensor) -> ModuleRouter:
        weight = self._weights[self._all.router].float().clone()
        weight[list(range(self._all.num_experts)) if self._rows is None else list(self._rows)] = rows
        weights = {**self._weights, self._all.router: weight}
        return ModuleRouter(self._all, weights, self._build, rows=self._rows)

    def equals(self, other: Any) -> bool:
        if not isinstance(other, ModuleRouter) or self.num_experts != other.num_experts:
            return False
        mine, theirs = self.kept_weights, other.kept_weights
        return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)

    @property
    def kept_weights(self) -> dict[str, Tensor]:
        """Tensor of the block -> its values, of the rows that stay."""
        rows = list(range(self._all.num_experts)) if self._rows is None else list(self._rows)
        axes = self._all.per_expert
        return {
            name: axes[name].select(tensor, rows) if name in axes else tensor for name, tensor in self._weights.items()
        }

    def logits(self, inputs: Tensor) -> Tensor:
        """Raw scores (T, E) of what the router's weight sees (T, D')."""
        return raw_logits(inputs, self._owner, self._block)

    def __call__(self, inputs: Tensor) -> Routing:
        """Route tokens, given what the router's weight sees (T, D')."""
        with torch.no_grad():
            experts, weights = self._run(flat(inputs).float())
        experts, real = real_choices(experts.long(), weights, self._block)
        return Routing(experts, weights if real is None else weights * real)

    def _run(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Experts and weights (T, K) as the family computes them."""
        self._asked = inputs
        given = inputs if inputs.shape[1] == self._width else inputs.new_zeros(len(inputs), self._width)
        special = self._block.special
        if special.hears_router:
            choice = special.choice(self._home, (given,), {}, self._home(given))
        elif runs_alone(self._home, self._block):
            try:
                self._home(given[None])
            except _CalledError as called:
                experts = self._home.get_submodule(inside(self._block.experts, self._block.name))
                choice = special.choice(experts, *called.call, None)
            else:
                raise RuntimeError(f"{self._block.name} ran without calling its experts")
        else:
            return chosen_in(self._home(given))
        return choice.experts, choice.weights

    @cached_property
    def _skeleton(self) -> Any:
        return self._build(self.num_experts)

    @property
    def _width(self) -> int:
        """D: what the block is run on."""
        return self._skeleton.config.get_text_config().hidden_size

    @cached_property
    def _home(self) -> nn.Module:
        """The module that is run, with the weights of the rows that stay."""
        path = home_of(self._skeleton, self._all)
        home = copy.deepcopy(self._skeleton.get_submodule(path))
        for name, child in list(home.named_children()):
            if "shared" in name and not any(tensor.startswith(f"{path}.{name}.") for tensor in self._weights):
                setattr(home, name, Zeros(child))
        rows = list(range(self._all.num_experts)) if self._rows is None else list(self._rows)
        for name, tensor in self._weights.items():
            if name.startswith(path + "."):
                axis = self._all.per_expert.get(name)
                place_tensor(
                    home, inside(name, path), tensor.float() if axis is None else axis.select(tensor.float(), rows)
                )
        home.get_submodule(inside(owner_of(self._all), path)).register_forward_pre_hook(self._give)
        if path == self._all.name and not self._all.special.hears_router:
            experts = home.get_submodule(inside(self._all.experts, path))
            experts.register_forward_pre_hook(stop_at_experts, with_kwargs=True)
        return home.eval()

    @property
    def _owner(self) -> nn.Module:
        path = home_of(self._skeleton, self._all)
        return self._home.get_submodule(inside(owner_of(self._all), path))

    def _give(self, module: nn.Module, args: tuple) -> tuple:
        """Hand the router's weight what was asked about, whatever the modules in front of it made of that."""
        assert self._asked is not None
        return (self._asked.reshape(*args[0].shape[:-1], -1), *args[1:])


class _CalledError(Exception):
    """Carries what the experts were called with out of a block."""

    def __init__(self, *call: Any):
        super().__init__()
        self.call = call


class Zeros(nn.Module):
    """Stands in the place of experts that all tokens share: nothing of theirs reaches the routing."""

    def __init__(self, replaced: nn.Module):
        super().__init__()

    def forward(self, hidden_states: Tensor, *others: Any, **more: Any) -> Tensor:
        return torch.zeros_like(hidden_states)


def stop_at_experts(module: nn.Module, args: tuple, kwargs: dict) -> None:
    raise _CalledError(args, kwargs)


def inside(path: str, outer: str) -> str:
    """A module's path within another one."""
    return path.removeprefix(outer).removeprefix(".")


def owner_of(block: Block) -> str:
    """Path of the module that holds the router's weight."""
    return block.router.rpartition(".")[0]


def home_of(model: nn.Module, block: Block) -> str:
    """Path of the module to run: the block, or its router where that is heard, or the block is a whole layer."""
    if block.special.hears_router:
        return f"{block.name}.router"
    if runs_alone(model.get_submodule(block.name), block):
        return block.name
    return f"{block.name}.{inside(block.router, block.name).partition('.')[0]}"


def runs_alone(module: nn.Module, block: Block) -> bool:
    """Whether a module is an MoE block that can be run on hidden states: it has experts, and no attention."""
    path = inside(block.experts, block.name)
    has_experts = any(name == path for name, _ in module.named_modules())
    return has_experts and not any("Attention" in type(m).__name__ for m in module.modules())


def chosen_in(output: Any) -> tuple[Tensor, Tensor]:
    """Experts and weights (T, K) among what a router returns: the one tensor of integers, and that of its shape."""
    (experts,) = (t for t in output if isinstance(t, torch.Tensor) and not t.is_floating_point())
    weights = [t for t in output if isinstance(t, torch.Tensor) and t.is_floating_point() and t.shape == experts.shape]
    return experts, weights[-1]


def place_tensor(module: nn.Module, path: str, tensor: Tensor) -> None:
    """Put values in the place of a parameter or buffer."""
    parent, _, name = path.rpartition(".")
    owner = module.get_submodule(parent)
    is_parameter = isinstance(getattr(owner, name), nn.Parameter)
    setattr(owner, name, nn.Parameter(tensor, requires_grad=False) if is_parameter else nn.Buffer(tensor))
