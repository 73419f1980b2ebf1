"""The chapter on comparisons: frames against the summary and hand-worked numbers, drawn figures, hostile names."""

import json

import numpy as np
import pandas as pd
import pytest
import vl_convert
from comparison.synthetic import comparison
from msmoe.analysis.report.artefacts import Artefacts, Comparison, Evaluation, gather
from msmoe.analysis.report.charts import to_spec
from msmoe.analysis.report.document import Column, Document, Figure, Note, Section, Table
from msmoe.analysis.report.page import table_rows, to_html
from msmoe.analysis.report.sections.comparison.chapter import lead, score_table, section
from msmoe.analysis.report.sections.comparison.evaluations import evaluation_frame, evaluation_lead
from msmoe.analysis.report.sections.comparison.looks import short_texts
from msmoe.analysis.report.sections.comparison.pareto import method_frame, pareto_figure
from msmoe.analysis.report.sections.comparison.runs import Mean, run_frame
from msmoe.analysis.report.sections.comparison.settings import setting_frame
from msmoe.analysis.report.sections.comparison.tasks import colour_limit, layer_figure, layer_frame, task_frame

from msmoe.comparison.scoring import summarise
from msmoe.comparison.summary import Summary, Task
from msmoe.errors import UserError

HOSTILE = (
    "</script><script>alert(1)</script>", "\" ' ` ${x}", "two\nlines", "\u202eright to left", "x" * 10_000,
    "x" * 4_999 + "yy" + "x" * 4_999, "datum.x == 1 || 'a'",
)  # fmt: skip
COST = {
    "flops_per_token": 3e6, "peak_memory_bytes": 4e8,
    "prefill": {"tokens_per_second": 2000.0, "p50_seconds": 0.010, "p95_seconds": 0.020},
    "generation": {"tokens_per_second": 100.0, "p50_seconds": 0.1, "p95_seconds": 0.3},
}  # fmt: skip


def artefacts(*contents: dict, evaluations: tuple[Evaluation, ...] = ()) -> Artefacts:
    found = tuple(Comparison(f"run {i}", content) for i, content in enumerate(contents))
    return Artefacts(None, (), (), (), found, evaluations)


def chapter(*contents: dict, **others) -> Section:
    made = section(artefacts(*contents, **others), lambda note: None)
    assert made is not None
    return made


def named(made: Section, name: str):
    (block,) = [block for block in made.blocks if isinstance(block, Figure | Table) and block.name == name]
    return block


def notes(made: Section) -> str:
    return "\n".join(block.text for block in made.blocks if isinstance(block, Note))


def record(checkpoint: str, task: str, value: float, low: float, high: float, **others) -> dict:
    metrics = {"exact_match": {"value": value, "ci95": [low, high], "num_examples": 50}}
    return {
        "checkpoint": checkpoint, "task": task, "metrics": metrics, "majority_share": 0.5, "num_parameters": 1000,
        "bytes": 2000, "flops_per_token": 3000.0, "seconds": 1.5, "peak_memory_bytes": 4000,
    } | others  # fmt: skip


@pytest.fixture(scope="module")
def content() -> dict:
    return comparison()


@pytest.fixture(scope="module")
def summary(content) -> Summary:
    return summarise(content)


@pytest.fixture(scope="module")
def two_runs(content) -> Section:
    other = comparison(("beta", "gamma", "delta"), experts=(4,), tasks=("sms_spam", "language"), seed_deviation=0.2)
    other["settings"]["samples"] = 7
    return chapter(content | {"cost": {"alpha/4": COST | {"full": COST}}}, other)


@pytest.fixture(scope="module")
def evaluations() -> tuple[Evaluation, ...]:
    loss = {"metrics": {"loss": {"value": 1.5, "ci95": [1.2, 1.8], "num_examples": 9}}, "majority_share": None}
    first = (record("small", "topic", 0.6, 0.5, 0.7), record("small", "text", 0, 0, 0, **loss))
    return Evaluation("a", first), Evaluation("b", (record("large", "topic", 0.9, 0.8, 1.0),))


def test_there_is_no_chapter_without_comparisons_and_evaluations():
    assert section(artefacts(), lambda note: None) is None


def test_points_are_the_means_of_the_summary_at_their_bytes(summary):
    frame = method_frame(summary)
    assert len(frame) == 3 * 2 * 2  # methods, sizes, recoveries
    for size in summary.sizes:
        for row in size.methods:
            for steps, measured in row.measurements.items():
                key = (
                    (frame.method == row.method) & (frame.experts == f"{size.experts:g}") & (frame.steps == str(steps))
                )
                (point,) = frame[key].to_dict("records")
                assert measured.mean is not None
                assert (point["bytes"], point["rank"]) == (measured.num_bytes, measured.rank)
                assert [point[f] for f in ("score", "low", "high")] == [
                    measured.mean.value, measured.mean.low, measured.mean.high,
                ]  # fmt: skip


def test_the_front_holds_the_best_of_each_size_where_more_bytes_score_more():
    summary = summarise(comparison(skill_step=1.0, seed_deviation=0.0, recover_steps=(0,)))
    front = method_frame(summary).query("front")
    best = {f"{size.experts:g}": size.methods[0].method for size in summary.sizes}
    assert dict(zip(front.experts, front.method, strict=True)) == best


def test_names_on_the_front_stand_apart(summary):
    frame = method_frame(summary).query("front and steps == '0'").sort_values("label")
    assert (np.diff(frame.label) > 0).all()


def test_gains_are_differences_to_the_full_model_and_lower_losses_are_gains(summary):
    frame = task_frame(summary)
    alpha = frame[(frame.method == "alpha") & (frame["size"] == "8") & (frame.steps == "0")].set_index("task")
    rows = {row.method: row.measurements[0] for row in summary.sizes[0].rows}
    spam, loss = (
        rows["alpha"].scores[task].value - rows["full"].scores[task].value for task in ("sms_spam", "held_out")
    )
    assert alpha.gain["1"] == pytest.approx(spam)
    assert alpha.gain["3"] == pytest.approx(-loss)


def test_the_mark_of_no_significant_difference_follows_the_corrected_p_value(summary):
    frame = task_frame(summary)
    assert set(frame.loc[frame.p >= 0.05, "mark"]) <= {"≈"}
    assert set(frame.loc[frame.p < 0.05, "mark"]) == {""}


def test_without_the_full_model_there_are_no_differences_but_advice(content):
    made = chapter({**content, "cells": [cell for cell in content["cells"] if cell["method"] != "full"]})
    assert not any(isinstance(b, Figure) and b.name == "comparison-tasks" for b in made.blocks)
    assert "Add full to --methods" in notes(made)


def test_without_costs_and_layer_losses_there_is_advice():
    made = chapter(comparison(layer_loss=False, experts=(4,)))
    assert "--cost" in notes(made)
    assert "Add 0 to --recover-steps" in notes(made)


def test_layer_losses_are_means_over_seeds(content, summary):
    frame = layer_frame(summary)
    cells = [c for c in content["cells"] if c["method"] == "beta" and c["experts"] == 4 and c["layer_loss"]]
    expected = np.mean([cell["layer_loss"]["decoder.block.3.layer.2.mlp"] for cell in cells])
    (row,) = frame[(frame.method == "beta") & (frame["size"] == "4") & (frame.layer == "decoder 3")].to_dict("records")
    assert row["loss"] == pytest.approx(expected)


def test_colours_are_clipped_at_four_times_what_most_losses_stay_under():
    # 99 losses of 0.1 and one of 5: the 95 % quantile is 0.1
    assert colour_limit(pd.Series([0.1] * 99 + [5.0])) == pytest.approx(0.4)
    assert colour_limit(pd.Series([0.1, -0.2])) == pytest.approx(0.2)


def test_the_reading_aid_counts_the_clipped_cells():
    content = comparison(tuple("abcdefghijk"), experts=(4,), recover_steps=(0,), seeds=(0,))
    cell = next(cell for cell in content["cells"] if cell["method"] == "k")
    cell["layer_loss"] = dict.fromkeys(cell["layer_loss"], 0.0) | {"encoder.block.3.layer.1.mlp": 100.0}
    figure = layer_figure(summarise(content), "layers")
    assert figure is not None
    assert "1 of 33 cells lie beyond" in figure.reading


def plain(cell) -> str:
    """Text of a cell without the blanks that keep an interval on one line."""
    return cell.text.replace("\N{NO-BREAK SPACE}", " ")


def test_the_table_shows_intervals_and_marks_and_sorts_by_the_number(summary):
    table = score_table(summary, "scores")
    rows = [(size.experts, row) for size in summary.sizes for row in size.rows]
    for experts, row in rows:
        (line,) = table.frame[(table.frame["size"] == experts) & (table.frame.method == row.method)].index
        cells = [cell for cell in table_rows(table)[line] if not cell.is_text][4:]  # after size, stored, experts, seeds
        for measure, cell in zip(summary.columns(), cells, strict=True):
            assert (plain(cell), cell.is_strong) == (row.cell(measure).text, row.cell(measure).is_best)
            score = row.score(measure)
            if score:
                assert float(cell.value) == pytest.approx(score.value, abs=1e-6)


def test_a_column_that_sorts_by_another_field_is_one_of_numbers():
    table = Table(
        "t", "", "", pd.DataFrame({"text": ["10 [9, 11]"], "value": [10.0]}), (Column("text", "x", by="value"),)
    )
    ((cell,),) = table_rows(table)
    assert (plain(cell), cell.value, cell.is_text, cell.is_strong) == ("10 [9, 11]", "10.0", False, False)


def test_the_lead_names_the_best_and_what_it_cannot_be_told_from():
    far = lead(summarise(comparison(("good", "bad"), skill_step=3.0, experts=(8,), recover_steps=(0,))))
    assert far.startswith("Best mean: at 8 experts per layer good with 0.")
    assert "bad" not in far
    near = lead(summarise(comparison(("one", "two"), skill_step=0.0, experts=(8,), recover_steps=(0,))))
    assert "not distinguishable from" in near
    assert "one" in near
    assert "two" in near


def test_costs_stand_relative_to_the_original(two_runs):
    row = named(two_runs, "comparison-cost-1").frame.iloc[0]
    assert (row["method"], row["experts"]) == ("alpha", 4)
    assert row["text prefill p50 ms"] == "10 (1.00)"


def test_two_runs_are_compared_on_the_tasks_that_both_have(content, two_runs):
    frame = named(two_runs, "comparison-run-table-2").frame
    assert set(frame.method) == {"beta", "gamma", "full", "dense"}
    scores = [
        np.mean([example == "1" for example in cell["tasks"]["sms_spam"]["examples"]])
        for cell in content["cells"]
        if (cell["method"], cell["experts"], cell["recover_steps"]) == ("beta", 4, 0)
    ]
    (row,) = frame[(frame.method == "beta") & (frame.steps == 0)].to_dict("records")
    assert row["first"] == pytest.approx(np.mean(scores))
    assert row["change"] == pytest.approx(row["second"] - row["first"])


def test_what_only_one_run_has_is_said(two_runs):
    text = notes(two_runs)
    for sentence in ("Only run 0 has the methods alpha.", "Only run 1 has the methods delta.",
                     "Only run 0 has the tasks topic.", "Only run 0 has the sizes 8."):  # fmt: skip
        assert sentence in text
    assert "no paired test" in text


def test_settings_that_differ_are_listed_and_equal_ones_are_not(content):
    other = json.loads(json.dumps(content))
    other["settings"]["options"] = {"token_sample": 4}
    other["versions"]["msmoe"] = "0.2.0"
    frame = setting_frame(content, other)
    assert set(frame.setting) == {"settings.options.token_sample", "versions.msmoe"}
    assert frame.set_index("setting")["second"]["versions.msmoe"] == "0.2.0"


def test_intervals_that_touch_overlap_and_others_stand_apart():
    first = {("a", 4.0, 0): Mean(0.5, 0.4, 0.6, 10), ("b", 4.0, 0): Mean(0.5, 0.4, 0.6, 10)}
    second = {("a", 4.0, 0): Mean(0.7, 0.6, 0.8, 12), ("b", 4.0, 0): Mean(0.7, 0.61, 0.8, 12)}
    frame = run_frame(first, second, [Task("t", "exact_match", 9, None)]).set_index("method")
    assert frame.overlap.to_dict() == {"a": "overlap", "b": "apart"}
    assert (frame.gain["a"], frame.bytes_change["a"]) == (pytest.approx(0.2), 2)
    losses = run_frame(first, second, [Task("t", "loss", 9, None)])
    assert losses.gain[0] == pytest.approx(-0.2)


def test_runs_without_a_shared_task_are_not_compared(content):
    made = chapter(content, comparison(tasks=("other",), loss_tasks=()))
    assert "their scores are not compared" in notes(made)


def test_evaluations_of_several_files_stand_in_one_table(evaluations):
    table = named(chapter(evaluations=evaluations), "comparison-evaluation-table")
    assert list(zip(table.frame.checkpoint, table.frame.task, strict=True)) == [
        ("small", "topic"), ("small", "text"), ("large", "topic"),
    ]  # fmt: skip
    shown = [[plain(cell) for cell in row] for row in table_rows(table)]
    assert shown[0][2:] == ["0.600 [0.500, 0.700]", "-", "50.0%", "2.0 kB", "1,000", "3000", "1.5", "4.0 kB"]
    assert shown[1][2:5] == ["-", "1.500 [1.200, 1.800]", "-"]


def test_the_lead_on_evaluations_counts_tasks_whose_intervals_do_not_overlap(evaluations):
    assert evaluation_lead(evaluations) == (
        "2 checkpoints were evaluated, 1 of 2 tasks with all of them; on 1 of these some 95 % intervals do not overlap."
    )


def test_checkpoints_of_one_name_are_told_apart_by_their_file():
    found = tuple(Evaluation(label, (record("x", "t", 0.5, 0.4, 0.6),)) for label in ("a", "b", "b"))
    assert evaluation_frame(found).checkpoint.tolist() == ["a: x", "b: x (2)", "b: x (3)"]


def test_a_record_without_a_field_is_refused_with_its_name(tmp_path):
    found = record("x", "t", 0.5, 0.4, 0.6)
    del found["seconds"]
    (tmp_path / "results.json").write_text(json.dumps({"format": "msmoe-results/1", "results": [found]}))
    with pytest.raises(UserError, match="'seconds'"):
        section(gather([tmp_path]), lambda note: None)


def test_every_figure_draws(two_runs, evaluations):
    figures = [b for b in (*two_runs.blocks, *chapter(evaluations=evaluations).blocks) if isinstance(b, Figure)]
    assert len(figures) == 3 + 3 + 1 + 1
    for figure in figures:
        svg = vl_convert.vegalite_to_svg(to_spec(figure.chart, title="Title"))
        assert svg.count("<path") > 5, figure.name


def test_hostile_names_are_data_and_nothing_else():
    content = comparison(HOSTILE, experts=(4,), tasks=HOSTILE[:3], loss_tasks=HOSTILE[4:5], num_examples=40)
    content["methods"][HOSTILE[0]]["kind"] = HOSTILE[0]
    made = chapter(content)
    for figure in (block for block in made.blocks if isinstance(block, Figure)):
        spec = to_spec(figure.chart, title="Title")
        assert vl_convert.vegalite_to_svg(spec).startswith("<svg")
        expressions = [
            text for key, text in walk(spec) if key in ("filter", "expr", "calculate", "labelExpr") and text is not None
        ]
        assert not any("alert" in str(text) or "||" in str(text) for text in expressions)
    page = to_html(Document("t", "", (made,)))
    assert HOSTILE[0] not in page
    assert "x" * 401 not in page


def walk(node: object):
    """Keys and leaves of a specification."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield key, None if isinstance(value, dict | list) else value
            yield from walk(value)
    elif isinstance(node, list):
        for value in node:
            yield from walk(value)


def test_names_that_shorten_to_the_same_are_numbered():
    short = short_texts(HOSTILE[4:6], 20)
    assert len(set(short.values())) == 2
    assert max(map(len, short.values())) <= 20


def test_many_methods_are_bounded_and_the_reading_aid_says_so():
    many = tuple(f"method-{i}" for i in range(45))
    summary = summarise(comparison(many, experts=(4,), recover_steps=(0,), seeds=(0,), num_examples=40))
    figure = layer_figure(summary, "layers")
    assert figure is not None
    assert "Of 45 methods, the best 40 are drawn." in figure.reading
    assert layer_frame(summary).method.nunique() == 40


def test_a_comparison_of_losses_only_draws_lower_losses_higher():
    summary = summarise(comparison(tasks=(), experts=(8, 4)))
    figure = pareto_figure(summary, "pareto")
    assert figure is not None
    scales = [layer["encoding"]["y"]["scale"] for layer in to_spec(figure.chart)["layer"] if "scale" in
              layer["encoding"].get("y", {})]  # fmt: skip
    assert all(scale["reverse"] for scale in scales)
