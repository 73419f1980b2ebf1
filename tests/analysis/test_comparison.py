"""Tables that parse back to their numbers, names that cannot break them, and figures looked at as objects."""

import csv
import functools
import io
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from comparison.synthetic import comparison
from markdown_it import MarkdownIt
from msmoe.analysis.compare import main, write_all
from msmoe.analysis.comparison_figures import assign_looks, layer_loss, pareto, tasks, write_figures
from msmoe.analysis.comparison_points import Point, pareto_front, points, spread, standing
from msmoe.analysis.comparison_tables import (
    comparison_csv,
    escape_latex,
    escape_markdown,
    latex,
    latex_document,
    markdown,
    overview_table,
)
from msmoe.analysis.cost_tables import cost_markdown

from msmoe.comparison.scoring import summarise
from msmoe.comparison.summary import LABELS, Score, Summary
from msmoe.errors import UserError

HOSTILE = ("a|b_c%d&e", "*bold* `code` [link](x)", "$m$ {y} <z>", "back\\slash ~^#", "[first]", "two\nlines")
TINY = {"methods": ("alpha", "beta"), "experts": (4,), "num_examples": 40}
MANY = tuple(f"method-number-{i}" for i in range(25))


@pytest.fixture(scope="module")
def summary() -> Summary:
    return summarise(comparison())


@pytest.fixture(scope="module")
def hostile() -> Summary:
    return summarise(comparison(HOSTILE, tasks=("t|a_b%&", "$m$"), loss_tasks=("l_*",), num_examples=60))


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> list[Path]:
    """Files of a report, in a folder that did not exist."""
    return write_all(comparison(**TINY), tmp_path_factory.mktemp("report") / "new" / "folder")


def read_markdown_tables(text: str) -> list[list[list[str]]]:
    """Plain texts of the cells of all tables, as a renderer sees them."""
    tables, cells = [], []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "table_open":
            tables.append([])
        elif token.type == "tr_open":
            cells = []
            tables[-1].append(cells)
        elif token.type == "tr_close":
            cells = []
        elif token.type == "inline" and tables:
            cells.append("".join(child.content for child in token.children or []))
    return tables


def csv_lines(summary: Summary) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(comparison_csv(summary))))


def panels(drawn) -> list[dict]:
    """Specifications of the panels of a figure, each with its data."""
    spec = drawn[0].to_dict(validate=False)
    shared = {"data": spec["data"]} if "data" in spec else {}
    return [shared | panel | {"datasets": spec["datasets"]} for panel in spec["concat"]]


def titles(drawn) -> list[str]:
    return [panel["title"] for panel in panels(drawn)]


def layers_of(panel: dict) -> list[dict]:
    """Layers of a panel with the rows that each draws."""
    found = []
    for layer in panel["layer"]:
        name = layer.get("data", panel.get("data"))["name"]
        found.append(layer | {"rows": panel["datasets"][name]})
    return found


def with_mark(panel: dict, mark: str, *fields: str) -> list[list[dict]]:
    """Rows of the layers of a panel with a kind of mark that have some fields."""
    layers = [layer for layer in layers_of(panel) if layer["mark"]["type"] == mark]
    return [layer["rows"] for layer in layers if layer["rows"] and set(fields) <= layer["rows"][0].keys()]


@functools.cache
def drawn_names(methods: tuple[str, ...], out: Path) -> dict[str, list[tuple[str, float, float]]]:
    """Texts of the SVG of every figure of methods that differ little, with their places."""
    results = comparison(
        methods, experts=(8, 4), seeds=(0,), tasks=("t|a_b%&",), loss_tasks=("$l$",), skill_step=0.03, num_examples=60
    )
    files = [file for file in write_figures(summarise(results), out) if file.suffix == ".svg"]
    return {file.stem: placed_texts(file) for file in files}


def placed_texts(file: Path) -> list[tuple[str, float, float]]:
    """Text, x and y of everything written in an SVG file."""
    found = []

    def visit(node: ElementTree.Element, x: float, y: float) -> None:
        for move in re.findall(r"translate\(([-\d.e]+),\s*([-\d.e]+)\)", node.get("transform", "")):
            x, y = x + float(move[0]), y + float(move[1])
        if node.tag.endswith("}text") and (text := "".join(node.itertext()).strip()) and node.get("opacity") != "0":
            found.append((text, x, y))
        for child in node:
            visit(child, x, y)

    visit(ElementTree.parse(file).getroot(), 0.0, 0.0)
    return found


def point(num_bytes: int, value: float) -> Point:
    return Point("method", 0, num_bytes, Score(value, value, value, 1, 1, None, None, False), float(num_bytes))


def test_a_markdown_table_per_size_holds_what_the_cells_say(summary):
    _, *tables = read_markdown_tables(markdown(summary))
    columns = summary.columns()
    for table, size in zip(tables, summary.sizes, strict=True):
        assert table[0] == [*LABELS, *[column.heading for column in columns]]
        expected = [[*row.labels, *[cell.text for cell in row.cells(columns)]] for row in size.rows]
        assert table[1:] == expected


def test_hostile_names_survive_markdown(hostile):
    overview, first, _ = read_markdown_tables(markdown(hostile))
    assert {line[0] for line in overview[3:]} == {" ".join(name.split()) for name in HOSTILE}
    assert {line[0] for line in first[3:]} == {" ".join(name.split()) for name in HOSTILE}
    assert first[0][-6:] == ["t|a_b%&", "t|a_b%& @100", "$m$", "$m$ @100", "l_* (loss)", "l_* (loss) @100"]


def test_the_best_of_a_column_is_bold_in_markdown(summary):
    lines = markdown(summary).split("## 8 experts")[1].splitlines()
    line = next(line for line in lines if line.startswith("| alpha"))
    mean = line.split(" | ")[5]
    assert mean.startswith("**0.")
    assert mean.endswith("**")


def test_markdown_shows_warnings_and_figures(summary):
    text = markdown(summary, figures=["pareto.png"])
    assert all(escape_markdown(warning) in text for warning in summary.warnings)
    assert "![pareto.png](pareto.png)" in text


def test_escaped_text_reads_the_same_after_rendering():
    for name in HOSTILE:
        inline = MarkdownIt("commonmark").parse(f"x {escape_markdown(name)} x")[1]
        text = "".join(child.content for child in inline.children or [])
        assert text == f"x {' '.join(name.split())} x"


def test_csv_parses_back_to_the_numbers(summary):
    lines = csv_lines(summary)
    for size in summary.sizes:
        for row in size.rows:
            for steps, measured in row.measurements.items():
                for task, score in (measured.scores | {"(mean)": measured.mean}).items():
                    key = {"method": row.method, "experts": f"{size.experts:g}", "recover_steps": str(steps)}
                    (line,) = [x for x in lines if x["task"] == task and key.items() <= x.items()]
                    for name in ("value", "low", "high", "p_full", "p_best"):
                        found = float(line[name]) if line[name] else None
                        expected = getattr(score, name)
                        assert found == (expected if expected is None else pytest.approx(expected, rel=1e-7))
                    assert int(line["bytes"]) == measured.num_bytes
                    assert (int(line["num_examples"]), int(line["num_seeds"])) == (score.num_examples, score.num_seeds)


def test_csv_has_a_line_per_method_size_recovery_and_task(summary):
    # 3 methods x 2 recoveries and 2 references, x 2 sizes x (3 tasks and the mean)
    assert len(csv_lines(summary)) == (3 * 2 + 2) * 2 * 4


def test_hostile_names_survive_csv(hostile):
    assert {line["method"] for line in csv_lines(hostile)} == {*HOSTILE, "full", "dense"}


def test_latex_escapes_what_tex_would_obey():
    assert escape_latex("50 % of a_b & c#1 $x$ {y} ~^\\") == (
        r"50 \% of a\_b \& c\#1 \$x\$ \{y\} \textasciitilde{}\textasciicircum{}\textbackslash{}"
    )


def test_latex_protects_a_star_or_bracket_after_a_line_break(hostile):
    # `\\` takes a star or a bracket that follows it, also on the next line
    assert not re.search(r"\\\\\s*[*\[]", latex(hostile))


def test_latex_names_characters_that_its_fonts_lack():
    assert escape_latex("é Δ ≈") == r"é U+0394 $\approx$"


def test_latex_rows_have_as_many_cells_as_the_table_has_columns(hostile):
    text = latex(hostile)
    num_columns = len(re.search(r"\\begin{tabular}{(\w+)}", text)[1])
    body = text.split(r"\midrule", 1)[1].split(r"\bottomrule")[0]
    rows = [line for line in body.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 2 + len(HOSTILE)
    assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {num_columns}


def test_latex_heads_span_the_columns_of_a_quantity(summary):
    text = latex(summary)
    assert r"\multicolumn{2}{c}{sms\_spam}" in text
    assert r"\cmidrule(lr){6-7}\cmidrule(lr){8-9}" in text


def test_latex_without_recovery_has_one_head():
    assert r"\multicolumn" not in latex(summarise(comparison(recover_steps=(0,))))


def test_latex_environments_and_braces_are_closed(hostile):
    text = latex(hostile) + latex_document("tables")
    opened, closed = re.findall(r"\\begin{(\w+)}", text), re.findall(r"\\end{(\w+)}", text)
    assert sorted(opened) == sorted(closed)
    bare = re.sub(r"\\[{}]", "", text)
    assert bare.count("{") == bare.count("}")


def test_a_report_is_the_same_bytes_every_time(report, tmp_path):
    again = write_all(comparison(**TINY), tmp_path)
    assert [path.name for path in again] == [path.name for path in report]
    for one, other in zip(report, again, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def test_a_report_has_tables_and_every_figure_twice(report):
    assert [path.name for path in report] == [
        "comparison.md", "comparison.csv", "comparison.tex", "comparison_tables.tex",
        "pareto.png", "pareto.svg", "tasks.png", "tasks.svg", "layer_loss.png", "layer_loss.svg",
    ]  # fmt: skip
    assert all(path.stat().st_size > 200 for path in report)


def test_a_png_is_at_least_1280_pixels_wide(report):
    for path in report:
        if path.suffix == ".png":
            header = path.read_bytes()[:24]
            assert header[:4] == b"\x89PNG"
            assert int.from_bytes(header[16:20]) >= 1280


def test_an_earlier_report_is_kept_unless_forced(tmp_path):
    results = comparison(**TINY, recover_steps=(0,), tasks=("sms",), loss_tasks=(), layer_loss=False)
    (tmp_path / "comparison.md").write_text("mine")
    with pytest.raises(UserError, match=r"comparison\.md exists; use --force"):
        write_all(results, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["comparison.md"]
    write_all(results, tmp_path, force=True)
    assert (tmp_path / "comparison.md").read_text() != "mine"


def test_a_file_that_is_no_comparison_ends_with_one_line(tmp_path, capsys):
    (tmp_path / "results.json").write_text('{"format": "msmoe-results/1"}')
    assert main([str(tmp_path / "results.json"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "format is 'msmoe-results/1', expected 'msmoe-comparison/1'" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("content", "expected"), [(None, "No such file"), ("{", "is no JSON")])
def test_a_file_that_cannot_be_read_ends_with_one_line(tmp_path, capsys, content, expected):
    file = tmp_path / "results.json"
    if content is not None:
        file.write_text(content)
    assert main([str(file), "--out", str(tmp_path / "out")]) == 2
    assert expected in capsys.readouterr().err


def test_an_output_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="out is a file: give the name of a folder"):
        write_all(comparison(**TINY), tmp_path / "out")


def test_pareto_has_a_panel_without_training_and_one_after_recovery(summary):
    assert titles(pareto(summary)) == ["without training", "after 100 steps of recovery"]


def test_pareto_has_one_panel_without_recovery():
    assert len(panels(pareto(summarise(comparison(recover_steps=(0,)))))) == 1


def test_pareto_names_every_method_and_reference_in_every_panel(summary):
    for panel in panels(pareto(summary)):
        names = [row["name"].split("\n")[0] for rows in with_mark(panel, "text", "name") for row in rows]
        assert sorted(names) in (
            ["alpha", "beta", "dense", "full", "gamma"],
            ["alpha", "beta", "dense untrained", "full untrained", "gamma"],
        )


def test_pareto_draws_every_mean_at_its_value_with_its_interval(summary):
    (rows,) = with_mark(panels(pareto(summary))[0], "point", "method")
    drawn = sorted((row["method"], row["score"], row["low"], row["high"]) for row in rows)
    measured = [(row.method, row.measurements[0].mean) for size in summary.sizes for row in size.methods]
    assert drawn == sorted((method, mean.value, mean.low, mean.high) for method, mean in measured)


def test_points_of_one_size_stay_closer_to_their_bytes_than_to_the_next_size():
    found = points(summarise(comparison(MANY, experts=(8, 4, 2), num_examples=40)), 0)
    sizes = sorted({p.num_bytes for p in found})
    for p in found:
        nearest = min(sizes, key=lambda size: abs(np.log(p.x / size)))
        assert nearest == p.num_bytes


@pytest.mark.parametrize("figure", ["pareto", "tasks", "layer_loss"])
@pytest.mark.parametrize("methods", [MANY, HOSTILE], ids=["many", "hostile"])
def test_names_stand_apart_and_are_drawn_as_they_are(figure, methods, tmp_path_factory):
    texts = drawn_names(methods, tmp_path_factory.getbasetemp())[figure]
    names = {" ".join(name.split()) for name in methods}
    assert names <= {text for text, _, _ in texts}  # $m$ is no formula
    columns: dict[float, list[float]] = {}
    for text, x, y in texts:
        if text in names:
            columns.setdefault(x, []).append(y)
    assert all(np.diff(sorted(heights)).min() > 11 for heights in columns.values())  # pixels, of a font of 11


def test_a_lower_mean_loss_is_drawn_higher():
    panel = panels(pareto(summarise(comparison(tasks=(), loss_tasks=("text",)))))[0]
    assert all(layer["encoding"]["y"]["scale"]["reverse"] for layer in layers_of(panel) if "y" in layer["encoding"])


def test_the_pareto_front_by_hand():
    a, b, c, d = point(100, 0.5), point(200, 0.4), point(300, 0.9), point(400, 0.9)
    # b is larger and worse than a, d larger than c and no better
    assert pareto_front([d, c, b, a]) == [a, c]


def test_a_few_bytes_less_are_no_place_on_the_pareto_front():
    better, slightly_smaller = point(1000, 0.9), point(995, 0.2)
    assert pareto_front([better, slightly_smaller]) == [better]


def test_the_pareto_front_of_losses_keeps_the_lowest():
    low, high = point(100, 2.0), point(100, 3.0)
    assert pareto_front([low, high], lower_is_better=True) == [low]


def test_tasks_have_a_panel_each_with_better_to_the_right(summary):
    assert titles(tasks(summary)) == ["sms_spam", "topic", "held_out"]
    for panel, reverse in zip(panels(tasks(summary)), [False, False, True], strict=True):
        scales = [layer["encoding"]["x"]["scale"] for layer in layers_of(panel) if "x" in layer["encoding"]]
        assert {scale["reverse"] for scale in scales} == {reverse}


def test_tasks_draw_a_marker_for_every_score(summary):
    (rows,) = with_mark(panels(tasks(summary))[0], "point")
    methods = [row for size in summary.sizes for row in size.methods]
    expected = sorted(m.scores["sms_spam"].value for row in methods for m in row.measurements.values())
    assert sorted(row["value"] for row in rows) == pytest.approx(expected)


def test_layer_loss_has_a_panel_per_size_with_methods_and_layers(summary):
    drawn = layer_loss(summary)
    assert titles(drawn) == ["8 experts per layer", "4 experts per layer"]
    encoding = layers_of(panels(drawn)[0])[0]["encoding"]
    assert encoding["y"]["scale"]["domain"] == standing(summary)
    assert encoding["x"]["scale"]["domain"] == ["encoder 3", "decoder 1", "decoder 3"]


def test_layer_loss_colours_the_losses_by_their_square_roots(summary):
    (rows,) = with_mark(panels(layer_loss(summary))[0], "rect")
    losses = {row.method: list(row.layer_loss.values()) for row in summary.sizes[0].methods}
    for method in standing(summary):
        assert [row["loss"] for row in rows if row["method"] == method] == losses[method]
    largest = max(abs(x) for size in summary.sizes for row in size.rows for x in (row.layer_loss or {}).values())
    np.testing.assert_allclose([r["colour"] * abs(r["colour"]) * largest for r in rows], [r["loss"] for r in rows])


def test_references_with_layer_losses_stand_below_the_methods():
    results = comparison()
    dense = next(cell for cell in results["cells"] if cell["method"] == "dense")
    dense["layer_loss"] = dict.fromkeys(results["cells"][0]["layer_loss"], 0.1)
    encoding = layers_of(panels(layer_loss(summarise(results)))[0])[0]["encoding"]
    assert encoding["y"]["scale"]["domain"] == ["alpha", "beta", "gamma", "dense"]


def test_a_layer_that_was_not_measured_is_blank():
    results = comparison(experts=(4,))
    for cell in results["cells"]:
        if cell["method"] == "alpha" and cell["layer_loss"]:
            cell["layer_loss"].popitem()
    (rows,) = with_mark(panels(layer_loss(summarise(results)))[0], "rect")
    assert [row["layer"] for row in rows if row["method"] == "alpha"] == ["encoder 3", "decoder 1"]
    assert len(rows) == 3 * 3 - 1


def test_there_is_no_layer_figure_without_layer_losses():
    assert layer_loss(summarise(comparison(layer_loss=False))) is None


def test_a_report_shows_only_the_figures_that_there_are(tmp_path):
    written = write_all(comparison(**TINY, recover_steps=(0,), tasks=("sms",), layer_loss=False), tmp_path)
    assert not any("layer" in path.name for path in written)
    assert "layer_loss" not in written[0].read_text()


def test_no_two_coloured_methods_look_the_same():
    looks = assign_looks(MANY[:12]).values()
    assert len({(look.colour, look.dash) for look in looks}) == 12
    assert len({look.shape for look in looks}) == 12


def test_of_many_methods_the_best_are_coloured():
    looks = assign_looks(MANY)
    assert [method for method in MANY if looks[method].is_coloured] == list(MANY[:6])


def test_labels_move_no_more_than_they_must():
    # 0.50 and 0.52 need 0.1 between them: as far up as down; 0.9 stays
    np.testing.assert_allclose(spread([0.52, 0.9, 0.50], 0.1), [0.56, 0.9, 0.46])


def test_labels_without_room_share_what_there_is():
    np.testing.assert_allclose(spread([0.5] * 4, 0.5), [0.125, 0.375, 0.625, 0.875])


COSTS = {
    "m-smoe/4": {
        "flops_per_token": 3e6, "peak_memory_bytes": 4e8,
        "prefill": {"tokens_per_second": 2000.0, "p50_seconds": 0.010, "p95_seconds": 0.020},
        "generation": {"tokens_per_second": 100.0, "p50_seconds": 0.1, "p95_seconds": 0.3},
        "full": {
            "flops_per_token": 6e6, "peak_memory_bytes": 8e8,
            "prefill": {"tokens_per_second": 1000.0, "p50_seconds": 0.020, "p95_seconds": 0.040},
            "generation": {"tokens_per_second": 50.0, "p50_seconds": 0.2, "p95_seconds": 0.2},
        },
    }
}  # fmt: skip


def test_costs_stand_beside_the_originals():
    row = cost_markdown(COSTS).splitlines()[-1]
    assert row == ("| m-smoe/4 | 3 (0.50) | 2,000 (2.00) | 10 (0.50) | 20 (0.50) | 100 (2.00) | 100 (0.50) "
                   "| 300 (1.50) | 400 (0.50) |")  # fmt: skip


def test_a_comparison_without_costs_has_no_table_of_them(tmp_path):
    assert cost_markdown({}) == ""
    written = write_all(comparison(), tmp_path)
    assert "comparison_cost.csv" not in {path.name for path in written}


def test_the_csv_of_costs_holds_the_numbers_as_measured(tmp_path):
    write_all(comparison() | {"cost": COSTS}, tmp_path)
    rows = list(csv.DictReader((tmp_path / "comparison_cost.csv").open()))
    found = {row["measure"]: (float(row["value"]), float(row["full"])) for row in rows}
    assert {row["method"] for row in rows} == {"m-smoe"}
    assert found["generation.p95_seconds"] == (0.3, 0.2)


def test_the_overview_sets_the_means_of_all_sizes_side_by_side():
    summary = summarise(comparison(("alpha", "beta"), experts=(8, 4), recover_steps=(0,), seed_deviation=0.0))
    lines = overview_table(summary)
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == ["full", "dense", "alpha", "beta"]
    alpha = next(line for line in lines if line.startswith("| alpha "))
    for size in summary.sizes:
        row = next(row for row in size.rows if row.method == "alpha")
        assert row.cell(summary.columns()[0]).text in alpha
    assert alpha.count("**") == 4  # the best of both columns
