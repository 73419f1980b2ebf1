"""The report as a whole: what artefacts are, that they belong together, the page, the files, the text, the command."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from comparison.synthetic import comparison
from msmoe.analysis.report import report
from msmoe.analysis.report.artefacts import gather
from msmoe.analysis.report.charts import short_names, to_spec
from msmoe.analysis.report.document import Column, distinct, shorten
from msmoe.analysis.report.page import pack, script_json, words
from msmoe.analysis.report.sections.usage import kept_counts
from msmoe.analysis.report.terminal import characters, to_text
from rich.console import Console
from tiny import compress, profile_small, random_records, save_switch, write_records

import msmoe
from msmoe.calibration.stats import Stats
from msmoe.calibration.usage import effective_experts, entropy, gini, imbalance, layer_frame
from msmoe.errors import UserError
from msmoe.planning.plan import Plan
from msmoe.planning.planner import plan as make_plan

HOSTILE = {
    "script": "</script><script>window.hacked = 1</script>",
    "image": "<img src=x onerror='window.hacked = 1'>",
    "quotes": "\"'`${window.hacked = 1}",
    "long": "x" * 10_000,
    "scripts of the world": "层 слой \u202eretal‎ \U0001f600",
    "control": "a\x1b[31mb\nc\td",
    "half a pair": "\ud800",
}
MSMOE = Path(sys.executable).with_name("msmoe")


@pytest.fixture(scope="module")
def folder(switch, stats, tmp_path_factory):
    """One of each artefact of `switch`."""
    out = tmp_path_factory.mktemp("artefacts")
    stats.save(out / "stats")
    plan = compress(switch, stats, out / "small", method="m-smoe")
    plan.save(out / "plan.json")
    results = comparison(["m-smoe", "reap"])
    results["checkpoint"]["fingerprint"] = stats.checkpoint["fingerprint"]
    (out / "comparison").mkdir()
    (out / "comparison" / "results.json").write_text(json.dumps(results))
    task = write_records(out / "task.jsonl", random_records(5))
    msmoe.save_results([msmoe.evaluate(out / "small", task, metrics=["loss"])], out / "evaluation.json")
    return out


@pytest.fixture(scope="module")
def all_of_it(folder, switch):
    names = ("stats", "plan.json", "small", "comparison", "evaluation.json")
    return report(switch, *(folder / name for name in names))


class Page(HTMLParser):
    """Tags, attributes and the text of a page."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


# Artefacts


def test_every_artefact_is_found_out_by_its_content(folder, switch):
    found = gather([switch, *(folder / n for n in ("stats", "plan.json", "small", "comparison", "evaluation.json"))])
    assert found.original is not None
    assert found.original.checkpoint.path == switch
    assert [item.label for item in found.stats] == ["stats"]
    assert [item.plan.method for item in found.plans] == ["m-smoe"]
    assert [item.label for item in found.compressed] == ["small"]
    assert [item.label for item in found.comparisons] == ["comparison"]
    assert len(found.evaluations[0].records) == 1


def test_objects_of_the_api_are_artefacts_too(folder, switch, stats):
    plan = Plan.load(folder / "plan.json")
    results = json.loads((folder / "comparison" / "results.json").read_text())
    found = gather([stats, plan, str(switch), results])
    assert found.calibration is stats
    assert found.plan.plan is plan
    assert len(found.comparisons) == 1


def test_the_plan_of_a_compressed_checkpoint_counts_where_no_file_is_given(folder):
    assert gather([folder / "small"]).plan.plan == Plan.load(folder / "small" / "plan.json")


def test_statistics_of_several_data_sets_add_up(switch, stats, tmp_path):
    other = profile_small(switch, write_records(tmp_path / "other.jsonl", random_records(9, seed=5)))
    routed = gather([stats, other]).calibration.layers["encoder.block.1.layer.1.mlp"].routed
    assert (routed == sum(s.layers["encoder.block.1.layer.1.mlp"].routed for s in (stats, other))).all()


@pytest.mark.parametrize("kind", ["stats", "plan.json", "small", "comparison", "evaluation.json"])
def test_artefacts_of_another_checkpoint_are_refused_in_one_line(kind, folder, tmp_path):
    other = save_switch(tmp_path / "other", seed=9)
    with pytest.raises(UserError, match=r"of another checkpoint than other \(fingerprints differ\)"):
        gather([other, folder / kind])


def test_a_checkpoint_given_twice_is_refused(switch):
    with pytest.raises(UserError, match="the same checkpoint"):
        gather([switch, switch])


def test_the_same_statistics_given_twice_are_refused(stats, folder):
    with pytest.raises(UserError, match="the same statistics"):
        gather([stats, folder / "stats"])


def test_a_sum_of_statistics_beside_one_of_its_parts_is_refused(switch, stats, tmp_path):
    other = profile_small(switch, write_records(tmp_path / "other.jsonl", random_records(9, seed=5)))
    (stats + other).save(tmp_path / "sum")
    with pytest.raises(UserError, match="the same statistics"):
        gather([tmp_path / "sum", other])


def test_a_checkpoint_whose_plan_was_swapped_is_refused(switch, stats, exact, tmp_path):
    shutil.copytree(exact, tmp_path / "swapped")
    make_plan(switch, stats, method="reap", experts=3).save(tmp_path / "swapped" / "plan.json")
    with pytest.raises(UserError, match="not the plan that the checkpoint was made by"):
        gather([tmp_path / "swapped"])


def test_the_same_folder_given_twice_is_refused(exact):
    with pytest.raises(UserError, match="is given twice"):
        gather([exact, exact])


def test_experts_before_are_counted_by_the_plan_where_routers_lost_rows(switch, stats, tmp_path):
    compress(switch, stats, tmp_path / "pruned", method="reap")
    assert set(gather([tmp_path / "pruned"]).layers.values()) == {6}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "what.json is no JSON"),
        ("[" * 100_000, "what.json is no JSON"),
        ("[1, 2]", "format None"),
        ('{"format": "msmoe-plan/9"}', "'msmoe-plan/9'"),
        ('{"format": "msmoe-comparison/1", "cells": []}', "nothing was measured"),
        ('{"format": "msmoe-plan/1"}', "lacks the field 'layers'"),
        ('{"format": "msmoe-results/1", "results": [{"task": "t"}]}', "damaged"),
        ('{"format": "msmoe-results/1"}', "damaged"),
    ],
)
def test_a_file_that_is_no_artefact_is_refused_with_its_name(content, message, tmp_path):
    (tmp_path / "what.json").write_text(content)
    with pytest.raises(UserError, match=re.escape(message)):
        gather([tmp_path / "what.json"])


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        gather([tmp_path / "nowhere"])
    with pytest.raises(UserError, match="is no artefact of msmoe"):
        gather([tmp_path])
    with pytest.raises(UserError, match="cannot show int"):
        gather([3])
    with pytest.raises(UserError, match="nothing to report on"):
        gather([])


def test_truncated_statistics_are_refused(folder, tmp_path):
    shutil.copytree(folder / "stats", tmp_path / "stats")
    file = tmp_path / "stats" / "stats.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged statistics"):
        gather([tmp_path / "stats"])


# Usage in numbers


def test_measures_of_usage_by_hand():
    usage = np.array([0.5, 0.25, 0.25, 0.0])
    assert effective_experts(usage) == pytest.approx(2**1.5)  # entropy 1.5 bits
    assert entropy(usage) == pytest.approx(0.75)  # of log2 4 = 2 bits
    assert imbalance(usage) == 2  # 0.5 over 1/4
    # sum |x_i - x_j| over ordered pairs: 2 (.25 + .25 + .5 + 0 + .25 + .25) = 3; over 2 n^2 mean = 2 * 16 / 4 = 8
    assert gini(usage) == pytest.approx(3 / 8)


def test_the_layer_frame_counts_dead_and_cold_experts(stats):
    name = next(iter(stats.layers))
    layer = replace(stats.layers[name], routed=(r := stats.layers[name].routed * 0 + 100))
    r[0], r[1] = 0, 2  # of 402, a share of .005: less than a tenth of 1/6
    row = layer_frame(replace(stats, layers={name: layer})).iloc[0]
    assert (row.used, row.dead, row.cold, row.num_tokens) == (5, 1, 1, 402)


def test_a_layer_without_tokens_has_no_shares(stats):
    name = next(iter(stats.layers))
    zero = stats.layers[name].routed * 0
    row = layer_frame(replace(stats, layers={name: replace(stats.layers[name], routed=zero, dispatched=zero)})).iloc[0]
    assert (row.used, row.dead, row.cold) == (0, 6, 0)
    assert np.isnan(row.entropy)
    assert np.isnan(row.dropped_share)


# Names and numbers


def test_layers_are_named_by_what_tells_them_apart():
    names = ["encoder.block.1.layer.1.mlp", "encoder.block.3.layer.1.mlp", "decoder.block.1.layer.2.mlp"]
    assert list(short_names(names).values()) == ["encoder 1", "encoder 3", "decoder 1"]
    assert short_names(["model.layers.3.mlp", "model.layers.10.mlp"])["model.layers.10.mlp"] == "layer 10"
    assert short_names(names[:1]) == {names[0]: names[0]}


def test_a_long_name_is_cut_in_the_middle():
    assert shorten("a" * 30 + "b" * 30, 11) == "aaaaa…bbbbb"
    assert shorten("tab\there\n") == "tab\N{REPLACEMENT CHARACTER}here\N{REPLACEMENT CHARACTER}"


def test_labels_that_would_be_the_same_are_numbered():
    labels = ["original", "out", "original", "out", "out (2)"]
    assert distinct(labels) == ["original", "out", "original (2)", "out (2)", "out (2) (2)"]
    assert distinct(["a" * 50, "a" * 60], 11) == ["aaaaa…aaaaa", "aa…aa (2)"]


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [("integer", 12345, "12,345"), ("share", 0.1234, "12.3%"), ("number", 0.0012346, "0.001235"),
     ("bytes", 9_900_000, "9.9 MB"), ("text", "x", "x"), ("integer", pd.NA, "-"), ("share", float("nan"), "-")],
)  # fmt: skip
def test_numbers_in_tables_read_as_their_column_says(kind, value, text):
    assert Column("f", "heading", kind).show(value) == text


def test_datasets_are_packed_by_column_without_loss_of_rows():
    rows = [{"name": "a" if i % 2 else "b", "x": i / 3, "y": float("nan")} for i in range(6)]
    packed = pack(rows)
    assert packed["length"] == 6
    assert packed["columns"]["name"] == {"levels": ["b", "a"], "codes": [0, 1, 0, 1, 0, 1]}
    assert packed["columns"]["x"]["values"] == pytest.approx([i / 3 for i in range(6)], rel=1e-4)
    assert packed["columns"]["y"]["values"] == [None] * 6


def test_text_in_a_script_element_cannot_end_it():
    text = script_json(["</script>", "<!--", "\u2028", "&"])
    assert not re.search(r"[<>&\u2028]", text)
    assert json.loads(text) == ["</script>", "<!--", "\u2028", "&"]


def test_a_budget_cuts_what_the_default_plan_cuts(switch, stats):
    plan = make_plan(switch, stats, method="m-smoe", experts=3)
    kept = {name: len(layer.groups) for name, layer in plan.layers.items()}
    counts = dict(zip(stats.layers, kept_counts(stats)["half"], strict=True))
    assert counts == {next(iter(stats.layers)): 6} | kept


def test_a_layer_without_tokens_has_no_shares_in_tables_and_text(stats):
    name = next(iter(stats.layers))
    zero = stats.layers[name].routed * 0
    empty = replace(stats.layers[name], routed=zero, dispatched=zero)
    made = report(replace(stats, layers=dict(stats.layers) | {name: empty}))
    frame = made.tables["usage-experts"]
    assert frame[frame.layer == name].usage_frequency.isna().all()
    assert frame.iloc[0].routed > 0
    out = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    out.print(to_text(made))
    assert re.search(r"^encoder 1 +······ ", out.export_text(), re.MULTILINE)


# The page


def test_the_page_needs_nothing_else(all_of_it):
    page = Page(all_of_it.to_html())
    for tag, attributes in page.tags:
        assert not ({"src", "href"} & attributes.keys()) or attributes.get("href", "#").startswith("#"), (
            tag,
            attributes,
        )
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")


def test_every_chapter_stands_where_all_artefacts_are_given(all_of_it):
    keys = [section.key for section in all_of_it.document.sections]
    assert keys == ["glance", "usage", "domains", "similarity", "plan", "cost", "forecast", "comparison"]


def test_every_figure_says_how_to_read_it_and_names_are_unique(all_of_it):
    document = all_of_it.document
    names = [block.name for block in (*document.figures(), *document.tables())]
    assert len(set(names)) == len(names)
    for block in (*document.figures(), *document.tables()):
        assert re.fullmatch(r"[a-z0-9-]+", block.name)
        assert len(block.reading) > 20, block.name
        assert block.reading.rstrip().endswith("."), block.name


def test_the_same_artefacts_give_the_same_page(folder):
    assert report(folder / "stats").to_html() == report(folder / "stats").to_html()


def test_hostile_names_are_text_in_the_page(stats):
    layers = dict(zip(HOSTILE.values(), list(stats.layers.values()) * 2, strict=False))
    hostile = Stats(layers, stats.data | {"source": HOSTILE["script"]}, stats.checkpoint)
    page = Page(report(hostile).to_html())
    assert not [a for t, a in page.tags if t == "img" or any(name.startswith("on") for name in a)]
    assert sum(t == "script" for t, _ in page.tags) == 4  # data, specifications, library, ours
    assert HOSTILE["image"] in page.text


@pytest.mark.parametrize("names", [["stats"], ["plan.json"], ["small"], ["comparison"], ["evaluation.json"]])
def test_each_artefact_alone_gives_a_report(names, folder):
    made = report(*(folder / name for name in names))
    assert made.document.sections
    assert made.to_html().startswith("<!doctype html>")


def test_a_checkpoint_alone_shows_its_sizes_and_says_what_is_missing(switch):
    made = report(switch)
    (glance, *_) = made.document.sections
    sizes = next(figure for figure in made.document.figures() if figure.name == "glance-sizes")
    assert sizes is not None
    assert any("No statistics" in getattr(block, "text", "") for block in glance.blocks)


def test_sizes_predicted_at_a_glance_are_those_that_merging_writes(switch, stats, tmp_path):
    from msmoe.analysis.report.sections.glance import size_frame

    frame = size_frame(gather([switch])).set_index("what")
    compress(switch, stats, tmp_path / "half", experts=3, method="m-smoe")
    assert frame.loc["half of the experts", "bytes"] == msmoe.inspect(tmp_path / "half").num_bytes


def test_a_notebook_shows_the_page_in_a_frame_of_its_own(folder):
    made = msmoe.report(folder / "stats")
    page = Page(made._repr_html_())
    ((tag, attributes),) = page.tags
    assert tag == "iframe"
    assert attributes["srcdoc"] == made.to_html()
    assert "allow-same-origin" not in attributes["sandbox"]


def test_words_between_backticks_are_code_and_nothing_else_is_markup():
    assert words("`a<b` & <i>") == "<code>a&lt;b</code> &amp; &lt;i&gt;"


def test_records_that_count_twice_are_said(switch, stats, records, tmp_path):
    part = profile_small(switch, write_records(tmp_path / "part.jsonl", records[:5]))
    glance = report(stats, part).document.sections[0]
    assert any("5 sampled records stand in more than one" in getattr(b, "text", "") for b in glance.blocks)


def test_dead_and_cold_experts_have_a_table(stats):
    name = next(iter(stats.layers))
    routed = stats.layers[name].routed * 0 + 100
    routed[0], routed[1] = 0, 2
    made = report(replace(stats, layers=dict(stats.layers) | {name: replace(stats.layers[name], routed=routed)}))
    frame = made.tables["usage-idle"]
    assert list(frame[frame.layer == name].expert) == [0, 1]


def test_a_figure_on_file_has_its_title_and_settings(stats):
    figure = next(f for f in report(stats).document.figures() if f.name == "usage-map")
    title = to_spec(figure.chart, title=figure.title)["title"]
    assert title["text"] == "Expert usage by layer"
    assert title["subtitle"] == "Share of: routed tokens; Colours: linear; Experts by: index"


# Files and text


def test_half_a_surrogate_pair_in_a_name_can_be_written(stats, tmp_path):
    layers = dict(zip(["a\ud800", "b", "c", "d"], stats.layers.values(), strict=True))
    made = report(Stats(layers, stats.data, stats.checkpoint))
    made.save(tmp_path / "report.html")
    made.save_figures(tmp_path / "figures")
    assert "a?" in (tmp_path / "figures" / "usage-layers.csv").read_text(encoding="utf-8")


def test_every_figure_is_written_as_png_and_svg_and_every_table_as_csv(all_of_it, tmp_path):
    written = all_of_it.save_figures(tmp_path / "figures")
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == sorted(p.name for p in written)
    for figure in all_of_it.document.figures():
        assert (tmp_path / "figures" / f"{figure.name}.png").read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in (tmp_path / "figures" / f"{figure.name}.svg").read_text()
    for table in all_of_it.document.tables():
        if len(table.frame):
            read = pd.read_csv(tmp_path / "figures" / f"{table.name}.csv")
            assert list(read.columns) == list(table.frame.columns)
            assert len(read) == len(table.frame)


def test_figures_that_are_interrupted_leave_nothing(stats, tmp_path):
    def stop(done, total, name):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        report(stats).save_figures(tmp_path / "figures", tell=stop)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_unless_asked(folder, tmp_path):
    made = report(folder / "stats")
    made.save(tmp_path / "report.html")
    made.save_figures(tmp_path)
    with pytest.raises(UserError, match="exists; use --force"):
        made.save(tmp_path / "report.html")
    with pytest.raises(UserError, match="exists; use --force"):
        made.save_figures(tmp_path)
    made.save(tmp_path / "report.html", force=True)
    made.save_figures(tmp_path, force=True)


def test_the_text_has_a_character_per_expert():
    assert characters(np.array([0.0, 0.1, 0.5, 1.0]), "·░▒▓█") == "·░▒█"
    assert characters(np.zeros(3), "·░▒▓█") == "···"
    assert len(characters(np.ones(256), "·░▒▓█")) == 64


def test_the_text_has_the_numbers_and_no_control_characters(stats):
    layers = dict(zip((HOSTILE["control"], *list(stats.layers)[1:]), stats.layers.values(), strict=True))
    out = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    out.print(to_text(report(Stats(layers, stats.data, stats.checkpoint))))
    text = out.export_text()
    assert "\x1b" not in text
    assert f"{stats.data['num_records']:,} records" in text


# The command


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([MSMOE, "report", *map(str, arguments)], cwd=cwd, capture_output=True, text=True)


def test_the_command_writes_page_figures_and_text(folder, tmp_path):
    done = run(folder / "stats", "--out", "r.html", "--figures", "figures", "--terminal", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "r.html").stat().st_size < 5e6
    assert (tmp_path / "figures" / "usage-map.svg").exists()
    assert "Expert usage" in done.stdout
    assert "wrote r.html" in done.stdout


def test_the_command_prints_tables_for_programs(folder, stats, tmp_path):
    done = run(folder / "stats", "--json", cwd=tmp_path)
    rows = json.loads(done.stdout)["usage-layers"]
    assert [row["num_tokens"] for row in rows] == [layer.num_tokens for layer in stats.layers.values()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--out", "r.html"], "nowhere does not exist"),
        (["STATS"], "nowhere to report to"),
        (["STATS", "--open", "--terminal"], "--open needs --out"),
        (["STATS", "--out", "exists.html"], "exists.html exists; use --force"),
        (["STATS", "--out", "no/such/folder/r.html"], "no folder no/such/folder"),
        ([], "Missing argument"),
    ],
)
def test_a_mistake_gets_one_line_and_exit_code_2(arguments, message, folder, tmp_path):
    (tmp_path / "exists.html").write_text("mine")
    done = run(*[folder / "stats" if a == "STATS" else a for a in arguments], cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert (tmp_path / "exists.html").read_text() == "mine"


def test_a_page_never_takes_the_place_of_an_artefact_or_a_folder(folder, tmp_path):
    shutil.copy(folder / "plan.json", tmp_path / "plan.json")
    before = (tmp_path / "plan.json").read_bytes()
    done = run(tmp_path / "plan.json", "--out", "plan.json", "--force", cwd=tmp_path)
    assert (done.returncode, "is one of the artefacts" in done.stderr) == (2, True)
    assert (tmp_path / "plan.json").read_bytes() == before
    done = run(folder / "stats", "--out", ".", "--force", cwd=tmp_path)
    assert (done.returncode, "is a folder" in done.stderr) == (2, True)
