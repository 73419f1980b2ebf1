"""The page of a report in a browser: all is drawn, switches and sorts, on any width, in the dark and on paper."""

import json
import shutil
from dataclasses import replace

import pytest
from msmoe.analysis.report import report
from test_report import HOSTILE
from tiny import profile_small, save_switch, write_records

from msmoe.calibration.profile import profile
from msmoe.calibration.stats import Stats
from msmoe.comparison.run import FORMAT
from msmoe.demo import CALIBRATION, CHECKPOINT

RESULTS = CHECKPOINT.parents[2] / "analysis" / "results" / "demo" / "results.json"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SETTLED = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(0))))"
FIGURES = "[...document.querySelectorAll('[data-figure]')]"


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A page of the demo checkpoint: statistics, plan, merged checkpoint and the kept comparison."""
    from msmoe.compression.apply import apply
    from msmoe.planning.planner import plan

    out = tmp_path_factory.mktemp("page")
    stats = profile(CHECKPOINT, CALIBRATION, samples=128, token_sample=2048, fisher=16)
    made = plan(CHECKPOINT, stats, method="m-smoe", experts=4)
    apply(CHECKPOINT, made, out / "merged", stats=stats)
    report(CHECKPOINT, stats, made, out / "merged", RESULTS).save(out / "report.html")
    return out / "report.html"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A page whose names try to be code."""
    out = tmp_path_factory.mktemp("hostile")
    checkpoint = save_switch(out / "ckpt")
    records = [{"input_ids": [5, 6, 7 + i], "labels": [8], "domain": name} for i, name in enumerate(HOSTILE.values())]
    stats = profile_small(checkpoint, write_records(out / "data.jsonl", records * 3))
    pairs = zip(HOSTILE.values(), stats.layers.items(), strict=False)
    layers = {f"{name}.{key}": layer for name, (key, layer) in pairs}
    results = json.loads(RESULTS.read_text())
    results["checkpoint"]["fingerprint"] = stats.checkpoint["fingerprint"]
    results["checkpoint"]["name"] = HOSTILE["script"]
    report(replace(stats, layers=layers), rename(results)).save(out / "report.html")
    return out / "report.html"


def rename(results: dict) -> dict:
    """The results with hostile names for its first task and its first method."""
    assert results["format"] == FORMAT
    task, method = next(iter(results["tasks"])), "m-smoe"
    text = json.dumps(results)
    for name, other in ((task, HOSTILE["image"]), (method, HOSTILE["quotes"])):
        text = text.replace(json.dumps(name), json.dumps(other))
    return json.loads(text)


@pytest.fixture
def open_page(browser):
    """Open a page; console errors and exceptions fail the test."""
    contexts, problems = [], []
    local = ("file:", "data:", "blob:")

    def open_it(path, *, width: int = 1280, **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None)
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("request", lambda r: problems.append(r.url) if not r.url.startswith(local) else None)
        tab.goto(path.as_uri())
        tab.evaluate("drawAll().then(() => 0)")
        tab.evaluate(SETTLED)
        return tab

    yield open_it
    for context in contexts:
        context.close()
    assert problems == []


def marks(tab, figure: str) -> str:
    """What a figure has drawn: its marks, without axes."""
    return tab.evaluate(
        "name => [...document.querySelectorAll(`[data-figure=${name}] svg .role-mark`)].map(g => g.innerHTML).join()",
        figure,
    )


@pytest.mark.parametrize("width", [1280, 390])
def test_every_figure_is_drawn_and_not_empty(width, everything, open_page):
    tab = open_page(everything, width=width)
    states = tab.evaluate(f"{FIGURES}.map(e => [e.dataset.figure, e.dataset.state])")
    assert len(states) >= 20
    for figure, state in states:
        assert state == "drawn", figure
        sizes = tab.evaluate(
            "name => [...document.querySelectorAll(`[data-figure=${name}] svg .role-mark > *`)]"
            ".map(e => e.getBoundingClientRect()).filter(r => r.width + r.height > 2).length",
            figure,
        )
        assert sizes >= 2, figure


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_never_wider_than_the_window(width, everything, hostile, open_page):
    for page in (everything, hostile):
        tab = open_page(page, width=width)
        assert tab.evaluate("document.documentElement.scrollWidth") == width


def test_no_column_of_a_table_is_out_of_sight_on_a_desktop(everything, open_page):
    tab = open_page(everything, width=1280)
    wide = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1)"
    assert tab.evaluate(f"{wide}.map(e => e.parentElement.id)") == []


def test_no_legend_is_cut_on_a_phone(everything, open_page):
    tab = open_page(everything, width=390)
    cut = tab.evaluate(
        """[...document.querySelectorAll('.chart')].flatMap(chart => {
            const box = chart.querySelector('svg').getBoundingClientRect();
            return [...chart.querySelectorAll('.role-legend text')]
                .filter(text => text.getBoundingClientRect().right > box.right + 1)
                .map(text => `${chart.dataset.figure}: ${text.textContent}`);
        })"""
    )
    assert cut == []


def test_controls_change_the_picture(everything, open_page):
    tab = open_page(everything)
    seen = [marks(tab, "usage-map")]
    for label in ("gate mass", "log", "usage"):
        tab.locator("[data-figure=usage-map] .vega-bind label", has_text=label).last.click()
        tab.evaluate(SETTLED)
        seen.append(marks(tab, "usage-map"))
    assert len(set(seen)) == 4


def test_hovering_shows_the_numbers(everything, open_page):
    tab = open_page(everything)
    tab.locator("[data-figure=usage-map] svg .mark-rect.role-mark path").nth(20).hover()
    tab.wait_for_selector("#vg-tooltip-element.visible")
    assert "routed tokens" in tab.locator("#vg-tooltip-element").inner_text()


def column(tab, table: str, index: int) -> list[float]:
    rows = f"[...document.querySelectorAll('#{table} tbody tr')].filter(row => !row.hidden)"
    return tab.evaluate(f"{rows}.map(row => Number(row.cells[{index}].dataset.value))")


def test_a_heading_sorts_down_then_up_then_as_it_was(everything, open_page):
    tab = open_page(everything)
    heading = tab.locator("#usage-layers th", has_text="largest")
    index = tab.evaluate("[...document.querySelectorAll('#usage-layers th')].findIndex(t => t.innerText == 'largest')")
    original = column(tab, "usage-layers", index)
    assert original != sorted(original, reverse=True)
    heading.locator("button").click()
    assert column(tab, "usage-layers", index) == sorted(original, reverse=True)
    assert heading.get_attribute("aria-sort") == "descending"
    heading.locator("button").click()
    assert column(tab, "usage-layers", index) == sorted(original)
    heading.locator("button").click()
    assert column(tab, "usage-layers", index) == original


def test_the_keyboard_sorts_and_shows_where_it_is(everything, open_page):
    tab = open_page(everything)
    button = tab.locator("#usage-layers th button").first
    button.focus()
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.innerText") == "experts"
    assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    tab.keyboard.press("Enter")
    assert tab.locator("#usage-layers th[aria-sort]").inner_text().startswith("experts")


def test_the_filter_hides_rows_that_lack_a_word(everything, open_page):
    tab = open_page(everything)
    shown = "[...document.querySelectorAll('#usage-experts tbody tr')].filter(row => !row.hidden).length"
    assert tab.evaluate(shown) == 96
    tab.locator("#usage-experts input").fill("decoder block.3")
    assert tab.evaluate(shown) == 16
    tab.locator("#usage-experts input").fill("")
    assert tab.evaluate(shown) == 96


def test_a_table_is_saved_as_it_stands(everything, open_page, tmp_path):
    tab = open_page(everything)
    with tab.expect_download() as download:
        tab.locator("#usage-layers .csv").click()
    assert download.value.suggested_filename == "usage-layers.csv"
    download.value.save_as(tmp_path / "table.csv")
    lines = (tmp_path / "table.csv").read_text().splitlines()
    assert lines[0].startswith("layer,experts,tokens")
    assert [line.split(",")[0] for line in lines[1:]] == tab.evaluate(
        "[...document.querySelectorAll('#usage-layers tbody tr')].map(row => row.cells[0].textContent)"
    )


def test_dark_mode_has_light_text_on_dark_also_in_figures(everything, open_page):
    tab = open_page(everything, color_scheme="dark")
    brightness = "color => color.match(/[0-9.]+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0) / 3"
    paper = tab.evaluate(f"({brightness})(getComputedStyle(document.body).backgroundColor)")
    label = tab.evaluate(
        f"({brightness})(getComputedStyle(document.querySelector('#usage-map .role-axis-label text')).fill)"
    )
    assert paper < 60
    assert label > 180


def test_paper_has_no_navigation_and_shows_how_controls_stand(everything, open_page):
    tab = open_page(everything)
    tab.emulate_media(media="print")
    hidden = "selector => [...document.querySelectorAll(selector)].every(e => getComputedStyle(e).display == 'none')"
    assert tab.evaluate(hidden, "nav, .tools, .vega-actions")
    assert tab.locator("[data-figure=usage-map] .vega-bindings").is_visible()
    assert tab.pdf(format="A4").startswith(b"%PDF")


def test_hostile_names_are_shown_and_never_run(hostile, open_page):
    tab = open_page(hostile)
    assert tab.evaluate("typeof window.hacked") == "undefined"
    assert tab.evaluate("document.querySelectorAll('main img[onerror], main script').length") == 0
    assert HOSTILE["image"] in tab.evaluate("document.body.innerText")
    assert tab.evaluate(f"{FIGURES}.filter(e => e.dataset.state != 'drawn').map(e => e.dataset.figure)") == []
    tab.locator("[data-figure=usage-map] svg .mark-rect.role-mark path").first.hover()
    tab.wait_for_selector("#vg-tooltip-element.visible")
    assert tab.evaluate("typeof window.hacked") == "undefined"


def test_the_statistics_alone_make_a_page_without_errors(everything, open_page, switch, data, tmp_path):
    stats: Stats = profile_small(switch, data)
    report(stats).save(tmp_path / "alone.html")
    tab = open_page(tmp_path / "alone.html")
    assert tab.evaluate(f"{FIGURES}.every(e => e.dataset.state == 'drawn')")
