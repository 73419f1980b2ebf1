"""The weighted average of aligned experts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msmoe.layer.expert import Expert, switch_expert
from msmoe.merge import merge_group

F, D = 10, 6


def random_expert(seed: int) -> Expert:
    generator = torch.Generator().manual_seed(seed)
    return switch_expert(torch.randn(F, D, generator=generator), torch.randn(D, F, generator=generator))


def random_inputs(count: int = 300) -> torch.Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(77))


def order(seed: int) -> torch.Tensor:
    return torch.randperm(F, generator=torch.Generator().manual_seed(seed))


def merge(experts, weights, *, reference: int = 0, **options) -> Expert:
    return merge_group(range(len(experts)), weights, lambda e: experts[e], reference=reference, **options).expert


def test_a_hand_worked_average_without_alignment():
    a = switch_expert(torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0], [8.0]]))
    b = switch_expert(torch.tensor([[5.0, -2.0]]), torch.tensor([[0.0], [4.0]]))
    merged = merge([a, b], [0.75, 0.25], alignment="none")
    assert merged.inputs["wi"].tolist() == [[2.0, 1.0]]  # 0.75 * 1 + 0.25 * 5, 0.75 * 2 - 0.25 * 2
    assert merged.output.tolist() == [[3.0], [7.0]]  # 0.75 * 4 + 0, 0.75 * 8 + 0.25 * 4


@pytest.mark.parametrize("alignment", ["weight", "activation", "none"])
def test_one_member_is_returned_bit_for_bit(alignment):
    expert = random_expert(0)
    merged = merge([expert], [1.0], alignment=alignment, inputs=lambda member: random_inputs())
    assert torch.equal(merged.inputs["wi"], expert.inputs["wi"])
    assert torch.equal(merged.output, expert.output)


def test_one_hot_weights_give_that_member_bit_for_bit():
    experts = [random_expert(s) for s in range(3)]
    assert torch.equal(merge(experts, [0.0, 1.0, 0.0], alignment="none").inputs["wi"], experts[1].inputs["wi"])


@pytest.mark.parametrize("alignment", ["weight", "activation"])
def test_an_expert_merged_with_its_permuted_self_keeps_its_function(alignment):
    expert, x = random_expert(0), random_inputs()
    merged = merge([expert, expert.permuted(order(1))], [0.3, 0.7], alignment=alignment, inputs=lambda member: x)
    torch.testing.assert_close(merged(x), expert(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alignment", ["weight", "activation"])
def test_an_expert_merged_with_its_permuted_and_rescaled_self_keeps_its_function(alignment):
    expert, x, scale = random_expert(0), random_inputs(), torch.logspace(-1, 1, F)
    twin = switch_expert(expert.inputs["wi"] * scale[:, None], expert.output / scale).permuted(order(2))
    merged = merge([expert, twin], [0.5, 0.5], alignment=alignment, canonical=True, inputs=lambda member: x)
    torch.testing.assert_close(merged(x), expert(x), rtol=1e-4, atol=1e-4)


def test_without_alignment_a_permuted_copy_changes_the_function():
    expert, x = random_expert(0), random_inputs()
    merged = merge([expert, expert.permuted(order(1))], [0.5, 0.5], alignment="none")
    assert (merged(x) - expert(x)).norm() > 0.3 * expert(x).norm()


@given(st.permutations(range(4)))
def test_the_order_of_the_members_does_not_matter(shuffled):
    experts, weights = [random_expert(s) for s in range(4)], [0.1, 0.2, 0.3, 0.4]
    load = lambda e: experts[e]
    one = merge_group(range(4), weights, load, reference=2).expert
    other = merge_group(shuffled, [weights[e] for e in shuffled], load, reference=2).expert
    torch.testing.assert_close(one.inputs["wi"], other.inputs["wi"])
    torch.testing.assert_close(one.output, other.output)


def test_entries_lie_between_those_of_the_members():
    experts = [random_expert(s) for s in range(3)]
    merged = merge(experts, [0.2, 0.5, 0.3], alignment="none").inputs["wi"]
    stacked = torch.stack([e.inputs["wi"] for e in experts])
    assert ((merged >= stacked.amin(0) - 1e-6) & (merged <= stacked.amax(0) + 1e-6)).all()


def test_the_reference_need_not_be_a_member():
    experts = [random_expert(0), random_expert(0).permuted(order(1)), random_expert(0).permuted(order(2))]
    merged = merge_group([1, 2], [0.5, 0.5], lambda e: experts[e], reference=0)
    assert sorted(merged.matches) == [1, 2]
    torch.testing.assert_close(merged.expert.inputs["wi"], experts[0].inputs["wi"])


def test_the_reference_keeps_its_order():
    experts = [random_expert(0), random_expert(0).permuted(order(1))]
    torch.testing.assert_close(merge(experts, [0.5, 0.5], reference=1).inputs["wi"], experts[1].inputs["wi"])


def test_the_loaded_experts_are_not_changed():
    experts = [random_expert(0), random_expert(1)]
    before = [(e.inputs["wi"].clone(), e.output.clone()) for e in experts]
    merge(experts, [0.5, 0.5], canonical=True)
    assert all(
        torch.equal(e.inputs["wi"], wi) and torch.equal(e.output, wo)
        for e, (wi, wo) in zip(experts, before, strict=True)
    )


def test_every_expert_is_loaded_once():
    loaded = []

    def load(e):
        loaded.append(e)
        return random_expert(e)

    merge_group([1, 4, 6], [0.2, 0.3, 0.5], load, reference=4)
    assert sorted(loaded) == [1, 4, 6]


def test_members_are_visited_as_they_were_loaded():
    experts, seen = [random_expert(0), random_expert(1)], {}
    merge(experts, [0.5, 0.5], canonical=True, visit=lambda e, expert: seen.__setitem__(e, expert.inputs["wi"]))
    assert all(torch.equal(seen[e], experts[e].inputs["wi"]) for e in (0, 1))
