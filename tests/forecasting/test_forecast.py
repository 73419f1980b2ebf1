"""Forecasts: hand-worked curves and divergences, and the errors of the checkpoints that `apply` writes."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from tiny import LAYERS, batch_of, load_tensors, logits_of, profile_small, random_records, save_switch, write_records

from msmoe.calibration.profile import profile
from msmoe.compression.apply import apply
from msmoe.compression.layer_errors import layer_errors
from msmoe.demo import CALIBRATION, CHECKPOINT
from msmoe.errors import UserError
from msmoe.families.loading import load
from msmoe.forecasting import Forecast, LayerForecast, default_sizes, forecast
from msmoe.forecasting.run import split_records, target_tokens
from msmoe.forecasting.trial import token_divergence
from msmoe.planning.planner import Planner
from msmoe.planning.planner import plan as make_plan

LAYER = LAYERS[1]
METHODS = (
    "m-smoe-refit", "m-smoe", "average", "fisher", "zipit", "repair", "git-re-basin", "mergemoe", "hc-smoe", "ream",
    "frequency", "naee", "mone",
)  # fmt: skip


def curve(errors, *, sizes=None, num_experts=None, kl=None):
    sizes = sizes or tuple(range(1, len(errors) + 1))
    return LayerForecast(num_experts or max(sizes), sizes, tuple(errors), kl)


def made_of(**layers):
    return Forecast("by-hand", layers)


def applied_errors(checkpoint, stats, out, *, size, needs_gradients=False, **choices):
    """Errors of the checkpoint that `apply` writes, from the statistics and on the tokens that a forecast uses."""
    fitted, held_out = split_records(stats, gradients_first=not needs_gradients)
    plan = make_plan(checkpoint, fitted, experts=size, budget="uniform", **choices)
    apply(checkpoint, plan, out, stats=fitted, workers=1)
    layers = {name: replace(layer, sample=held_out[name]) for name, layer in stats.layers.items()}
    found = layer_errors(checkpoint, out, replace(stats, layers=layers), every=True, stable_ranks=False)
    return {name: found[name].error for name in plan.layers}


# ---- what is predicted


@pytest.mark.parametrize("method", METHODS)
def test_the_prediction_is_the_error_of_the_checkpoint_that_apply_writes(method, switch, full_stats, tmp_path):
    made = forecast(switch, full_stats, method=method, sizes=[2, 4])
    for i, size in enumerate((2, 4)):
        needs_gradients = method == "fisher"
        measured = applied_errors(
            switch, full_stats, tmp_path / str(size), size=size, method=method, needs_gradients=needs_gradients
        )
        assert list(made.layers) == list(measured) == list(LAYERS[1:])
        for name, error in measured.items():
            assert made.layers[name].output_error[i] == pytest.approx(error, rel=1e-4)


def test_the_prediction_counts_the_rounding_of_the_stored_experts(data, tmp_path):
    source = save_switch(tmp_path / "ckpt", dtype=torch.bfloat16)
    stats = profile_small(source, data)
    measured = applied_errors(source, stats, tmp_path / "out", size=3, method="m-smoe-refit")
    made = forecast(source, stats, sizes=[3])
    for name, error in measured.items():
        assert made.layers[name].output_error[0] == pytest.approx(error, rel=1e-5)


def test_all_experts_have_no_error_and_every_size_is_forecast(switch, full_stats):
    made = forecast(switch, full_stats, keep_layers=["none"])
    assert list(made.layers) == list(LAYERS)
    for layer in made.layers.values():
        assert (layer.num_experts, layer.sizes) == (6, (1, 2, 3, 4, 5, 6))
        assert (layer.output_error[-1], layer.kl[-1]) == (0, 0)
        assert min(*layer.output_error[:-1], *layer.kl[:-1]) > 0


def test_copies_of_one_expert_have_no_error_at_any_size(data, tmp_path):
    source = save_switch(tmp_path / "ckpt")
    tensors, order = load_tensors(source), torch.randperm(24, generator=torch.Generator().manual_seed(1))
    for e in range(1, 6):  # the same function, with its neurons in another order
        wi, wo = (f"{LAYER}.experts.expert_{{}}.{part}.weight" for part in ("wi", "wo"))
        tensors[wi.format(e)] = tensors[wi.format(0)][order.roll(e)].contiguous()
        tensors[wo.format(e)] = tensors[wo.format(0)][:, order.roll(e)].contiguous()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    made = forecast(source, profile_small(source, data, fisher=64), method="m-smoe")
    assert max(made.layers[LAYER].output_error) < 1e-10
    assert max(made.layers[LAYER].kl) < 1e-10
    assert made.suggest(1e-6)[LAYER] == 1


def test_results_do_not_depend_on_the_number_of_workers(switch, full_stats):
    assert forecast(switch, full_stats, workers=1) == forecast(switch, full_stats, workers=3)


def test_statistics_from_disk_give_the_same_forecast(switch, full_stats, tmp_path):
    full_stats.save(tmp_path / "stats")
    assert forecast(switch, tmp_path / "stats", sizes=[2]) == forecast(switch, full_stats, sizes=[2])


def test_fewer_experts_of_the_demo_have_a_larger_error():
    stats = profile(CHECKPOINT, CALIBRATION, samples=64, fisher=64)
    made = forecast(CHECKPOINT, stats, sizes=[16, 1, 4], tokens=256)
    for layer in made.layers.values():
        assert layer.sizes == (1, 4, 16)
        assert layer.output_error[0] > layer.output_error[1] > layer.output_error[2] == 0
    assert made.whole().kl[0] > made.whole().kl[1] > made.whole().kl[2] == 0


# ---- divergence


def test_hand_worked_divergence():
    gradient = torch.tensor([[1.0, 2.0], [0.0, 1.0], [3.0, 0.0]])
    change = torch.tensor([[2.0, 0.0], [5.0, 1.0], [1.0, 1.0]])
    # g . d = 2, 1, 3; weights 1, 2, 3: (1 * 4 + 2 * 1 + 3 * 9) / 6 / 2 = 2.75 per token; 12 tokens, 4 targets
    found = token_divergence(gradient, change, torch.tensor([1.0, 2.0, 3.0]).double(), num_tokens=12, num_targets=4)
    assert found == pytest.approx(2.75 * 12 / 4)
    assert math.isnan(token_divergence(gradient[:0], change[:0], torch.zeros(0).double(), num_tokens=12, num_targets=4))


def test_the_divergence_of_a_linear_output_is_that_of_its_fisher_information_and_of_the_softmax():
    """Logits W y of one target token: labels of probability p have gradients W^T (e_label - p)."""
    generator = torch.Generator().manual_seed(0)
    weight, y = torch.randn(5, 3, generator=generator).double(), torch.randn(3, generator=generator).double()
    change = 0.02 * torch.randn(3, generator=generator).double()
    p, moved = (weight @ y).softmax(0), (weight @ (y + change)).softmax(0)
    gradients = (torch.eye(5).double() - p) @ weight
    found = token_divergence(gradients, change.expand(5, 3), p, num_tokens=1, num_targets=1)
    fisher = weight.T @ (p.diag() - p[:, None] * p) @ weight
    assert found == pytest.approx(float(change @ fisher @ change) / 2, rel=1e-9)
    assert found == pytest.approx(float(p @ (p / moved).log()), rel=0.05)


def test_the_predicted_divergence_is_near_that_of_the_model_with_one_layer_compressed(tmp_path):
    """Experts that differ little, in the last layer: the change is small, and no router follows that could flip."""
    source, layer, records = save_switch(tmp_path / "ckpt"), LAYERS[3], random_records(200)
    tensors = load_tensors(source)
    for e in range(1, 6):
        for part in ("wi", "wo"):
            first, key = (f"{layer}.experts.expert_{i}.{part}.weight" for i in (0, e))
            tensors[key] = tensors[first] + 0.1 * tensors[key]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    stats = profile_small(source, write_records(tmp_path / "data.jsonl", records), samples=200, fisher=200)
    predicted = forecast(source, stats, method="m-smoe", sizes=[1], keep_layers=list(LAYERS[:3])).layers[layer].kl
    plan = make_plan(source, stats, method="m-smoe", experts=1, keep_layers=list(LAYERS[:3]))
    apply(source, plan, tmp_path / "out", stats=stats, workers=1)
    targets = batch_of(records)["labels"] != -100
    before, after = (logits_of(load(p), records)[targets].log_softmax(-1) for p in (source, tmp_path / "out"))
    measured = float((before.exp() * (before - after)).sum(-1).mean())
    assert predicted == pytest.approx((measured,), rel=0.25)


@pytest.mark.parametrize("stack", ["", "encoder", "decoder"])
def test_target_tokens_are_those_of_the_labels_in_whichever_stack_the_layers_are(stack, tmp_path):
    records = random_records(20)
    sparse = {f"{stack}_sparse_step": 0, f"num_sparse_{stack}_layers": 0} if stack else {}  # none in this stack
    source = save_switch(tmp_path / "ckpt", **sparse)
    stats = profile_small(source, write_records(tmp_path / "data.jsonl", records))
    found = target_tokens(Planner(source, stats), stats)
    assert found == sum(len(r["labels"]) for r in records) != sum(len(r["input_ids"]) for r in records)


def test_without_output_gradients_no_divergence_is_predicted(switch, stats):
    made = forecast(switch, stats, sizes=[2])
    assert made.layers[LAYER].kl is None
    assert made.whole().kl is None
    assert made.to_frame()["kl"].isna().all()


# ---- records held out


def test_held_out_records_are_not_in_the_statistics_that_layers_are_compressed_with(full_stats):
    fitted, held_out = split_records(full_stats, gradients_first=True)
    chosen = {record for sample in held_out.values() for record in sample.record.tolist()}
    assert len(chosen) == 40 // 4
    for name, layer in full_stats.layers.items():
        rest = fitted.layers[name].tokens()
        assert 0.3 < rest.held_out.double().mean() < 0.7  # a refit still finds tokens on either side
        assert not chosen & set(rest.record.tolist())
        assert len(rest) + len(held_out[name]) == len(layer.tokens())


def test_records_with_gradients_are_held_out_first_unless_the_method_needs_them(switch, data):
    stats = profile_small(switch, data, fisher=8)
    known = lambda gradients_first: sum(
        int(sample.has_gradient.sum()) for sample in split_records(stats, gradients_first=gradients_first)[1].values()
    )
    everything = sum(int(layer.tokens().has_gradient.sum()) for layer in stats.layers.values())
    assert known(True) == everything
    assert known(False) < everything


# ---- reading the curves


def test_hand_worked_suggestions():
    made = made_of(
        smooth=curve([0.9, 0.4, 0.1, 0.0]),
        bumpy=curve([0.05, 0.3, 0.1, 0.0]),  # within the tolerance at 1, but not from there on
        steep=curve([0.9, 0.8, 0.7], sizes=(1, 2, 3), num_experts=4),
        unknown=curve([math.nan] * 4),
    )
    assert made.suggest(0.1) == {"smooth": 3, "bumpy": 3, "steep": 4, "unknown": 4}
    assert made.suggest(0.75) == {"smooth": 2, "bumpy": 1, "steep": 3, "unknown": 4}
    assert made.suggest(0)["smooth"] == 4


@pytest.mark.parametrize("tolerance", [-0.1, math.nan])
def test_a_tolerance_is_not_negative(tolerance):
    with pytest.raises(UserError, match=f"tolerance must be at least 0, got {tolerance}"):
        made_of(layer=curve([1.0, 0.0])).suggest(tolerance)


@pytest.mark.parametrize(
    ("errors", "sizes", "expected"),
    [
        # chord 1, .8, .6, .4, .2, 0; below it by 0, .3, .4, .3, .15, 0
        ([1.0, 0.5, 0.2, 0.1, 0.05, 0.0], None, 3),
        # chord at sizes 1, 2, 4, 8: 7/7, 6/7, 4/7, 0; below it by 0, .057, .471, 0
        ([1.0, 0.8, 0.1, 0.0], (1, 2, 4, 8), 4),
        ([1.0, 0.75, 0.5, 0.25, 0.0], None, None),  # straight
        ([1.0, 0.95, 0.85, 0.6, 0.0], None, None),  # bends the other way
        ([1e-8, 0.0, 0.0, 0.0], None, None),  # flat
        ([math.nan] * 4, None, None),
        ([1.0, 0.0], None, None),  # two points are a straight line
    ],
)
def test_hand_worked_cliffs(errors, sizes, expected):
    assert made_of(layer=curve(errors, sizes=sizes)).cliff("layer") == expected


def test_the_cliff_of_an_unknown_layer_lists_the_layers():
    with pytest.raises(UserError, match="unknown layer 'layr' - did you mean 'layer'"):
        made_of(layer=curve([1.0, 0.0])).cliff("layr")


def test_the_whole_model_adds_divergences_and_averages_errors():
    made = made_of(
        a=curve([0.8, 0.0], kl=(0.3, 0.0)),
        b=curve([0.4, 0.0], kl=(0.1, 0.0)),
        c=curve([math.nan] * 2, kl=(math.nan,) * 2),
    )
    whole = made.whole()
    assert whole.sizes == (1, 2)
    assert whole.output_error == pytest.approx((0.6, 0.0))
    assert whole.kl == pytest.approx((0.4, 0.0))


def test_the_frame_has_a_row_for_every_layer_and_size():
    frame = made_of(a=curve([0.8, 0.1], sizes=(1, 3), num_experts=4, kl=(0.3, 0.2)), b=curve([0.5])).to_frame()
    assert frame.columns.tolist() == ["layer", "num_experts", "experts", "output_error", "kl"]
    assert frame.values.tolist()[:2] == [["a", 4, 1, 0.8, 0.3], ["a", 4, 3, 0.1, 0.2]]
    assert frame["layer"].tolist() == ["a", "a", "b"]


@pytest.mark.parametrize(
    ("num_experts", "sizes"),
    [
        (6, [1, 2, 3, 4, 5, 6]),
        (16, list(range(1, 17))),
        (40, [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40]),
        (256, [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]),
    ],
)
def test_default_sizes(num_experts, sizes):
    assert default_sizes(num_experts) == sizes


# ---- what cannot be forecast


def test_missing_statistics_name_the_flag_that_collects_them(switch, stats):
    with pytest.raises(UserError, match=r"method fisher needs output gradients.*--fisher 64"):
        forecast(switch, stats, method="fisher")


def test_too_few_records_name_the_flag_for_more(switch, data):
    with pytest.raises(UserError, match=r"tokens of 3 records .* --samples"):
        forecast(switch, profile_small(switch, data, samples=3))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"method": "dense"}, "method dense keeps one of a layer's experts"),
        ({"method": "mc-smoe"}, "method mc-smoe also factorises"),
        ({"method": "m-smo"}, "did you mean 'm-smoe'"),
        ({"sizes": [2, 7]}, "between 1 and 6, got 7"),
        ({"sizes": [0]}, "between 1 and 6, got 0"),
        ({"sizes": [2.5]}, "between 1 and 6, got 2.5"),
        ({"sizes": []}, "sizes is empty"),
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
        ({"keep_layers": list(LAYERS)}, "nothing to compress"),
    ],
)
def test_what_cannot_be_forecast_is_refused(choices, message, switch, stats):
    with pytest.raises(UserError, match=message):
        forecast(switch, stats, **choices)


def test_statistics_of_another_checkpoint_are_refused(stats, tmp_path):
    with pytest.raises(UserError, match="statistics are of another checkpoint"):
        forecast(save_switch(tmp_path / "other", seed=1), stats)
