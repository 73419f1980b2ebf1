"""The model of the compressed checkpoint, against the stock model with merged experts in place."""

import pytest
import torch
from tiny import (
    LAYERS,
    batch_of,
    compress,
    layer_plan,
    load_tensors,
    logits_of,
    plan_for,
    random_records,
    save_switch,
    with_merged_experts,
)
from transformers import SwitchTransformersForConditionalGeneration

from msmoe.checkpoint import Checkpoint
from msmoe.compression.apply import apply
from msmoe.formats.modeling.configuration_msmoe import MsmoeSwitchConfig
from msmoe.formats.modeling.modeling_msmoe import GroupedSparseMLP, MsmoeSwitchForConditionalGeneration

BATCH = random_records(6, seed=21, longest=16)


def load_exact(path, **options):
    return MsmoeSwitchForConditionalGeneration.from_pretrained(path, **options).eval()


@pytest.fixture(scope="module")
def models(switch, exact):
    """The exact model and its stock counterpart."""
    return load_exact(exact), with_merged_experts(switch, exact)


def close(ours, theirs, tolerance=2e-5):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


def test_logits_equal_those_of_the_stock_model_with_merged_experts(models):
    ours, stock = models
    close(logits_of(ours, BATCH), logits_of(stock, BATCH))


def test_the_loss_equals_that_of_the_stock_model(models):
    with torch.no_grad():
        ours, stock = (model(**batch_of(BATCH)).loss for model in models)
    close(ours, stock)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}])
def test_generation_gives_the_tokens_of_the_stock_model(options, models):
    batch = batch_of(BATCH)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    ours, stock = (model.generate(**inputs, max_new_tokens=12, do_sample=False, **options) for model in models)
    assert torch.equal(ours, stock)


def test_cached_decoding_gives_the_tokens_of_uncached_decoding(models):
    batch = batch_of(BATCH)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "max_new_tokens": 12}
    assert torch.equal(models[0].generate(**inputs, use_cache=True), models[0].generate(**inputs, use_cache=False))


@pytest.mark.parametrize("capacity", [1, 2, 5])
def test_tokens_over_capacity_drop_exactly_as_in_the_stock_model(capacity, switch, stats, data, tmp_path):
    source = save_switch(tmp_path / "ckpt", expert_capacity=capacity)
    layers = {name: layer_plan(6, [0, 3, 5], [1, 2, 4]) for name in LAYERS}
    apply(source, plan_for(Checkpoint(source), layers), tmp_path / "out")
    close(
        logits_of(load_exact(tmp_path / "out"), BATCH), logits_of(with_merged_experts(source, tmp_path / "out"), BATCH)
    )


def make_layer(mapping: list[int], *, capacity: int, rows: torch.Tensor) -> GroupedSparseMLP:
    config = MsmoeSwitchConfig(
        d_model=2, d_ff=2, num_experts=len(mapping), expert_capacity=capacity, moe_layers={"layer": max(mapping) + 1}
    )
    layer = GroupedSparseMLP(config, "layer").eval()
    with torch.no_grad():
        layer.expert_map.copy_(torch.tensor(mapping))
        layer.router.classifier.weight.copy_(rows)
        for g in range(max(mapping) + 1):  # group g multiplies positive inputs by g + 1
            layer.experts.wi[g] = torch.eye(2)
            layer.experts.wo[g] = torch.eye(2) * (g + 1)
    return layer


def test_a_token_goes_to_the_group_of_its_expert_at_the_experts_gate_value():
    rows = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    layer = make_layer([0, 0, 1], capacity=9, rows=rows)
    gate = 4 / (4 + 1 + 1)  # softmax of the logits (0, 0, ln 4)
    x = torch.tensor([[[torch.log(torch.tensor(4.0)), 0.5]]])
    torch.testing.assert_close(layer(x), x * 2 * gate)


def test_capacity_counts_per_original_expert_and_sequence_and_a_dropped_token_gives_zero():
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    layer = make_layer([0, 0], capacity=1, rows=rows)  # both experts share one group
    to_first, to_second = [2.0, 0.0], [0.0, 2.0]
    x = torch.tensor([[to_first, to_second, to_first], [to_second, to_second, to_first]])
    gate = float(torch.tensor([2.0, 0.0]).softmax(-1)[0])
    kept = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]])[
        ..., None
    ]  # the third, and the second of the other sequence
    torch.testing.assert_close(layer(x), x * gate * kept)


def test_a_sequence_whose_tokens_all_drop_gives_zero():
    layer = make_layer([0, 0], capacity=0, rows=torch.eye(2))
    assert layer(torch.ones(1, 3, 2)).abs().sum() == 0


def test_gradients_reach_experts_and_router_and_equal_those_of_the_stock_model(models):
    ours, stock = models
    for model in models:
        model.zero_grad()
        model(**batch_of(BATCH)).loss.backward()
    for name in LAYERS:
        mapping = ours.get_buffer(f"{name}.expert_map").tolist()
        for part in ("wi", "wo"):
            grad = ours.get_parameter(f"{name}.experts.{part}").grad
            expected = torch.zeros_like(grad)
            for e, g in enumerate(mapping):
                own = stock.get_parameter(f"{name}.experts.expert_{e}.{part}.weight").grad
                expected[g] += 0 if own is None else own
            assert grad.abs().sum() > 0
            close(grad, expected, 1e-4)
        rows = f"{name}.router.classifier.weight"
        assert ours.get_parameter(rows).grad.abs().sum() > 0
        close(ours.get_parameter(rows).grad, stock.get_parameter(rows).grad, 1e-4)


def test_a_training_step_lowers_the_loss(exact):
    model = load_exact(exact)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = model(**batch_of(BATCH)).loss
    before.backward()
    optimiser.step()
    with torch.no_grad():
        assert model(**batch_of(BATCH)).loss < before


def test_training_mode_gives_every_stored_expert_in_use_a_gradient(exact):
    model = load_exact(exact).train()
    torch.manual_seed(0)
    model(**batch_of(random_records(40, seed=3))).loss.backward()
    for name in LAYERS:
        for part in ("wi", "wo"):
            assert (model.get_parameter(f"{name}.experts.{part}").grad.flatten(1).norm(dim=1) > 0).all()


def test_router_logits_and_router_losses_equal_those_of_the_stock_model(models):
    with torch.no_grad():
        ours, stock = (model(**batch_of(BATCH), output_router_logits=True) for model in models)
    for key in ("encoder_z_loss", "encoder_aux_loss", "decoder_z_loss", "decoder_aux_loss", "loss"):
        close(getattr(ours, key), getattr(stock, key), 1e-4)
    for stack in ("encoder_router_logits", "decoder_router_logits"):
        assert len(getattr(ours, stack)) == 2
        for a, b in zip(getattr(ours, stack), getattr(stock, stack), strict=True):
            close(a, b, 1e-4)


def test_saving_and_loading_gives_the_same_tensors_and_logits(exact, tmp_path):
    model = load_exact(exact)
    model.save_pretrained(tmp_path / "again")
    before, after = load_tensors(exact), load_tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits_of(load_exact(tmp_path / "again"), BATCH), logits_of(model, BATCH))


def test_no_weight_is_missing_or_left_over_on_loading(exact):
    _, info = MsmoeSwitchForConditionalGeneration.from_pretrained(exact, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_half_precision_equals_the_stock_model_in_half_precision(dtype, switch, exact):
    ours, stock = load_exact(exact, dtype=dtype), with_merged_experts(switch, exact, dtype=dtype)
    assert ours.get_parameter(f"{LAYERS[0]}.experts.wi").dtype == dtype
    close(logits_of(ours, BATCH), logits_of(stock, BATCH), 8 * torch.finfo(dtype).eps)


def test_a_model_built_from_its_configuration_has_the_stored_groups(exact):
    config = MsmoeSwitchConfig.from_pretrained(exact)
    model = MsmoeSwitchForConditionalGeneration(config)
    assert {name: len(model.get_parameter(f"{name}.experts.wi")) for name in LAYERS} == config.moe_layers
    assert model.config.num_experts == model.encoder.config.num_experts == 6


def test_padding_does_not_change_the_logits_of_a_record(models):
    alone = logits_of(models[0], BATCH[:1])
    among = logits_of(models[0], BATCH)[:1, : alone.shape[1]]
    close(among, alone, 1e-4)


def test_untied_embeddings_stay_untied(data, tmp_path):
    from tiny import profile_small

    source = save_switch(tmp_path / "ckpt", tie_word_embeddings=False)
    compress(source, profile_small(source, data), tmp_path / "out")
    ours = load_exact(tmp_path / "out")
    assert not torch.equal(ours.lm_head.weight, ours.shared.weight)
    stock = SwitchTransformersForConditionalGeneration.from_pretrained(source)
    assert torch.equal(ours.lm_head.weight, stock.lm_head.weight)
