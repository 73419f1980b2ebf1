"""What a summary says of results whose answers are chosen by hand, of incomplete ones and of damaged ones."""

import copy
import json
import math
import random
import time

import numpy as np
import pytest
from comparison.synthetic import comparison

from msmoe.comparison.scoring import summarise
from msmoe.comparison.significance import holm, mcnemar
from msmoe.comparison.summary import Measurement, Row, Size, Summary
from msmoe.errors import UserError

SMALL = {"experts": (4,), "recover_steps": (0,), "seeds": (0,), "tasks": ("sms",), "loss_tasks": ()}


def answer(results: dict, method: str, task: str, examples: str | list, *, seed: int | None = None) -> None:
    """Replace what a method answers in all its cells, or those of a seed."""
    for cell in results["cells"]:
        if cell["method"] == method and seed in (None, cell["seed"]):
            cell["tasks"][task]["examples"] = examples
            results["tasks"][task]["num_examples"] = len(examples)


def answers(**methods: str) -> dict:
    """One task, one run of every method, of which `full` is the full model."""
    names = [name for name in methods if name != "full"]
    results = comparison(names, **SMALL, references=[name for name in methods if name == "full"])
    for name, examples in methods.items():
        answer(results, name, "sms", examples)
    return results


def row(summary: Summary, method: str, *, experts: float = 4) -> Row:
    return next(r for r in size(summary, experts).rows if r.method == method)


def size(summary: Summary, experts: float) -> Size:
    return next(s for s in summary.sizes if s.experts == experts)


def measured(summary: Summary, method: str, *, experts: float = 4, steps: int = 0) -> Measurement:
    return row(summary, method, experts=experts).measurements[steps]


def without(results: dict, **fields: object) -> dict:
    """The results without the cells that have these values."""
    kept = [cell for cell in results["cells"] if any(cell[name] != value for name, value in fields.items())]
    return results | {"cells": kept}


def warned(summary: Summary, *words: str) -> bool:
    return any(all(word in warning for word in words) for warning in summary.warnings)


def test_a_score_is_the_share_of_right_answers_averaged_over_seeds():
    results = comparison(["alpha"], **SMALL | {"seeds": (0, 1)})
    answer(results, "alpha", "sms", "1110", seed=0)
    answer(results, "alpha", "sms", "1000", seed=1)
    answer(results, "full", "sms", "1111")
    answer(results, "dense", "sms", "0000")
    score = measured(summarise(results), "alpha").scores["sms"]
    assert (score.value, score.num_examples, score.num_seeds) == (0.5, 4, 2)


def test_an_interval_of_exact_match_ends_at_one():
    results = comparison(["alpha"], **SMALL | {"seeds": (0, 1)}, references=())
    answer(results, "alpha", "sms", "1" * 100, seed=0)
    answer(results, "alpha", "sms", "1" * 80 + "0" * 20, seed=1)
    assert measured(summarise(results), "alpha").scores["sms"].high == 1


def test_a_loss_is_per_token():
    results = comparison(["alpha"], **SMALL | {"loss_tasks": ("text",)}, references=())
    answer(results, "alpha", "text", [[2.0, 1], [9.0, 3]])
    assert measured(summarise(results), "alpha").scores["text"].value == 11 / 4


def test_a_single_run_is_compared_with_the_full_model_by_mcnemar():
    # 10 against 2 discordant examples: 2 x (1 + 12 + 66) / 4096
    summary = summarise(answers(full="1" * 50 + "1" * 10 + "0" * 2, alpha="1" * 50 + "0" * 10 + "1" * 2))
    assert measured(summary, "alpha").scores["sms"].p_full == pytest.approx(158 / 4096)


def test_p_values_are_corrected_over_the_rows_of_the_column():
    texts = {"full": "1" * 60, "alpha": "0" * 6 + "1" * 54, "beta": "0" * 7 + "1" * 53, "gamma": "1" * 59 + "0"}
    outcomes = {name: np.array([c == "1" for c in text]) for name, text in texts.items()}
    expected = holm([mcnemar(outcomes[name], outcomes["full"]) for name in ("alpha", "beta", "gamma")])
    summary = summarise(answers(**texts))
    found = [measured(summary, name).scores["sms"].p_full for name in ("alpha", "beta", "gamma")]
    assert found == pytest.approx(expected)


def test_identical_methods_are_never_significantly_different():
    summary = summarise(answers(full="10" * 50, alpha="10" * 50, beta="10" * 50))
    scores = [measured(summary, name).scores["sms"] for name in ("alpha", "beta")]
    assert [score.marks for score in scores] == ["≈", "≈†"]


def test_clearly_different_methods_have_no_mark():
    summary = summarise(answers(full="1" * 100, alpha="1" * 60 + "0" * 40, beta="0" * 100))
    assert [measured(summary, name).scores["sms"].marks for name in ("alpha", "beta")] == ["", ""]


def test_the_best_method_of_a_column_is_no_reference():
    summary = summarise(answers(full="1" * 100, alpha="1" * 60 + "0" * 40, beta="0" * 100))
    best = {r.method: r.measurements[0].scores["sms"].is_best for r in size(summary, 4).rows}
    assert best == {"full": False, "alpha": True, "beta": False}


def test_the_lowest_loss_is_the_best():
    results = comparison(["alpha", "beta"], **SMALL | {"tasks": (), "loss_tasks": ("text",)}, references=())
    answer(results, "alpha", "text", [[5.0, 1], [5.0, 1]])
    answer(results, "beta", "text", [[4.0, 1], [4.0, 1]])
    assert measured(summarise(results), "beta").scores["text"].is_best


def test_the_full_model_itself_is_compared_with_nothing():
    score = measured(summarise(answers(full="1" * 100, alpha="0" * 100)), "full").scores["sms"]
    assert (score.p_full, score.p_best, score.marks) == (None, None, "")


def test_recovered_methods_are_compared_with_the_full_model_trained_as_long():
    results = comparison(["alpha"], **SMALL | {"recover_steps": (0, 100)})
    trained = copy.deepcopy(next(cell for cell in results["cells"] if cell["method"] == "full"))
    results["cells"].append(trained | {"recover_steps": 100})
    recovered = next(cell for cell in results["cells"] if cell["method"] == "alpha" and cell["recover_steps"] == 100)
    trained["tasks"]["sms"]["examples"] = recovered["tasks"]["sms"]["examples"]
    assert measured(summarise(results), "alpha", steps=100).scores["sms"].p_full == 1.0


def test_recovered_methods_are_compared_with_the_untrained_full_model_where_it_was_not_trained():
    results = comparison(["alpha"], **SMALL | {"recover_steps": (0, 100)})
    full = next(cell for cell in results["cells"] if cell["method"] == "full")
    for cell in results["cells"]:
        cell["tasks"]["sms"]["examples"] = full["tasks"]["sms"]["examples"]
    summary = summarise(results)
    assert measured(summary, "alpha", steps=100).scores["sms"].p_full == 1.0
    assert warned(summary, "full model was not trained for 100 steps")


def test_the_mean_is_over_exact_match_tasks():
    summary = summarise(comparison())
    found = measured(summary, "alpha")
    scores = [found.scores[name].value for name in ("sms_spam", "topic")]
    assert found.mean.value == pytest.approx(np.mean(scores))


def test_the_mean_is_over_losses_where_nothing_else_was_measured():
    summary = summarise(comparison(tasks=(), loss_tasks=("a", "b")))
    found = measured(summary, "alpha")
    assert found.mean.value == pytest.approx(np.mean([score.value for score in found.scores.values()]))
    assert summary.mean_title == "mean loss"


def test_ranks_are_averaged_over_all_tasks_with_ties_shared():
    results = comparison(["alpha", "beta"], **SMALL | {"tasks": ("a", "b")}, references=())
    for method, a, b in (("alpha", "11", "10"), ("beta", "10", "01")):
        answer(results, method, "a", a)
        answer(results, method, "b", b)
    summary = summarise(results)
    # first and shared: (1 + 1.5) / 2; second and shared: (2 + 1.5) / 2
    assert [measured(summary, name).rank for name in ("alpha", "beta")] == [1.25, 1.75]


def test_references_have_no_rank():
    assert measured(summarise(comparison()), "full").rank is None


def test_a_method_without_one_of_the_tasks_has_no_mean_and_no_rank():
    results = comparison(**SMALL | {"tasks": ("sms", "topic")})
    del next(cell for cell in results["cells"] if cell["method"] == "beta")["tasks"]["topic"]
    summary = summarise(results)
    found = measured(summary, "beta")
    assert (found.mean, found.rank, set(found.scores)) == (None, None, {"sms"})
    assert measured(summary, "gamma").rank == 2.0
    assert warned(summary, "not measured: beta at 4 experts, seed 0 on topic")


def test_a_loss_that_is_no_number_counts_as_not_measured():
    results = comparison(**SMALL | {"loss_tasks": ("text",)})
    cell = next(cell for cell in results["cells"] if cell["method"] == "beta")
    cell["tasks"]["text"]["examples"][3][0] = math.nan
    summary = summarise(results)
    assert "text" not in measured(summary, "beta").scores
    assert warned(summary, "beta at 4 experts, seed 0 on text (its loss is no number)")


def test_rows_are_references_then_methods_by_their_mean():
    summary = summarise(comparison(["worst", "good"], skill_step=-1.0, seed_deviation=0.0))
    assert [r.method for r in summary.sizes[0].rows] == ["full", "dense", "good", "worst"]


def test_sizes_go_from_the_largest_to_the_smallest():
    assert [s.experts for s in summarise(comparison(experts=(2, 8, 4))).sizes] == [8, 4, 2]


def test_references_stand_beside_every_size():
    summary = summarise(comparison(experts=(8, 4)))
    assert [row(summary, "dense", experts=e).average_kept for e in (8, 4)] == [1, 1]


def test_columns_with_and_without_training_stand_side_by_side():
    columns = summarise(comparison(tasks=("sms",), loss_tasks=("text",))).columns()
    headings = [column.heading for column in columns]
    assert headings == [
        "mean", "mean @100", "rank", "rank @100", "sms", "sms @100", "text (loss)", "text (loss) @100",
    ]  # fmt: skip


def test_a_cell_shows_its_score_and_marks():
    summary = summarise(answers(full="1" * 8, alpha="1" * 8, beta="1" * 8))
    found = [cell.text for cell in row(summary, "beta").cells(summary.columns())]
    assert found == ["1.000 [1.000, 1.000] ≈†", "1.5", "1.000 ≈†"]


def test_a_cell_without_a_value_is_a_dash():
    summary = summarise(without(comparison(**SMALL | {"recover_steps": (0, 100)}), method="beta", recover_steps=100))
    assert [cell.text for cell in row(summary, "beta").cells(summary.columns(recover_steps=[100]))] == ["-"] * 3


def test_layer_losses_are_averaged_over_seeds():
    results = comparison(["alpha"], **SMALL | {"seeds": (0, 1)})
    for cell, loss in zip(results["cells"], (0.1, 0.3), strict=False):
        cell["layer_loss"] = {"layer": loss}
    assert row(summarise(results), "alpha").layer_loss == pytest.approx({"layer": 0.2})


def test_missing_cells_are_counted_and_named():
    results = without(comparison(), method="beta", experts=4, seed=1, recover_steps=100)
    assert warned(summarise(results), "missing 1 of 24 cells: beta at 4 experts after 100 steps (seed 1)")


def test_a_method_that_never_ran_is_missing():
    results = comparison(**SMALL)
    results["settings"]["methods"].append("delta")
    assert warned(summarise(results), "missing 1 of 4 cells: delta at 4 experts")


def test_a_complete_comparison_of_large_tasks_has_no_warning():
    results = comparison(num_examples=1200, seeds=(0, 1, 2))
    trained = next(cell for cell in results["cells"] if cell["method"] == "full") | {"recover_steps": 100}
    results["cells"].append(trained)
    assert summarise(results).warnings == ()


def test_a_missing_full_model_is_named():
    summary = summarise(comparison(references=()))
    assert warned(summary, "full model was not measured")
    assert measured(summary, "alpha").scores["topic"].p_full is None


def test_one_seed_is_warned_of():
    assert warned(summarise(comparison(seeds=(3,))), "one seed only")
    assert not warned(summarise(comparison(seeds=(0, 1))), "one seed only")


def test_two_seeds_are_warned_of():
    assert warned(summarise(comparison(seeds=(0, 1))), "2 seeds: where they differ")
    assert not warned(summarise(comparison(seeds=(0, 1, 2))), "seeds: where they differ")


def test_with_one_seed_the_marks_are_named_after_checkpoints():
    legend = summarise(comparison(seeds=(0,))).legend[0]
    assert legend.startswith("One seed: marks speak of these checkpoints, not of the methods.")


def test_with_several_seeds_the_marks_are_named_after_methods():
    legend = summarise(comparison(seeds=(0, 1, 2))).legend[0]
    assert "method not significantly different" in legend
    assert "checkpoint" not in legend


def test_a_method_with_one_seed_among_several_is_named_in_the_legend():
    legend = summarise(without(comparison(), method="beta", seed=1)).legend[0]
    assert "Of rows with one seed the marks speak of these checkpoints" in legend


def test_a_row_says_how_many_seeds_it_rests_on():
    rows = {row.method: row for row in summarise(without(comparison(), method="beta", seed=1)).sizes[0].rows}
    assert [rows[name].labels[2] for name in ("full", "alpha", "beta")] == ["1", "2", "1"]


def test_the_original_has_no_seeds_that_could_vary():
    results = comparison(["alpha"], **SMALL | {"seeds": (0, 1)}, references=("full",))
    answer(results, "full", "sms", "1" * 100)
    answer(results, "alpha", "sms", "1" * 85 + "0" * 15, seed=0)
    answer(results, "alpha", "sms", "1" * 85 + "0" * 15, seed=1)
    assert measured(summarise(results), "alpha").scores["sms"].p_full < 0.001


def test_seeds_that_calibrate_on_the_same_records_are_warned_of():
    results = comparison(seeds=(0, 1))
    assert not warned(summarise(results), "2 seeds, but")
    results["calibration"]["sha256"] = ["0", "0"]
    assert warned(summarise(results), "2 seeds, but 1 choice of calibration records")


@pytest.mark.parametrize(("factor", "expected"), [(1.009, 0), (1.02, 1)])
def test_methods_of_one_size_that_differ_by_more_than_a_hundredth_of_their_bytes_are_named(factor, expected):
    results = comparison(experts=(4,)) | {"budgets": {}}
    for cell in results["cells"]:
        cell["bytes"] = round(cell["bytes"] * factor) if cell["method"] == "gamma" else cell["bytes"]
    found = [warning for warning in summarise(results).warnings if "stored bytes differ" in warning]
    assert len(found) == expected
    assert all("4 experts per layer: stored bytes differ by 2.0%" in w and "gamma with 7.14 MB" in w for w in found)


def test_methods_over_the_budget_are_named():
    results = comparison(experts=(4,))
    results["budgets"]["4"] -= 1
    assert warned(summarise(results), "over the budget of 7.00 MB: alpha, beta, gamma")


def test_a_small_task_says_what_it_could_show():
    # half of 100 right: 1.96 x 0.05; beta and the full model disagree on 20 of 100: 2.8016 sqrt(0.2 / 100) = 0.125
    summary = summarise(answers(full="10" * 50, alpha="10" * 40 + "01" * 10))
    (warning,) = [w for w in summary.warnings if "sms is small" in w]
    assert "100 examples" in warning
    half_width = float(warning.split("±")[1][:5])
    assert half_width == pytest.approx(0.098, abs=0.015)
    assert "differ by about 0.125" in warning
    assert "answers 20.0% of them unlike the full model" in warning


def test_a_task_with_certain_answers_is_small_below_two_hundred_examples():
    assert warned(summarise(answers(full="1" * 199, alpha="1" * 199)), "sms is small: 199 examples")
    assert not warned(summarise(answers(full="1" * 200, alpha="1" * 200)), "is small")


def test_a_task_at_which_the_full_model_guesses_is_named():
    results = answers(full="10" * 300, alpha="10" * 300)
    results["tasks"]["sms"]["majority_share"] = 0.5
    assert warned(summarise(results), "sms measures little", "0.500")


def test_the_order_of_the_cells_does_not_matter():
    results = comparison()
    shuffled = results | {"cells": random.Random(0).sample(results["cells"], len(results["cells"]))}
    assert summarise(shuffled) == summarise(results)


def test_a_summary_is_the_same_after_a_round_trip_through_json():
    results = comparison()
    assert summarise(json.loads(json.dumps(results))) == summarise(results)


def test_summarising_changes_nothing_in_the_results():
    results = comparison()
    before = copy.deepcopy(results)
    summarise(results)
    assert results == before


@pytest.mark.parametrize(
    "results",
    [
        comparison(tasks=("only",), loss_tasks=()),
        comparison(tasks=(), loss_tasks=("only",)),
        comparison(["only"], **SMALL),
        comparison(references=(), layer_loss=False),
        without(comparison(), method="beta", experts=4),
        without(comparison(recover_steps=(100,)), seed=1),
        comparison(["perfect"], skill_step=0, num_examples=1),
        comparison([]),
    ],
    ids=["a task", "a loss", "a method", "no references", "a hole", "trained", "an example", "references"],
)
def test_every_number_is_finite_and_inside_its_interval(results):
    summary = summarise(results)
    scores = [
        score
        for s in summary.sizes
        for r in s.rows
        for m in r.measurements.values()
        for score in [*m.scores.values(), *([m.mean] if m.mean else [])]
    ]
    assert scores
    for score in scores:
        assert score.low <= score.value <= score.high
        assert all(0 < p <= 1 for p in (score.p_full, score.p_best) if p is not None)


def test_hundreds_of_cells_take_seconds():
    results = comparison(
        [f"method {i}" for i in range(25)], experts=(8, 4, 2), seeds=(0, 1, 2),
        tasks=tuple("abcdefg"), loss_tasks=("h",), num_examples=600, skill_step=0.05,
    )  # fmt: skip
    start = time.process_time()
    summarise(results)
    assert time.process_time() - start < 8  # 1 to 2 on an idle core


@pytest.mark.parametrize("results", [{}, {"format": "msmoe-results/1", "results": []}, [], None, "text"])
def test_what_is_no_comparison_is_refused(results):
    with pytest.raises(UserError, match="expected 'msmoe-comparison/1'"):
        summarise(results)


def test_a_comparison_without_cells_is_refused():
    with pytest.raises(UserError, match="no cells"):
        summarise(comparison() | {"cells": []})


def test_a_lost_example_is_refused():
    results = comparison()
    results["cells"][0]["tasks"]["topic"]["examples"] = "1" * 299
    with pytest.raises(UserError, match="alpha at 8 experts, seed 0: 299 examples of topic, the task has 300"):
        summarise(results)


def test_two_cells_of_one_run_are_refused():
    results = comparison()
    results["cells"].append(results["cells"][0])
    with pytest.raises(UserError, match="two cells for alpha at 8 experts, seed 0"):
        summarise(results)


def test_an_unknown_task_in_a_cell_is_refused():
    results = comparison()
    results["cells"][0]["tasks"]["other"] = {"examples": "1"}
    with pytest.raises(UserError, match="'other' is not among"):
        summarise(results)


def test_answers_other_than_right_and_wrong_are_refused():
    results = comparison()
    results["cells"][0]["tasks"]["topic"]["examples"] = "2" * 300
    with pytest.raises(UserError, match="topic must be a text of 0 and 1"):
        summarise(results)


def test_losses_without_their_tokens_are_refused():
    results = comparison()
    results["cells"][0]["tasks"]["held_out"]["examples"] = [1.0] * 300
    with pytest.raises(UserError, match="held_out must be pairs"):
        summarise(results)


def test_an_unknown_metric_is_refused():
    results = comparison()
    results["tasks"]["topic"]["metric"] = "bleu"
    with pytest.raises(UserError, match="must be one of exact_match, loss, got 'bleu'"):
        summarise(results)


@pytest.mark.parametrize("field", ["checkpoint", "calibration", "settings", "methods", "tasks"])
def test_a_missing_field_is_named(field):
    results = comparison()
    del results[field]
    with pytest.raises(UserError, match=f"damaged: a field '{field}' is missing"):
        summarise(results)


def test_a_field_of_another_type_is_refused_in_one_line():
    results = comparison()
    results["cells"][0]["bytes"] = "many"
    with pytest.raises(UserError, match="damaged: ") as caught:
        summarise(results)
    assert "\n" not in str(caught.value)
