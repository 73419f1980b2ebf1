"""How far a checkpoint can go: numbers behind the figures, bounded work, and what predictions are held against."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import vl_convert
from msmoe.analysis.report.artefacts import Comparison, LabelledPlan, gather
from msmoe.analysis.report.charts import short_names, to_spec
from msmoe.analysis.report.document import Figure, Note, Table
from msmoe.analysis.report.sections.forecast import chapter
from msmoe.analysis.report.sections.forecast import data as forecast_data
from msmoe.analysis.report.sections.forecast import section as make_section
from msmoe.analysis.report.sections.forecast.charts import layer_figure, measured_figure
from msmoe.analysis.report.sections.forecast.data import (
    WHOLE,
    choose_scope,
    correlations,
    curve_frame,
    forecast_method,
    make_forecast,
    measured_frame,
    seconds,
    suggested_bytes,
    thinned,
)
from tiny import LAYERS, compress

from msmoe.checkpoint import Checkpoint
from msmoe.compression.apply import apply
from msmoe.demo import CHECKPOINT as DEMO
from msmoe.families import MoELayer
from msmoe.families.inspection import inspect
from msmoe.forecasting import Forecast, LayerForecast, forecast
from msmoe.planning.planner import plan as make_plan

HOSTILE = '<b onclick="x">\u202e\'"'


def quiet(note: str) -> None:
    pass


def notes_of(section) -> str:
    return "\n".join(block.text for block in section.blocks if isinstance(block, Note))


def blocks_by_name(section) -> dict:
    return {block.name: block for block in section.blocks if isinstance(block, Figure | Table)}


def by_hand(*, kl: bool = False) -> Forecast:
    """Two layers of 8 experts; the second does not fall evenly."""
    first = LayerForecast(8, (1, 2, 4, 8), (0.4, 0.2, 0.04, 0.0), (0.04, 0.02, 0.01, 0.0) if kl else None)
    second = LayerForecast(8, (1, 2, 4, 8), (0.3, 0.02, 0.08, 0.0), (0.03, 0.01, 0.02, 0.0) if kl else None)
    return Forecast("m-smoe-refit", {LAYERS[0]: first, LAYERS[1]: second})


def cell(method: str, experts: float, loss: float, *, kept=None, layer_loss=None, steps: int = 0) -> dict:
    tasks = {"a": {"metrics": {"loss": {"value": loss - 0.1}}}, "b": {"metrics": {"loss": {"value": loss + 0.1}}}}
    return {
        "method": method, "experts": experts, "seed": 0, "recover_steps": steps, "kept": kept or {}, "tasks": tasks,
        "layer_loss": layer_loss,
    }  # fmt: skip


def comparison(*cells: dict) -> Comparison:
    return Comparison("measured", {"cells": list(cells)})


@pytest.fixture(scope="module")
def section(switch, full_stats):
    found = make_section(gather([switch, full_stats]), quiet)
    assert found is not None
    return found


# ---- numbers


def test_curves_are_those_of_the_forecast(section, switch, full_stats):
    spec = to_spec(blocks_by_name(section)["forecast-layers"].chart)
    rows = [row for data in spec["datasets"].values() for row in data if "needed" in row]
    expected = forecast(switch, full_stats, workers=1)
    for name, curve in expected.layers.items():
        mine = {row["size"]: row["error"] for row in rows if row["name"] == name}
        assert mine == pytest.approx(dict(zip(curve.sizes, curve.output_error, strict=True)))


def test_the_marks_of_a_tolerance_are_what_the_forecast_suggests():
    frame = curve_frame(by_hand(), short_names(LAYERS[:2]))
    for tolerance in (0.01, 0.05, 0.1, 0.2, 0.5):
        within = frame[frame.needed <= tolerance]
        assert within.groupby("name")["size"].min().to_dict() == by_hand().suggest(tolerance)


def test_the_tolerance_that_a_size_needs_is_the_largest_error_from_there_on():
    frame = curve_frame(by_hand(), short_names(LAYERS[:2]))
    assert frame[frame.name == LAYERS[1]].needed.tolist() == [0.3, 0.08, 0.08, 0.0]


def test_suggested_bytes_are_those_that_apply_writes(switch, stats, tmp_path):
    artefacts = gather([switch, stats])
    plan = make_plan(switch, stats, experts=3, budget="uniform", method="m-smoe-refit")
    apply(switch, plan, tmp_path / "out", stats=stats, workers=1)
    sizes = dict.fromkeys(LAYERS[1:], 3)
    assert suggested_bytes(artefacts.planner, "m-smoe-refit", sizes) == inspect(tmp_path / "out").num_bytes


def test_the_table_names_the_cliff_and_the_suggested_sizes(section, switch, full_stats):
    expected = forecast(switch, full_stats, workers=1)
    for row in blocks_by_name(section)["forecast-sizes"].frame.itertuples():
        assert row.at10 == expected.suggest(0.1)[row.layer]
        assert row.cliff == expected.cliff(row.layer) or np.isnan(row.cliff)


def test_the_model_is_shown_in_nats_with_output_gradients_and_in_errors_without(section, switch, stats):
    assert "nats per target token" in blocks_by_name(section)["forecast-model"].reading
    without = make_section(gather([switch, stats]), quiet)
    assert "Mean over the layers" in blocks_by_name(without)["forecast-model"].reading
    assert "msmoe profile --fisher 64" in notes_of(without)
    assert "--fisher 64" not in notes_of(section)


# ---- what is forecast


def test_the_method_is_that_of_the_plan_if_it_can_be_forecast(switch, stats):
    artefacts = gather([switch, stats])
    planned = make_plan(switch, stats, experts=3, method="reap")
    for method, expected in (
        ("reap", "reap"),
        ("dense", "m-smoe-refit"),
        ("fisher", "m-smoe-refit"),
        (HOSTILE, "m-smoe-refit"),
    ):
        item = LabelledPlan("plan", replace(planned, method=method))
        assert forecast_method(replace(artefacts, plans=(item,)), stats) == expected


def test_the_choices_of_the_plan_are_forecast_with_its_method(switch, stats):
    planned = make_plan(switch, stats, experts=3, method="m-smoe", refit="independent", align="none", budget="uniform")
    artefacts = gather([switch, stats, planned])
    scope = choose_scope(artefacts, artefacts.planner)
    assert scope.method in ("m-smoe:align=none:refit=independent", "m-smoe:refit=independent:align=none")
    found = make_forecast(scope, artefacts.planner, quiet)
    plain = make_forecast(replace(scope, method="m-smoe:align=none"), artefacts.planner, quiet)
    assert found.layers[LAYERS[1]].output_error[2] < plain.layers[LAYERS[1]].output_error[2]


def test_one_expert_per_layer_has_a_forecast_of_one_size(switch, stats):
    scope = choose_scope(gather([switch, stats]), big_planner(2, 1, 24, stats))
    assert scope.sizes == (1,)


def test_layers_that_the_plan_keeps_are_not_forecast(switch, stats):
    planned = make_plan(switch, stats, experts=3, keep_layers=[LAYERS[1], LAYERS[3]])
    artefacts = gather([switch, stats, planned])
    assert choose_scope(artefacts, artefacts.planner).compressible == (LAYERS[0], LAYERS[2])


def test_all_sizes_are_tried_where_the_work_is_small(switch, stats):
    artefacts = gather([switch, stats])
    scope = choose_scope(artefacts, artefacts.planner)
    assert scope.sizes == (1, 2, 3, 4, 5, 6)
    assert scope.layers == LAYERS[1:]


@pytest.mark.parametrize(
    ("num_experts", "count", "sizes"),
    [
        (6, 5, (1, 2, 3, 4, 5)), (16, 4, (1, 2, 4, 8)), (256, 3, (16, 45, 128)), (2, 3, (1,)),
        (64, 6, (1, 2, 6, 13, 32, 48)),
    ],
)  # fmt: skip
def test_fewer_sizes_are_spread_evenly_over_octaves(num_experts, count, sizes):
    assert thinned(num_experts, count) == sizes


def big_planner(num_layers: int, num_experts: int, d_ff: int, stats):
    layers = [
        MoELayer(f"decoder.{i}", num_experts, 64, d_ff, {"wi": "F32", "output": "F32"}) for i in range(num_layers)
    ]
    return SimpleNamespace(layers=layers, stats=stats, compressible=lambda keep: layers)


def test_many_experts_are_bounded_to_a_few_layers_and_sizes(switch, stats):
    scope = choose_scope(gather([switch, stats]), big_planner(24, 256, 128, stats))
    assert scope.layers == ("decoder.0", "decoder.8", "decoder.15", "decoder.23")
    assert scope.sizes == (16, 45, 128, 256)
    # 4 layers x 3 sizes x 256 experts x (0.55 ms + 2.2e-10 s x 128^3)
    work = len(scope.layers) * 3 * seconds("m-smoe-refit", MoELayer("a", 256, 64, 128, {"wi": "F32", "output": "F32"}))
    assert work == pytest.approx(12 * 256 * (5.5e-4 + 2.2e-10 * 128**3))
    assert work < 3.2


def test_what_was_left_out_stands_in_the_reading_aid(switch, stats):
    scope = choose_scope(gather([switch, stats]), big_planner(24, 256, 128, stats))
    assert chapter.bounded(scope) == (
        "Sizes that were tried: 16, 45, 128, 256; layers: 4 of 24, spread over the model; --thorough tries more."
    )


def test_a_thorough_report_forecasts_every_layer_at_every_default_size(switch, stats):
    scope = choose_scope(gather([switch, stats], thorough=True), big_planner(24, 256, 128, stats))
    assert len(scope.layers) == 24
    assert scope.sizes == (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


def test_a_checkpoint_that_takes_too_long_is_not_forecast(switch, stats):
    assert choose_scope(gather([switch, stats]), big_planner(12, 128, 3072, stats)) is None


def test_pruning_is_cheaper_than_merging():
    layer = MoELayer("a", 8, 64, 3072, {"wi": "F32", "output": "F32"})
    assert seconds("reap", layer) == pytest.approx(8 * 5.5e-4)
    assert seconds("m-smoe", layer) > 40


# ---- what was measured


def test_predictions_stand_at_the_sizes_that_the_comparison_kept():
    kept = {LAYERS[0]: 2, LAYERS[1]: 3}
    measured = measured_frame(
        comparison(cell("full", 8, 1.0), cell("m-smoe-refit", 4, 1.5, kept=kept)), by_hand(kl=True)
    )
    row = measured.iloc[0]
    # 0.02 at 2 experts of the first layer; half-way between 0.01 and 0.02 in the second
    assert (row.what, row["size"]) == (WHOLE, 4)
    assert row.predicted == pytest.approx(0.02 + 0.015)
    assert row.measured == pytest.approx(0.5)


def test_without_divergences_the_prediction_is_the_mean_error():
    kept = {LAYERS[0]: 2, LAYERS[1]: 2}
    measured = measured_frame(comparison(cell("full", 8, 1.0), cell("m-smoe-refit", 2, 1.5, kept=kept)), by_hand())
    assert measured.predicted.iloc[0] == pytest.approx((0.2 + 0.02) / 2)


def test_losses_after_recovery_and_of_other_methods_are_left_out():
    kept = {LAYERS[0]: 2, LAYERS[1]: 2}
    cells = [cell("full", 8, 1.0), cell("m-smoe", 2, 1.5, kept=kept), cell("m-smoe-refit", 2, 1.2, kept=kept, steps=10)]
    assert measured_frame(comparison(*cells), by_hand()).empty


def test_layers_compressed_alone_are_points_of_their_own():
    kept = {LAYERS[0]: 4, LAYERS[1]: 2}
    made = cell("m-smoe-refit", 3, 1.5, kept=kept, layer_loss={LAYERS[0]: 0.25, "unknown": 1.0})
    measured = measured_frame(comparison(made), by_hand())
    assert measured.to_dict("records") == [{"what": LAYERS[0], "size": 4, "predicted": 0.04, "measured": 0.25}]


def test_correlations_of_three_points_by_hand():
    # ranks 1, 2, 3 against 1, 3, 2: Spearman 1 - 6 x 2 / (3 x 8) = 0.5
    # deviations -1, 0, 1 against -2, 2, 0: Pearson 2 / sqrt(2 x 8) = 0.5
    frame = measured_frame(comparison(), by_hand()).reindex(range(3))
    frame = frame.assign(predicted=[1.0, 2.0, 3.0], measured=[1.0, 5.0, 3.0])
    assert correlations(frame) == pytest.approx((0.5, 0.5))
    assert correlations(frame.head(2)) is None


def test_correlations_stand_below_the_figure(switch, stats):
    artefacts = gather([switch, stats])
    found = forecast(switch, stats, workers=1)
    cells = [cell("full", 6, 1.0)]
    cells += [cell("m-smoe-refit", n, 2.0 - n / 10, kept=dict.fromkeys(found.layers, n)) for n in (2, 3, 4)]
    blocks = chapter.measured_blocks(replace(artefacts, comparisons=(comparison(*cells),)), found, {})
    assert [type(block) for block in blocks] == [Figure, Note]
    assert "the whole model 1.00 (Spearman)" in blocks[1].text
    assert "over 3 points" in blocks[1].text


def test_the_check_on_the_demo_is_told_with_its_numbers_and_verdict():
    whole = {"m-smoe-refit": {"kl": {"KL": {"spearman": 0.75}, "loss": {"spearman": 0.125}}}}
    checked = {"comparison": {"whole": whole}, "conclusion": ["it is no forecast of the loss"]}
    text = chapter.check_text(checked, "m-smoe-refit")
    assert "KL 0.75, loss 0.12" in text
    assert text.endswith("Of both methods that were checked, together: it is no forecast of the loss.")


def test_the_check_on_the_demo_stands_in_the_report():
    assert forecast_data.CHECK.exists()
    assert "KL divergence 1.00" in chapter.check_text(forecast_data.read_check(), "m-smoe-refit")


def test_a_checkpoint_that_was_not_checked_quotes_no_figures_of_the_demo(section):
    assert "no forecast of this checkpoint was checked" in notes_of(section)
    assert "Spearman" not in notes_of(section)


def test_the_demo_is_known_by_its_weights(switch, tmp_path):
    shutil.copytree(DEMO, tmp_path / "renamed")
    assert chapter.is_demo(Checkpoint(tmp_path / "renamed"))
    assert not chapter.is_demo(Checkpoint(switch))


def test_a_check_that_is_not_installed_or_damaged_is_left_out(tmp_path):
    assert forecast_data.read_check(tmp_path / "missing.json") is None
    (tmp_path / "damaged.json").write_text("{", encoding="utf-8")
    assert forecast_data.read_check(tmp_path / "damaged.json") is None
    assert chapter.check_text({}, "m-smoe") == ""


# ---- what is missing, and drawing


def test_what_is_missing_is_said(switch, stats):
    assert "Give the original checkpoint" in notes_of(make_section(gather([stats]), quiet))
    assert "Give statistics of the checkpoint (msmoe profile)" in notes_of(make_section(gather([switch]), quiet))


def test_no_chapter_without_checkpoint_and_statistics(switch, stats, tmp_path):
    compress(switch, stats, tmp_path / "out")
    assert make_section(gather([tmp_path / "out"]), quiet) is None


def test_every_figure_can_be_drawn(section):
    for figure in (block for block in section.blocks if isinstance(block, Figure)):
        assert "<svg" in vl_convert.vegalite_to_svg(to_spec(figure.chart, title="Title"))


@pytest.mark.parametrize("num_layers", [1, 3, 24])
def test_hostile_names_in_few_and_many_layers_are_data(num_layers):
    curve = by_hand(kl=True).layers[LAYERS[0]]
    found = Forecast("m-smoe-refit", {f"{HOSTILE} {i}.{'x' * 10_000}": curve for i in range(num_layers)})
    frame = curve_frame(found, short_names(list(found.layers)))
    assert (frame.layer.str.len() <= 40).all()
    kept = dict.fromkeys(found.layers, 2)
    cells = [cell("full", 8, 1.0), *(cell("m-smoe-refit", n, 1.5, kept=kept, layer_loss=kept) for n in (2, 3))]
    measured = measured_frame(comparison(*cells), found)
    for figure in (layer_figure(frame, ""), measured_figure(measured, found, name="x", short={})):
        spec = to_spec(figure.chart, title="Title")
        assert "<svg" in vl_convert.vegalite_to_svg(spec)
        assert HOSTILE not in json.dumps([layer.get("transform") for layer in spec["layer"]], ensure_ascii=False)
