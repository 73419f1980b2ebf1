"""What compression cost: numbers behind the figures against other ways to the same numbers, and what is missing."""

import json
import shutil
from dataclasses import replace

import pandas as pd
import pytest
import vl_convert
from msmoe.analysis.report.artefacts import gather
from msmoe.analysis.report.charts import to_spec
from msmoe.analysis.report.document import Figure, Note, Table
from msmoe.analysis.report.sections.cost import chapter as cost
from msmoe.analysis.report.sections.cost.data import (
    Cost,
    experts_before,
    gather_costs,
    layer_frame,
    lost_experts,
    mean,
    part_frame,
    rank_seconds,
    step_frame,
)
from safetensors.torch import save_file
from tiny import LAYERS, compress, load_tensors, profile_small, random_records, size_of, write_records

from msmoe.compression.layer_errors import layer_errors, refit_errors
from msmoe.compression.provenance import read_provenance
from msmoe.errors import UserError
from msmoe.families.inspection import LayerSummary

HOSTILE = "<img src=x onerror=alert(1)>\"'\u202eevil"


@pytest.fixture(scope="module")
def removed(switch, stats, tmp_path_factory):
    """Three experts kept, the others removed with their router rows."""
    out = tmp_path_factory.mktemp("removed") / "reap"
    compress(switch, stats, out, method="reap")
    return out


@pytest.fixture(scope="module")
def constant(switch, stats, tmp_path_factory):
    """Mean outputs in place of half of the experts."""
    out = tmp_path_factory.mktemp("constant") / "mone"
    compress(switch, stats, out, method="mone")
    return out


@pytest.fixture(scope="module")
def everything(switch, stats, exact, factorized, native, removed, constant):
    return gather([switch, stats, exact, factorized, native, removed, constant])


def quiet(note: str) -> None:
    pass


def section_of(*items):
    section = cost.section(gather(items), quiet)
    assert section is not None
    return section


def notes_of(section) -> str:
    return "\n".join(block.text for block in section.blocks if isinstance(block, Note))


def names_of(section) -> set[str]:
    return {block.name for block in section.blocks if isinstance(block, Figure | Table)}


def with_provenance(folder, out, **changes):
    """A copy of a checkpoint with other provenance."""
    shutil.copytree(folder, out)
    content = json.loads((out / "msmoe.json").read_text(encoding="utf-8")) | changes
    (out / "msmoe.json").write_text(json.dumps(content), encoding="utf-8")
    return out


# ---- bytes


def test_parts_add_up_to_the_tensors_on_disk(everything, switch, exact, factorized, native, removed, constant):
    costs = gather_costs(everything, quiet)
    frame = part_frame(everything, costs)
    totals = frame.groupby("checkpoint", sort=False)["bytes"].sum().tolist()
    assert totals == [size_of(folder) for folder in (switch, exact, factorized, native, removed, constant)]


def test_steps_lead_from_the_original_to_what_is_stored(everything, switch, exact, factorized):
    steps = step_frame(everything, gather_costs(everything, quiet))
    for index, mine in steps.groupby("index"):
        inner = mine[mine.kind != "total"]
        assert mine.end.iloc[0] + inner.change.sum() == mine.change.iloc[-1]
        assert inner.end.iloc[-1] == mine.end.iloc[-1], f"checkpoint {index} does not end where its total does"


def test_merging_takes_away_the_bytes_of_the_experts_that_are_gone(everything):
    # 6 experts of 2 x 16 x 24 float32 values = 3,072 bytes each in 4 layers; the first is kept, 9 of 18 others stay
    steps = step_frame(everything, gather_costs(everything, quiet))
    first = steps[steps["index"] == "0"].set_index("step")
    assert first.change["fewer experts"] == -9 * 3072
    # one int64 per expert and layer: 4 x 6 x 8 bytes of maps
    assert first.change["routers, maps, others"] == 192
    assert first.kind["routers, maps, others"] == "added"


def test_factors_are_a_step_of_their_own(everything):
    costs = gather_costs(everything, quiet)
    steps = step_frame(everything, costs)
    merged, factors = (steps[steps["index"] == index].set_index("step").change for index in ("0", "1"))
    parts = part_frame(everything, costs)
    sizes = parts[parts.part.isin(["experts", "maps and indices"])].groupby("checkpoint", sort=False)["bytes"].sum()
    # same plan, so the same experts; all the difference between the two checkpoints is in the factors
    assert factors["fewer experts"] == merged["fewer experts"]
    assert factors["experts as factors"] == sizes.iloc[2] - sizes.iloc[1]


def test_mean_outputs_in_place_of_experts_are_added(everything):
    steps = step_frame(everything, gather_costs(everything, quiet))
    mone = steps[steps["index"] == "4"].set_index("step")
    assert mone.change["mean outputs for experts"] == 9 * 16 * 4  # 9 vectors of 16 float32 values


def test_without_the_original_only_its_total_is_known(exact, switch):
    artefacts = gather([exact])
    steps = step_frame(artefacts, gather_costs(artefacts, quiet))
    assert steps.step.tolist() == ["original", "all steps", "stored"]
    assert steps.change.tolist() == [size_of(switch), size_of(exact) - size_of(switch), size_of(exact)]
    assert "Give the original checkpoint too" in notes_of(section_of(exact))


def test_predicted_and_written_bytes_stand_side_by_side(everything, exact):
    table = {t.name: t for t in cost.section(everything, quiet).blocks if isinstance(t, Table)}["cost-checkpoints"]
    first = table.frame.iloc[0]
    assert (first.predicted, first.bytes, first.difference) == (size_of(exact), size_of(exact), 0)
    assert (first.before, first.after) == (24, 15)


# ---- layers and experts


def test_layer_errors_are_those_that_are_measured_by_themselves(everything, switch, stats, removed):
    frame = layer_frame(gather_costs(everything, quiet))
    mine = frame[frame["index"] == "3"].set_index("name")
    expected = layer_errors(switch, removed, stats)
    assert mine.error.to_dict() == {name: found.error for name, found in expected.items()}
    assert mine.stored.tolist()[0] == 6
    assert mine.stored.sum() == 15


def test_refit_errors_are_those_that_apply_prints(exact):
    artefacts = gather([exact])
    frame = layer_frame(gather_costs(artefacts, quiet)).set_index("name")
    expected = refit_errors(read_provenance(artefacts.compressed[0].checkpoint)["groups"])
    assert expected
    for name, errors in expected.items():
        assert (frame.refit_before[name], frame.refit_after[name]) == errors


def test_unknown_values_do_not_enter_a_mean():
    assert mean([1.0, None, 3.0, float("nan")]) == 2.0
    assert pd.isna(mean([None]))


def test_ranks_after_factorising_are_not_known_without_a_measurement(factorized):
    frame = layer_frame(gather_costs(gather([factorized]), quiet)).set_index("name")
    assert pd.isna(frame.wo_after[LAYERS[2]])  # the report inside is of the matrices before


def test_the_experts_that_lost_most_come_first(everything):
    costs = gather_costs(everything, quiet)
    lost = lost_experts(costs, everything.calibration, 2)
    assert lost.error.is_monotonic_decreasing
    assert (lost.groupby("checkpoint").size() <= 2).all()
    mine = lost[lost.checkpoint == costs[3].label]
    every = [e for found in costs[3].errors.values() for e in found.by_expert.tolist() if e == e]
    assert mine.error.tolist() == sorted(every, reverse=True)[:2]


def test_other_statistics_than_those_it_was_made_from_measure_a_checkpoint(switch, stats, exact, tmp_path):
    other = profile_small(switch, write_records(tmp_path / "other.jsonl", random_records(40, seed=7)))
    section = section_of(switch, stats, other, exact)
    errors = gather_costs(gather([switch, stats, other, exact]), quiet)[0].errors
    assert errors[LAYERS[1]].error == layer_errors(switch, exact, other)[LAYERS[1]].error
    assert "computed from the tokens of these very statistics" not in notes_of(section)


def test_errors_on_the_tokens_of_the_refit_carry_a_warning(switch, stats, exact, removed):
    assert "weights of out were computed from the tokens" in notes_of(section_of(switch, stats, exact))
    assert "computed from the tokens" not in notes_of(section_of(switch, stats, removed))


def test_without_statistics_the_note_says_how_to_get_errors(switch, exact):
    section = section_of(switch, exact)
    assert "Give the original checkpoint and its statistics" in notes_of(section)
    assert "cost-refit" in names_of(section)
    assert "cost-layer-errors" not in names_of(section)


def test_a_checkpoint_that_cannot_be_measured_says_why(switch, stats, exact, tmp_path):
    broken = shutil.copytree(exact, tmp_path / "broken")
    tensors = load_tensors(broken)
    tensors[f"{LAYERS[1]}.experts.wi"][0, 0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    section = section_of(switch, stats, broken)
    assert "broken could not be measured: " in notes_of(section)
    assert f"{LAYERS[1]}.experts.wi" in notes_of(section)


def test_stable_ranks_are_not_computed_for_many_experts():
    layer = LayerSummary("a", 256, 256, 64, 128, 0, 0)
    # 2 matrices x 256 experts x 64^3 x 1e-9 s = 0.134 s
    assert rank_seconds([layer]) == pytest.approx(0.1342, abs=1e-4)


# ---- dropped tokens, recovery, labels


def test_dropped_tokens_are_drawn_only_where_they_change(switch, stats, exact, tmp_path):
    rates = {name: {"before": 0.25, "after": 0.25} for name in LAYERS}
    same = with_provenance(exact, tmp_path / "same", drop_rates=rates)
    assert "as many tokens are dropped in every layer" in notes_of(section_of(same))
    assert "cost-dropped" not in names_of(section_of(same))
    rates[LAYERS[1]] = {"before": 0.25, "after": 0.5}
    changed = with_provenance(exact, tmp_path / "changed", drop_rates=rates)
    frame = layer_frame(gather_costs(gather([changed]), quiet)).set_index("name")
    assert (frame.drop_before[LAYERS[1]], frame.drop_after[LAYERS[1]]) == (0.25, 0.5)
    assert "cost-dropped" in names_of(section_of(changed))


def test_a_router_that_lost_rows_has_no_known_drop_rates(removed):
    assert "Dropped tokens after compression are not known for reap" in notes_of(section_of(removed))


def test_recovery_shows_the_validation_loss_before_and_after(exact, tmp_path):
    recovery = {
        "steps": 30, "best_step": 20, "teacher": "sha256:0", "validation_loss": {"before": 4.5, "after": 3.25},
        "num_records": {"train": 90, "validation": 10},
    }  # fmt: skip
    recovered = with_provenance(exact, tmp_path / "recovered", recovery=recovery)
    tables = {block.name: block for block in section_of(recovered).blocks if isinstance(block, Table)}
    row = tables["cost-recovery"].frame.iloc[0]
    assert (row.steps, row.best_step, row.records, row.before, row.after) == (30, 20, 90, 4.5, 3.25)
    assert "cost-recovery" not in names_of(section_of(exact))


def test_output_errors_of_a_trained_checkpoint_are_told_to_say_little(switch, stats, exact, tmp_path):
    recovery = {"steps": 3, "best_step": 2, "teacher": "sha256:0", "validation_loss": {"before": 2.0, "after": 1.0}}
    trained = with_provenance(exact, tmp_path / "trained", recovery=recovery | {"num_records": {"train": 9}})
    assert "trained was trained after compression" in notes_of(section_of(switch, stats, exact, trained))
    assert "was trained after compression" not in notes_of(section_of(switch, stats, exact))


def test_a_native_checkpoint_knows_from_its_plan_what_it_was_made_of(native):
    artefacts = gather([native])
    object.__setattr__(artefacts, "layers", {})  # as if nothing else knew
    assert sum(experts_before(artefacts, artefacts.compressed[0]).values()) == 24


def test_the_lead_names_the_smallest_checkpoint(everything, factorized, native):
    costs = gather_costs(everything, quiet)
    smallest = min(costs, key=lambda item: item.num_bytes)
    lead = cost.lead(costs)
    assert lead.startswith(f"The smallest of 5 checkpoints, {smallest.label},")
    assert f"{smallest.experts[1]} of 24 experts" in lead


def test_no_chapter_without_a_compressed_checkpoint(switch, stats):
    assert cost.section(gather([switch, stats]), quiet) is None


# ---- drawing


@pytest.mark.parametrize("which", ["all", "one", "alone"])
def test_every_figure_can_be_drawn(which, everything, switch, stats, exact):
    section = {
        "all": lambda: cost.section(everything, quiet),
        "one": lambda: section_of(switch, stats, exact),
        "alone": lambda: section_of(exact),
    }[which]()
    for figure in (block for block in section.blocks if isinstance(block, Figure)):
        for chart in (figure.chart, figure.still):
            if chart is not None:
                assert "<svg" in vl_convert.vegalite_to_svg(to_spec(chart, title="Title"))


def test_hostile_labels_stay_data(everything):
    folders = tuple(replace(folder, label=HOSTILE) for folder in everything.compressed)
    artefacts = replace(everything, compressed=folders)
    section = cost.section(artefacts, quiet)
    for figure in (block for block in section.blocks if isinstance(block, Figure)):
        spec = to_spec(figure.chart, title="Title")
        vl_convert.vegalite_to_svg(spec)
        assert HOSTILE not in json.dumps(expressions(spec), ensure_ascii=False)


def expressions(spec: object) -> list[str]:
    """Everything in a specification that Vega evaluates."""
    if isinstance(spec, dict):
        own = [
            v for k, v in spec.items() if k in ("calculate", "filter", "expr", "labelExpr", "test", "name", "update")
        ]
        rest = [v for k, v in spec.items() if k not in ("datasets", "bind", "name")]
        return [*own, *(text for value in rest for text in expressions(value))]
    return [text for value in spec for text in expressions(value)] if isinstance(spec, list) else []


def test_a_cost_without_any_error_has_no_worst_layer(exact):
    [item] = gather_costs(gather([exact]), quiet)
    assert isinstance(item, Cost)
    assert item.worst is None


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("groups", {"a": 1}, "groups must be a list"),
        ("groups", [{"layer": 3, "members": []}], r"groups\[0\].layer must be a text, got 3"),
        (
            "groups",
            [{"layer": "a", "members": [0], "refit": {"error_before": "low"}}],
            r"error_before must be a finite",
        ),
        ("bytes", {"source": "many"}, "bytes.source must be a finite number, got 'many'"),
        ("drop_rates", {"a": 0.5}, "drop_rates.a must be an object, got 0.5"),
        ("recovery", {"validation_loss": 2}, "recovery.validation_loss must be an object, got 2"),
        ("factors", {"matrices": [1]}, r"factors.matrices\[0\] must be an object, got 1"),
    ],
)
def test_a_wrong_field_of_the_provenance_is_named(field, value, message, exact, tmp_path):
    shutil.copytree(exact, tmp_path / "out")
    file = tmp_path / "out" / "msmoe.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(UserError, match=rf"msmoe.json is damaged: .*{message}"):
        gather([tmp_path / "out"])
