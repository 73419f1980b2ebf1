"""Switch Transformer with merged experts: E router rows, G <= E stored experts, and a map between them.

The matrices of an MoE layer's experts are dense, or low rank plus a few rows. In the place of experts there may be
constant outputs.

Self-contained: this file and the configuration travel with the checkpoint and need torch and transformers only.

Shapes: B batch, S sequence, T tokens, E router rows, G groups, C constants, D d_model, F d_ff, R rank, K kept rows,
O outputs and I inputs of a matrix.
"""

import copy
import math

import torch
from torch import nn
from transformers import SwitchTransformersForConditionalGeneration, SwitchTransformersModel
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

from .configuration_msmoe import MsmoeSwitchConfig


class FactorizedWeight(nn.Module):
    """G matrices (O, I) as low rank plus kept rows: U (G, O, R), V (G, R, I), S (G, K, I) with row indices (G, K)."""

    rows: torch.Tensor  # (G, K) int32

    def __init__(self, num_groups: int, num_outputs: int, num_inputs: int, rank: int, num_rows: int, std: float):
        super().__init__()
        self.U = nn.Parameter(torch.empty(num_groups, num_outputs, rank))
        self.V = nn.Parameter(torch.empty(num_groups, rank, num_inputs))
        self.S = nn.Parameter(torch.empty(num_groups, num_rows, num_inputs))
        self.register_buffer("rows", torch.arange(num_rows, dtype=torch.int32).repeat(num_groups, 1))
        for part in (self.U, self.V, self.S):
            nn.init.normal_(part, std=std)

    def linear(self, hidden_states: torch.Tensor, group: int) -> torch.Tensor:
        """Multiply tokens (T, I) by the transpose of one matrix: two thin products, and the kept rows added."""
        columns = hidden_states.mT  # a row of the result is contiguous this way round
        outputs = self.U[group] @ (self.V[group] @ columns)
        if self.S.shape[1]:
            outputs = outputs.index_add(0, self.rows[group], self.S[group] @ columns)
        return outputs.mT


class GroupedExperts(nn.Module):
    """G feed-forward experts as stacked tensors wi (G, F, D) and wo (G, D, F), either of them possibly factorised.

    After them come C constants (C, D): experts that give the same output to every token.
    """

    def __init__(self, config: MsmoeSwitchConfig, num_groups: int, factors: dict | None = None, num_constants: int = 0):
        super().__init__()
        self.num_groups = num_groups
        if num_constants:
            self.constants = nn.Parameter(torch.zeros(num_constants, config.d_model))
        for name, num_outputs, num_inputs in (("wi", config.d_ff, config.d_model), ("wo", config.d_model, config.d_ff)):
            std = config.initializer_factor * num_inputs**-0.5
            if factors and name in factors:
                rank, num_rows = factors[name]
                setattr(self, name, FactorizedWeight(num_groups, num_outputs, num_inputs, rank, num_rows, std))
            else:
                setattr(self, name, nn.Parameter(torch.empty(num_groups, num_outputs, num_inputs)))
                nn.init.normal_(getattr(self, name), std=std)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, hidden_states: torch.Tensor, group_sizes: list[int]) -> torch.Tensor:
        """Apply expert g, or give constant g - G, to the next `group_sizes[g]` rows of `hidden_states` (T, D)."""
        outputs = [
            self._expert(rows, g) if g < self.num_groups else self.constants[g - self.num_groups].expand_as(rows)
            for g, rows in enumerate(hidden_states.split(group_sizes))
            if len(rows)
        ]
        return torch.cat(outputs) if len(outputs) != 1 else outputs[0]

    def _expert(self, rows: torch.Tensor, group: int) -> torch.Tensor:
        hidden = self.dropout(grouped_linear(self.wi, rows, group).relu())
        return grouped_linear(self.wo, hidden, group)


def grouped_linear(weight: torch.Tensor | nn.Module, hidden_states: torch.Tensor, group: int) -> torch.Tensor:
    """Tokens (T, I) times the transpose of matrix `group` of a stack."""
    if isinstance(weight, FactorizedWeight):
        return weight.linear(hidden_states, group)
    assert isinstance(weight, torch.Tensor)
    return nn.functional.linear(hidden_states, weight[group])


class GroupedSparseMLP(nn.Module):
    """The stock sparse layer's function, with the tokens of a group gathered once.

    A token goes to the group of the router row that it chooses, at that row's gate value: with all rows in place those
    of the original expert. Capacity is counted per row, and a token over capacity contributes zero.
    """

    expert_map: torch.Tensor  # (E,) int64

    def __init__(self, config: MsmoeSwitchConfig, name: str):
        super().__init__()
        num_groups = (config.moe_layers or {})[name]
        num_constants = (config.constants or {}).get(name, 0)
        num_rows = (config.router_rows or {}).get(name, config.num_experts)
        router_config = copy.copy(config)
        router_config.num_experts = num_rows
        router_config.expert_capacity = math.ceil(config.expert_capacity * config.num_experts / num_rows)
        self.router = SwitchTransformersTop1Router(router_config)
        self.experts = GroupedExperts(config, num_groups, (config.factors or {}).get(name), num_constants)
        self.num_groups = num_groups + num_constants
        self.register_buffer("expert_map", torch.arange(num_rows) % num_groups)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dispatch, gate, _ = self.router(hidden_states)
        num_groups = self.num_groups
        flat, gate = hidden_states.reshape(-1, hidden_states.shape[-1]), gate.reshape(-1, 1)
        group = torch.where(dispatch.any(-1), self.expert_map[dispatch.argmax(-1)], num_groups).flatten()
        *sizes, num_dropped = torch.bincount(group, minlength=num_groups + 1).tolist()
        if len(group) in sizes:  # one group has every token: nothing to sort
            return (self.experts(flat, sizes) * gate).view_as(hidden_states)
        order = group.argsort(stable=True)[: len(group) - num_dropped]
        if not len(order):
            return hidden_states * 0.0
        outputs = self.experts(flat[order], sizes) * gate[order]
        return torch.zeros_like(flat).index_copy(0, order, outputs.to(flat.dtype)).view_as(hidden_states)


class MsmoeSwitchForConditionalGeneration(SwitchTransformersForConditionalGeneration):
    """Switch Transformer whose MoE layers hold merged experts."""

    config_class = MsmoeSwitchConfig

    def __init__(self, config: MsmoeSwitchConfig):
        super().__init__(skeleton_config(config))
        use_grouped_layers(self, config)

    def _unpack_router_logits(self, router_outputs):
        """Stack the layers' logits; an expert that a router has lost is one that it never chooses."""
        widest = max(logits.shape[-1] for logits in router_outputs)
        padded = [
            nn.functional.pad(logits, (0, widest - logits.shape[-1]), value=float("-inf")) for logits in router_outputs
        ]
        return super()._unpack_router_logits(tuple(padded))


class MsmoeSwitchModel(SwitchTransformersModel):
    """The same without the head."""

    config_class = MsmoeSwitchConfig

    def __init__(self, config: MsmoeSwitchConfig):
        super().__init__(skeleton_config(config))
        use_grouped_layers(self, config)


def skeleton_config(config: MsmoeSwitchConfig) -> MsmoeSwitchConfig:
    """The configuration with one expert per layer: the stock layers that it gives are replaced."""
    skeleton = copy.deepcopy(config)
    skeleton.num_experts = 1
    return skeleton


def use_grouped_layers(model: nn.Module, config: MsmoeSwitchConfig) -> None:
    """Put the grouped layers in the places of the stock ones, and the configuration in that of the skeleton's."""
    model.config = config
    model.encoder.config.num_experts = model.decoder.config.num_experts = config.num_experts
    for name in config.moe_layers or {}:
        block_layer = model.get_submodule(name.rpartition(".")[0])
        block_layer.mlp = GroupedSparseMLP(config, name)
