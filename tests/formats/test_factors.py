"""Factorised experts inside the model: outputs and gradients against dense matrices."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import LAYERS, batch_of, load_tensors, logits_of, random_records, stored_stack, with_merged_experts
from torch import Tensor, nn

from msmoe.families.loading import load
from msmoe.formats.modeling.configuration_msmoe import MsmoeSwitchConfig
from msmoe.formats.modeling.modeling_msmoe import (
    FactorizedWeight,
    GroupedExperts,
    MsmoeSwitchForConditionalGeneration,
)

BATCH = random_records(6, seed=21, longest=16)
G, F, D = 3, 7, 5


def weight_of(rank: int, num_rows: int, *, seed: int = 0) -> FactorizedWeight:
    """G matrices (F, D) whose kept rows are scattered."""
    torch.manual_seed(seed)
    weight = FactorizedWeight(G, F, D, rank, num_rows, 1.0)
    weight.rows.copy_(torch.stack([torch.randperm(F)[:num_rows].sort().values for _ in range(G)]))
    return weight


def dense_of(weight: FactorizedWeight) -> Tensor:
    """U V + S (G, F, D), with the kept rows placed by a one-hot matrix."""
    place = nn.functional.one_hot(weight.rows.long(), weight.U.shape[1]).to(weight.U.dtype)  # (G, K, F)
    return weight.U @ weight.V + place.mT @ weight.S


@pytest.mark.parametrize("num_rows", [0, 1, 4, F])
@pytest.mark.parametrize("rank", [1, 3])
def test_tokens_are_multiplied_by_u_v_plus_s(rank, num_rows):
    weight, x = weight_of(rank, num_rows), torch.randn(11, D)
    for g in range(G):
        torch.testing.assert_close(weight.linear(x, g), x @ dense_of(weight)[g].T, rtol=1e-5, atol=1e-5)


def test_a_hand_worked_product():
    weight = FactorizedWeight(1, 3, 2, 1, 1, 1.0)
    with torch.no_grad():
        weight.U.copy_(torch.tensor([[[1.0], [2.0], [0.0]]]))
        weight.V.copy_(torch.tensor([[[1.0, -1.0]]]))
        weight.S.copy_(torch.tensor([[[10.0, 20.0]]]))
        weight.rows.fill_(2)
    # V x = 3 - 1 = 2, U V x = (2, 4, 0), and row 2 gets 10 * 3 + 20 * 1
    assert weight.linear(torch.tensor([[3.0, 1.0]]), 0).tolist() == [[2, 4, 50]]


@pytest.mark.parametrize("num_rows", [0, 3])
def test_gradients_are_those_of_the_dense_matrix_by_the_chain_rule(num_rows):
    weight, x, wanted = weight_of(2, num_rows), torch.randn(9, D, requires_grad=True), torch.randn(9, F)
    (weight.linear(x, 1) - wanted).square().sum().backward()
    dense = dense_of(weight).detach().requires_grad_()
    y = x.detach().clone().requires_grad_()
    (y @ dense[1].T - wanted).square().sum().backward()
    gradient = dense.grad[1]  # dL/dW: U gets dL/dW V^T, V gets U^T dL/dW, S the kept rows of dL/dW
    torch.testing.assert_close(weight.U.grad[1], gradient @ weight.V[1].T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weight.V.grad[1], weight.U[1].T @ gradient, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)
    if num_rows:
        torch.testing.assert_close(weight.S.grad[1], gradient[weight.rows[1].long()], rtol=1e-4, atol=1e-4)
    assert not any(part.grad[g].any() for part in (weight.U, weight.V) for g in (0, 2))


def grouped(factors: dict, **options) -> GroupedExperts:
    torch.manual_seed(0)
    config = MsmoeSwitchConfig(d_model=D, d_ff=F, num_experts=G, **options)
    return GroupedExperts(config, G, factors).eval()


def by_hand(experts: GroupedExperts, x: Tensor, sizes: list[int]) -> Tensor:
    """One token at a time, through dense matrices."""
    stacks = [w if isinstance(w, Tensor) else dense_of(w) for w in (experts.wi, experts.wo)]
    owner = [g for g, size in enumerate(sizes) for _ in range(size)]
    return torch.stack([stacks[1][g] @ (stacks[0][g] @ token).relu() for token, g in zip(x, owner, strict=True)])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=G, max_size=G).filter(any),
    st.sampled_from([{"wi": [2, 3], "wo": [3, 2]}, {"wi": [1, 0]}, {"wo": [2, 5]}, {}]),
)
def test_groups_of_any_size_go_through_their_own_expert(sizes, factors):
    experts, x = grouped(factors), torch.randn(sum(sizes), D)
    with torch.no_grad():
        torch.testing.assert_close(experts(x, sizes), by_hand(experts, x, sizes), rtol=1e-4, atol=1e-5)


def test_a_group_without_tokens_gets_no_gradient():
    experts = grouped({"wi": [2, 3], "wo": [3, 2]})
    experts(torch.randn(6, D), [4, 0, 2]).square().sum().backward()
    for part in (experts.wi.U, experts.wi.V, experts.wi.S, experts.wo.U, experts.wo.V, experts.wo.S):
        assert part.grad[0].any()
        assert not part.grad[1].any()


def test_dropout_in_training_acts_on_the_hidden_activations():
    experts = grouped({"wi": [2, 3], "wo": [3, 2]}, dropout_rate=0.5)
    x = torch.randn(400, D)
    with torch.no_grad():
        calm = experts(x, [400, 0, 0])
        outputs = torch.stack([experts.train()(x, [400, 0, 0]) for _ in range(200)])
    assert outputs.std(0).max() > 0
    torch.testing.assert_close(outputs.mean(0).mean(0), calm.mean(0), rtol=0, atol=0.05 * float(calm.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_agrees_with_the_dense_product_to_rounding(dtype):
    weight, x = weight_of(3, 4).to(dtype).requires_grad_(False), torch.randn(20, D, dtype=dtype)
    assert weight.rows.dtype == torch.int32
    result = weight.linear(x, 2)
    expected = x.float() @ dense_of(weight.float())[2].T
    assert result.dtype == dtype
    tolerance = 8 * torch.finfo(dtype).eps * float(expected.abs().max())
    torch.testing.assert_close(result.float(), expected, rtol=0, atol=tolerance)


# Whole checkpoints


@pytest.fixture(scope="module")
def stock(switch, factorized):
    """The stock model with the matrices that the factors of `factorized` stand for."""
    return with_merged_experts(switch, factorized)


def close(ours: Tensor, theirs: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_generation_gives_the_tokens_of_the_stock_model(options, factorized, stock):
    batch = batch_of(BATCH)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    ours, theirs = (m.generate(**inputs, max_new_tokens=12, **options) for m in (load(factorized), stock))
    assert torch.equal(ours, theirs)


def test_no_weight_is_missing_or_left_over_on_loading(factorized):
    _, info = MsmoeSwitchForConditionalGeneration.from_pretrained(factorized, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_saving_and_loading_gives_the_same_tensors(factorized, tmp_path):
    load(factorized).save_pretrained(tmp_path / "again")
    before, after = load_tensors(factorized), load_tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(before[n].dtype == after[n].dtype and torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_half_precision_keeps_row_indices_and_computes_the_same(dtype, switch, factorized):
    ours, theirs = load(factorized, dtype=dtype), with_merged_experts(switch, factorized, dtype=dtype)
    weight = ours.get_submodule(f"{LAYERS[1]}.experts").wi
    assert (weight.U.dtype, weight.rows.dtype) == (dtype, torch.int32)
    assert torch.equal(weight.rows, load_tensors(factorized)[f"{LAYERS[1]}.experts.wi.rows"])
    close(logits_of(ours, BATCH), logits_of(theirs, BATCH), 16 * torch.finfo(dtype).eps)


def test_gradients_of_a_whole_model_are_those_of_the_stock_model_by_the_chain_rule(factorized, stock):
    ours, tensors = load(factorized), load_tensors(factorized)
    for model in (ours, stock):
        model.zero_grad()
        model(**batch_of(BATCH)).loss.backward()
    for layer in LAYERS[1:]:
        mapping = tensors[f"{layer}.expert_map"].tolist()
        for part in ("wi", "wo"):
            weight = ours.get_submodule(f"{layer}.experts").get_submodule(part)
            dense = torch.zeros_like(stored_stack(tensors, f"{layer}.experts.{part}"))
            for e, g in enumerate(mapping):
                own = stock.get_parameter(f"{layer}.experts.expert_{e}.{part}.weight").grad
                dense[g] += 0 if own is None else own
            rows = weight.rows.long()[..., None].expand_as(weight.S)
            assert dense.any()
            close(weight.U.grad, dense @ weight.V.detach().mT, 1e-4)
            close(weight.V.grad, weight.U.detach().mT @ dense, 1e-4)
            close(weight.S.grad, dense.gather(1, rows), 1e-4)
        router = f"{layer}.router.classifier.weight"
        close(ours.get_parameter(router).grad, stock.get_parameter(router).grad, 1e-4)


def test_training_steps_on_the_factors_alone_lower_the_loss(factorized):
    model = load(factorized)
    model.requires_grad_(False)
    for layer in LAYERS[1:]:
        model.get_submodule(f"{layer}.experts").requires_grad_(True)
    optimiser = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    losses = []
    for _ in range(4):
        loss = model(**batch_of(BATCH)).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


def test_a_model_built_from_its_configuration_has_the_stored_shapes(factorized):
    config = MsmoeSwitchConfig.from_pretrained(factorized)
    model = MsmoeSwitchForConditionalGeneration(config)
    stored = {name: t.shape for name, t in load_tensors(factorized).items()}
    built = {name: t.shape for name, t in model.state_dict().items()}
    assert all(built[name] == shape for name, shape in stored.items())
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_configuration_names_the_shapes_of_the_factorised_matrices(factorized):
    config = json.loads((factorized / "config.json").read_text())
    assert config["factors"] == {layer: {"wi": [4, 2], "wo": [4, 2]} for layer in LAYERS[1:]}
