"""The MoE blocks of a model: experts, router, and every tensor with an entry per expert; structure only.

Shapes: E experts, F d_ff, D d_model.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from msmoe.errors import UserError
from msmoe.families.axes import Axis, count_fields, expert_axes, with_count
from msmoe.families.skeletons import parse_config, skeleton
from msmoe.families.special import EXPERT_NUMBERS, Calls, Held, special_of

if TYPE_CHECKING:
    from torch import nn

    from msmoe.layer.expert import Activation

TOP_K_FIELD = re.compile(r"top_k|moe_topk|moe_k|moe_top_k|num_experts_per_tok(en)?|top_k_experts")
COUNT_ATTRIBUTES = ("num_experts", "num_routed_experts", "num_local_experts")
PROBES = (-1000.0, -20.0, -3.0, -0.5, 0.25, 1.0, 7.0, 40.0, 1000.0)


@dataclass(frozen=True)
class HeldParameter:
    """A parameter of an experts module: what it holds of every expert."""

    name: str
    shape: tuple[int, ...]
    axis: Axis
    held: Held


@dataclass(frozen=True)
class Block:
    """One MoE block of a model.

    Attributes:
        name: its path; experts: path of the module that holds the experts.
        num_groups: groups among which a group-limited router chooses first, each with as many experts.
        parameters: of the experts.
        per_expert: every other tensor with an entry per expert -> its axis: router, biases, selection biases, scales.
        numbers: tensors that hold numbers of experts as values.
        router: the router's weight (E, D'), or "".
        normed: whether a norm follows each expert.
    """

    name: str
    experts: str
    num_experts: int
    top_k: int
    num_groups: int
    parameters: tuple[HeldParameter, ...]
    per_expert: dict[str, Axis] = field(hash=False)
    numbers: tuple[str, ...]
    router: str
    normed: bool
    activation: Activation
    special: Calls

    @property
    def why_no_router(self) -> str:
        """Why its router cannot be asked about tokens alone; "" where it can."""
        if self.numbers:
            return "it looks experts up by token number"
        return self.special.why_no_router or ("" if self.router else "no one matrix makes its scores")

    @property
    def why_unseen(self) -> str:
        """Why the outputs of its experts cannot be recorded; "" where they can."""
        seen = not self.special.hears_router or (self.special.repeats and self.top_k == 1)
        return "" if seen else "its experts are not called with choices"


def blocks_of(config: dict, place: str = "config.json") -> tuple[Block, ...]:
    """MoE blocks of the model that a configuration describes, in the order of its modules.

    Raises:
        UserError: for a model without MoE block, or with blocks of different counts.
    """
    model = skeleton(config, place)
    special = special_of(model)
    found = {name: module for name, module in model.named_modules() if special.is_experts(module)}
    if not found:
        raise UserError(f"{place} describes no Mixture-of-Experts model: {type(model).__name__} has no experts")
    counts = {name: count_of(module) for name, module in found.items()}
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{name} {count}" for name, count in list(counts.items())[:3])
        raise UserError(f"{place}: blocks with different numbers of experts are not supported ({shown})")
    num_experts = next(iter(counts.values()))
    fields = fields_of(config, place)
    larger = skeleton(with_count(config, fields, 2 * num_experts), place)
    axes = expert_axes(model, larger, num_experts, 2 * num_experts)
    names = sorted({special.block(name) for name in found}, key=len, reverse=True)
    mine: dict[str, dict[str, Axis]] = {name: {} for name in names}
    for tensor, axis in axes.items():
        home = next((name for name in names if tensor.startswith(name + ".")), None)
        if home is None:
            raise UserError(f"{place}: {tensor} has entries per expert, but lies in no MoE block")
        mine[home][tensor] = axis
    return tuple(read_block(model, name, special, num_experts, mine[special.block(name)]) for name in found)


def read_block(model: nn.Module, experts: str, special: Calls, num_experts: int, axes: dict[str, Axis]) -> Block:
    """The block around an experts module."""
    name, module = special.block(experts), model.get_submodule(experts)
    state = {n: tuple(t.shape) for n, t in model.get_submodule(name).state_dict(prefix=name + ".").items()}
    parameters = tuple(
        HeldParameter(f"{experts}.{key}", state[f"{experts}.{key}"], axes[f"{experts}.{key}"], held)
        for key, held in special.held(module).items()
        if f"{experts}.{key}" in axes
    )
    held = {parameter.name for parameter in parameters}
    per_expert = {tensor: axis for tensor, axis in axes.items() if tensor not in held}
    routers = [n for n, axis in per_expert.items() if len(state[n]) == 2 and axis.dim == 0 and axis.block == 1]
    home = model.get_submodule(name)
    num_inputs = sum(role in ("gate", "up") for parameter in parameters for role in parameter.held.roles)
    return Block(
        name, experts, num_experts, top_k_of(home), groups_of(home), parameters, per_expert,
        numbers=tuple(n for n in state if n.endswith(EXPERT_NUMBERS)),
        router=routers[0] if len(routers) == 1 else "",
        normed=bool(getattr(module, "has_post_expert_norm", False)),
        activation=activation_of(module, special, num_inputs),
        special=special,
    )  # fmt: skip


def fields_of(config: dict, place: str) -> list[tuple[str, ...]]:
    """Fields that hold the number of experts: those of the file, else the one that its class adds by default."""
    found = count_fields(config)
    if not found:
        found = count_fields(parse_config(config, place).to_dict())
    if not found:
        raise UserError(f"{place} has no field that counts experts")
    return found


def count_of(module: nn.Module) -> int:
    """Number of experts of an experts module."""
    for owner in (module, getattr(module, "router", None)):
        for name in COUNT_ATTRIBUTES:
            if isinstance(getattr(owner, name, None), int):
                return getattr(owner, name)
    raise UserError(f"{type(module).__name__} does not say how many experts it has")


def top_k_of(block: nn.Module) -> int:
    """Experts that each token goes to, from what the modules of a block say, else from their configuration."""
    owners = list(block.modules())
    for owner in (*owners, *(m.config for m in owners if hasattr(m, "config"))):
        content = owner.to_dict() if hasattr(owner, "to_dict") else vars(owner)
        for name, value in content.items():
            if TOP_K_FIELD.fullmatch(name) and type(value) is int:
                return value
    raise UserError(f"{type(block).__name__} does not say how many experts a token goes to")


def groups_of(block: nn.Module) -> int:
    """Groups of experts of a group-limited router; 1 for any other."""
    found = (getattr(m, name, None) for m in block.modules() for name in ("num_group", "n_group", "num_expert_group"))
    return max((n for n in found if type(n) is int), default=1)


def activation_of(experts: nn.Module, special: Calls, num_inputs: int) -> Activation:
    """The hidden activation of an experts module, as a function of the pre-activations of its input matrices."""
    from msmoe.layer.expert import Activation

    gate = getattr(experts, "_apply_gate", None)
    own = gate is not None and gate.__func__.__module__ != "transformers.integrations.moe"
    function = next(
        (getattr(experts, n) for n in ("act_fn", "activation", "activation_fn") if hasattr(experts, n)), None
    )
    name = (type(experts).__name__ if own else getattr(function, "__name__", type(function).__name__)).lower()
    apply: Callable = lambda *pre: special.activate(experts, *pre)
    return Activation(name, apply, scales="up" if is_homogeneous(apply, num_inputs) else "")


def is_homogeneous(apply: Callable, num_inputs: int) -> bool:
    """Whether twice the `up` pre-activation, the last one, gives twice the hidden activation."""
    import torch

    up = torch.tensor(PROBES).repeat(len(PROBES), 1)
    before = [up.T] if num_inputs > 1 else []
    try:
        return torch.equal(apply(*before, 2 * up), 2 * apply(*before, up))
    except ValueError:
        return False
