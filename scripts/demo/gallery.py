"""Screenshots of a report on the demo checkpoint, for the README; needs Chromium and playwright.

    python scripts/demo/gallery.py                  into analysis/gallery, from artefacts made in build/gallery

The report is of the demo checkpoint, statistics of its calibration records, m-smoe-refit at 4 of 16 experts, the same
factorised, and the comparison kept in analysis/results/demo.
"""

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image

import msmoe
from msmoe.demo import CALIBRATION, CHECKPOINT

ROOT = Path(__file__).parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SHOTS = {  # name -> first element, last element, width of the window, colours
    "usage": ("#glance", "#usage-evenness", 1280, "light"),
    "similarity": ("#similarity-matrices", "#similarity-matrices", 1280, "light"),
    "plan": ("#plan-flow", "#plan-budget", 1280, "light"),
    "cost": ("#cost-steps", "#cost-parts", 1280, "light"),
    "forecast": ("#forecast", "#forecast-model", 1280, "light"),
    "comparison": ("#comparison", "#comparison-pareto", 1280, "dark"),
    "phone": ("#usage", "#usage-evenness", 390, "dark"),
}
MARGIN = 16  # pixels around what is shown


def make_page(work: Path) -> Path:
    """The report, as `msmoe report ... --thorough` writes it."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    stats = msmoe.profile(CHECKPOINT, CALIBRATION, samples=512, token_sample=16384, fisher=64)
    plan = msmoe.plan(CHECKPOINT, stats, method="m-smoe-refit", experts=4)
    msmoe.apply(CHECKPOINT, plan, work / "merged", stats=stats)
    msmoe.factorize(work / "merged", work / "factorized", stats=stats, rank=16)
    results = ROOT / "analysis" / "results" / "demo" / "results.json"
    made = msmoe.report(CHECKPOINT, stats, plan, work / "merged", work / "factorized", results, thorough=True)
    made.save(work / "report.html")
    return work / "report.html"


def shoot(page: Path, out: Path) -> None:
    """Every shot, with few colours so that the files are small."""
    from playwright.sync_api import sync_playwright

    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"none of {', '.join(BROWSERS)} is installed")
    out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for name, (first, last, width, colours) in SHOTS.items():
            tab = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=colours)
            tab.goto(page.resolve().as_uri())
            tab.add_style_tag(content="nav { position: static !important }")
            tab.evaluate("drawAll().then(() => 0)")
            top, bottom = (
                tab.evaluate(f"document.querySelector('{selector}').getBoundingClientRect().{side} + scrollY")
                for selector, side in ((first, "top"), (last, "bottom"))
            )
            clip = {"x": 0, "y": max(top - MARGIN, 0), "width": width, "height": bottom - top + 2 * MARGIN}
            image = Image.open(io.BytesIO(tab.screenshot(full_page=True, clip=clip)))
            image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(out / f"{name}.png", optimize=True)
            tab.close()
        chromium.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "analysis" / "gallery")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "gallery")
    chosen = parser.parse_args()
    shoot(make_page(chosen.work), chosen.out)
    for file in sorted(chosen.out.glob("*.png")):
        print(f"{file}  {file.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
