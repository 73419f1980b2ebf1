"""Axes of experts, fields that count them, and expert numbers in tables, on hand-worked tensors."""

import pytest
import torch
from torch import nn

from msmoe.families.axes import Axis, count_fields, expert_axes, with_count, without_predicted_layers
from msmoe.families.special import DeepseekV4


def test_an_axis_keeps_blocks_in_the_order_asked_for_and_the_others_behind_them():
    tensor = torch.arange(7)  # 3 experts with 2 entries each, and one other
    assert Axis(0, 2, 1).select(tensor, [2, 0]).tolist() == [4, 5, 0, 1, 6]
    assert Axis(1, 2, 1).shape((5, 7), 2) == (5, 5)


def test_axes_are_what_grows_with_the_number_of_experts():
    def model(num_experts):
        module = nn.Module()
        module.router = nn.Linear(4, num_experts + 1, bias=False)
        module.stack = nn.Parameter(torch.zeros(5 * num_experts, 4))
        module.statics = nn.Buffer(torch.zeros(1, num_experts))
        module.norm = nn.Parameter(torch.zeros(4))
        return module

    assert expert_axes(model(3), model(6), 3, 6) == {
        "router.weight": Axis(0, 1, 1), "stack": Axis(0, 5, 0), "statics": Axis(1, 1, 0)
    }  # fmt: skip


def test_a_tensor_that_grows_along_two_axes_is_refused():
    small, large = nn.Linear(3, 3), nn.Linear(6, 6)
    with pytest.raises(ValueError, match=r"weight grows from \[3, 3\] to \[6, 6\]"):
        expert_axes(small, large, 3, 6)


def test_every_field_that_counts_experts_is_changed_at_any_depth():
    config = {"num_experts": 8, "num_local_experts": 8, "text_config": {"n_routed_experts": [8, 8]}, "num_heads": 8}
    fields = count_fields(config)
    assert fields == [("num_experts",), ("num_local_experts",), ("text_config", "n_routed_experts")]
    changed = {"num_experts": 4, "num_local_experts": 4, "text_config": {"n_routed_experts": [4, 4]}, "num_heads": 8}
    assert with_count(config, fields, 4) == changed
    assert with_count({}, [("ffn_config", "moe_num_experts")], 4) == {"ffn_config": {"moe_num_experts": 4}}


def test_a_configuration_without_predicted_layers_says_zero_only_where_it_said_more():
    assert without_predicted_layers({"a": {"num_nextn_predict_layers": 1}}) == {"a": {"num_nextn_predict_layers": 0}}
    assert without_predicted_layers({"num_nextn_predict_layers": 0, "b": 1}) == {"num_nextn_predict_layers": 0, "b": 1}


def test_a_table_names_kept_experts_by_their_new_numbers_and_others_by_the_first_that_is_free():
    # kept 1, 3, 4 become 0, 1, 2; a token of experts (0, 3) keeps 1 and gets 0; one of (0, 2) gets 0 and 1
    table = torch.tensor([[1, 3], [0, 3], [0, 2], [4, 1]])
    assert DeepseekV4().renumbered(table, [1, 3, 4], 5).tolist() == [[0, 1], [0, 1], [0, 1], [2, 0]]
