"""What a notebook shows of statistics, plans and reports."""

from html.parser import HTMLParser

import pytest
from tiny import LAYERS

from msmoe.compression.apply import apply
from msmoe.planning.planner import plan as make_plan
from msmoe.tables import MAX_ROWS, html_table


class Rows(HTMLParser):
    """The rows of a table, cells as text, and the tags that were seen."""

    def __init__(self, page: str):
        super().__init__()
        self.rows, self.tags = [], set()
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def plan(switch, stats):
    return make_plan(switch, stats, experts=3)


@pytest.fixture(scope="module")
def report(switch, stats, plan, tmp_path_factory):
    return apply(switch, plan, tmp_path_factory.mktemp("tables") / "out", stats=stats, workers=1)


def test_statistics_are_a_row_for_each_layer(stats):
    lines = repr(stats).splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(LAYERS)
    assert "40 records" in lines[0]
    rows = Rows(stats._repr_html_()).rows
    assert [row[0] for row in rows[1:]] == list(LAYERS)
    assert rows[1][2] == f"{stats.layers[LAYERS[0]].num_tokens:,}"


def test_a_plan_is_a_row_for_each_compressed_layer(plan):
    assert repr(plan) == str(plan)
    rows = Rows(plan._repr_html_()).rows
    assert [row[0] for row in rows[1:]] == list(LAYERS[1:])
    assert [int(row[2]) for row in rows[1:]] == [len(layer.groups) for layer in plan.layers.values()]


def test_a_report_of_apply_names_the_output_its_size_and_each_layer(report):
    first, _, *rows = repr(report).splitlines()
    assert str(report.out) in first
    assert f"{report.num_bytes:,} bytes" in first
    assert {row.split()[0] for row in rows} == set(LAYERS[1:])
    assert len(Rows(report._repr_html_()).rows) == 1 + len(rows)


def test_texts_are_data_and_long_tables_are_cut():
    page = html_table("<b onclick=x>", ["a"], [["<script>"]] * (MAX_ROWS + 2), ["<i>"])
    seen = Rows(page)
    assert not {"script", "i"} & seen.tags
    assert len(seen.rows) == MAX_ROWS + 1
    assert "and 2 more" in page
