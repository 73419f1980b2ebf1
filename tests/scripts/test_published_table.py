"""The published table beside ours: which figures stand where, and what is said of the order of the methods."""

import pytest
from comparison.synthetic import comparison
from published_table import (
    ABLATIONS,
    PUBLISHED,
    PUBLISHED_TASKS,
    ROWS,
    ablation_table,
    main_table,
    ordering,
    published_mean,
)

from msmoe.comparison.scoring import summarise
from msmoe.planning.methods import resolve, variant

BEST_FIRST = sorted(ROWS, key=published_mean, reverse=True)


def summary_of(methods, **options):
    """Synthetic results in which the first method is the best and each next one clearly worse."""
    return summarise(comparison(methods, experts=(4,), recover_steps=(0,), seed_deviation=0.0, **options))


@pytest.mark.parametrize("label", [*ROWS, *ABLATIONS.values()])
def test_every_row_and_every_ablation_is_a_method_that_exists(label):
    resolve(*variant(label))


def test_every_published_row_has_a_score_for_every_task():
    assert {len(scores) for _, scores in PUBLISHED.values()} == {len(PUBLISHED_TASKS)}


def test_the_mean_of_a_published_row():
    # (94.50 + 90.69 + 75.57 + 68 + 61.80 + 65.66 + 96.34 + 67.91) / 8 = 620.47 / 8
    assert published_mean("m-smoe") == pytest.approx(77.55875)


def test_the_table_has_the_published_rows_with_their_figures():
    lines = main_table(summary_of(ROWS), [0])
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == list(PUBLISHED)
    row = next(line for line in lines if line.startswith("| m-smoe "))
    assert "733M" in row
    assert "77.56" in row


def test_a_task_that_the_paper_has_too_stands_beside_its_published_score():
    lines = main_table(summary_of(ROWS, tasks=("sst2", "topic")), [0])
    assert "published sst2" in lines[0]
    assert "published topic" not in lines[0]
    assert next(line for line in lines if line.startswith("| mc-smoe ")).rstrip(" |").endswith("93.35")


def test_the_published_order_is_recognised():
    lines = ordering(summary_of(BEST_FIRST, skill_step=0.5), [0])
    assert "tau between the published and our order of 8 methods +1.00" in lines[0]
    assert lines[1].endswith("on the other side of: none.")


def test_the_reverse_of_the_published_order_is_recognised():
    lines = ordering(summary_of(BEST_FIRST[::-1], skill_step=0.5), [0])
    assert "-1.00" in lines[0]
    assert "on the published side of: none" in lines[1]


def test_an_ablation_says_how_many_points_it_costs():
    labels = ["m-smoe", "m-smoe:align=none", "m-smoe:budget=uniform"]
    summary = summary_of(labels)
    lines = ablation_table([summary], 0)
    means = {row.method: row.measurements[0].mean.value for size in summary.sizes for row in size.rows}
    points = 100 * (means["m-smoe:align=none"] - means["m-smoe"])
    row = next(line for line in lines if line.startswith("| no alignment "))
    assert f"{points:+.2f}" in row
    # (74.84 + 66 + 89.95 + 64.73) / 4 - (75.57 + 68 + 90.69 + 65.66) / 4 = 73.88 - 74.98
    assert row.rstrip(" |").endswith("-1.10")
