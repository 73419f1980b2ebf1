"""Switch Transformer with merged experts: E router rows, G <= E stored experts, and a map between them.

Self-contained: this file and the configuration travel with the checkpoint and need torch and transformers only.

Shapes: B batch, S sequence, T tokens, E router rows, G groups, D d_model, F d_ff.
"""

import copy

import torch
from torch import nn
from transformers import SwitchTransformersForConditionalGeneration
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

from .configuration_msmoe import MsmoeSwitchConfig


class GroupedExperts(nn.Module):
    """G feed-forward experts as two stacked tensors: wi (G, F, D), wo (G, D, F)."""

    def __init__(self, config: MsmoeSwitchConfig, num_groups: int):
        super().__init__()
        self.wi = nn.Parameter(torch.empty(num_groups, config.d_ff, config.d_model))
        self.wo = nn.Parameter(torch.empty(num_groups, config.d_model, config.d_ff))
        self.dropout = nn.Dropout(config.dropout_rate)
        nn.init.normal_(self.wi, std=config.initializer_factor * config.d_model**-0.5)
        nn.init.normal_(self.wo, std=config.initializer_factor * config.d_ff**-0.5)

    def forward(self, hidden_states: torch.Tensor, group_sizes: list[int]) -> torch.Tensor:
        """Apply expert g to the next `group_sizes[g]` rows of `hidden_states` (T, D)."""
        outputs = [
            nn.functional.linear(self.dropout(nn.functional.linear(rows, self.wi[g]).relu()), self.wo[g])
            for g, rows in enumerate(hidden_states.split(group_sizes))
            if len(rows)
        ]
        return torch.cat(outputs) if len(outputs) != 1 else outputs[0]


class GroupedSparseMLP(nn.Module):
    """The stock sparse layer's function, with the tokens of a group gathered once.

    A token goes to the group of the original expert that the original router chose, at the original gate value;
    capacity is counted per original expert, and a token over capacity contributes zero.
    """

    expert_map: torch.Tensor  # (E,) int64

    def __init__(self, config: MsmoeSwitchConfig, num_groups: int):
        super().__init__()
        self.router = SwitchTransformersTop1Router(config)
        self.experts = GroupedExperts(config, num_groups)
        self.register_buffer("expert_map", torch.arange(config.num_experts) % num_groups)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dispatch, gate, _ = self.router(hidden_states)
        num_groups = len(self.experts.wi)
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
        skeleton = copy.deepcopy(config)
        skeleton.num_experts = 1  # the stock layers built here are replaced below
        super().__init__(skeleton)
        self.config = config
        self.encoder.config.num_experts = self.decoder.config.num_experts = config.num_experts
        for name, num_groups in (config.moe_layers or {}).items():
            block_layer = self.get_submodule(name.rpartition(".")[0])
            block_layer.mlp = GroupedSparseMLP(config, num_groups)
