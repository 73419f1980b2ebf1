"""How long a report takes, how much memory, how large it is and how fast it opens: 24 MoE layers of 256 experts.

    python scripts/bench/report.py                  builds the model (0.2 GB) and its artefacts once
    python scripts/bench/report.py --experts 64

The model is a random Switch model (12 + 12 blocks, all sparse, d_model 64, d_ff 128, bfloat16) profiled on random
tokens of four domains, with a plan of m-smoe at a quarter of the experts and what it makes. Each row is a
`msmoe report` in a process of its own: seconds and peak resident memory, beside the imports alone. The page is then
opened in Chromium, where there is one: until its first figures stand, and until all do. The limits are 10 s and 1 GB
to write, 5 MB, 2 s to open.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

NUM_RECORDS, LENGTH, VOCABULARY = 256, 64, 512
DOMAINS = ("code", "dialogue", "encyclopedia", "news")
MSMOE = Path(sys.executable).with_name("msmoe")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def build(folder: Path, num_experts: int) -> None:
    """A random checkpoint whose routers prefer some experts, and records of four domains with their own tokens."""
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=128, num_heads=4, num_layers=12, num_decoder_layers=12,
        num_sparse_encoder_layers=12, num_sparse_decoder_layers=12, num_experts=num_experts, expert_capacity=16,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    model = SwitchTransformersForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("router.classifier.weight"):
                parameter.normal_(std=0.3)
                parameter *= torch.rand(num_experts, 1) ** 3
    model.to(torch.bfloat16).save_pretrained(folder)
    rng = np.random.default_rng(0)
    with data_of(folder).open("w", encoding="utf-8") as stream:
        for i in range(NUM_RECORDS):
            domain = i % len(DOMAINS)
            low, high = 2 + domain * VOCABULARY // 8, VOCABULARY // 2 + domain * VOCABULARY // 8
            source, target = (rng.integers(low, high, size=size).tolist() for size in (LENGTH, LENGTH // 4))
            record = {"input_ids": source, "labels": target, "domain": DOMAINS[domain]}
            stream.write(json.dumps(record) + "\n")


def data_of(folder: Path) -> Path:
    return folder.with_suffix(".jsonl")


def prepare(workdir: Path, num_experts: int) -> dict[str, Path]:
    """Artefacts by name, made where they are not there yet."""
    model = workdir / f"report-{num_experts}"
    made = {name: workdir / f"report-{num_experts}-{name}" for name in ("stats", "plan.json", "merged")}
    if not data_of(model).exists():
        build(model, num_experts)
    commands = {
        "stats": ["profile", model, "--data", data_of(model), "--out"],
        "plan.json": ["plan", model, "--stats", made["stats"], "--method", "m-smoe", "--experts", num_experts // 4,
                      "--out"],
        "merged": ["apply", model, "--plan", made["plan.json"], "--stats", made["stats"], "--out"],
    }  # fmt: skip
    for name, command in commands.items():
        if not made[name].exists():
            subprocess.run([MSMOE, *map(str, command), str(made[name])], check=True, stdout=subprocess.DEVNULL)
    return {"model": model, **made}


def measure(*command: object) -> tuple[float, float]:
    """Seconds and peak resident megabytes of a process."""
    started = time.perf_counter()
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(map(str, command))} failed")
    return time.perf_counter() - started, usage.ru_maxrss / 1e3


def opening(page: Path) -> tuple[float, float] | None:
    """Seconds until a page in Chromium has drawn its first screen, and until every figure is drawn."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        return None
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        tab = chromium.new_page(viewport={"width": 1280, "height": 900})
        started = time.perf_counter()
        tab.goto(page.resolve().as_uri())
        tab.wait_for_function("document.querySelector('[data-state=drawn]')")
        first = time.perf_counter() - started
        tab.evaluate("drawAll().then(() => 0)")
        every = time.perf_counter() - started
        chromium.close()
    return first, every


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--workdir", type=Path, default=Path("build/bench"))
    chosen = parser.parse_args()
    chosen.workdir.mkdir(parents=True, exist_ok=True)
    made = prepare(chosen.workdir, chosen.experts)
    model, stats, plan, merged = made["model"], made["stats"], made["plan.json"], made["merged"]
    cases = {
        "statistics": [stats],
        "statistics, plan": [stats, plan],
        "checkpoint, statistics, plan": [model, stats, plan],
        "checkpoint, statistics, plan, merged": [model, stats, plan, merged],
    }
    imports = (
        "import sys; sys.argv = ['msmoe']; import msmoe.analysis.report, vl_convert; vl_convert.javascript_bundle()"
    )
    start, memory = measure(sys.executable, "-c", imports)
    print("| report of | seconds | peak MB | page MB | first screen s | all figures s |\n|---|---|---|---|---|---|")
    print(f"| nothing: the imports alone | {start:.1f} | {memory:.0f} | | | |")
    page = chosen.workdir / "report.html"
    for name, artefacts in cases.items():
        seconds, memory = measure(MSMOE, "report", *artefacts, "--out", page, "--force")
        opened = opening(page)
        shown = " | ".join(f"{s:.1f}" for s in opened) if opened else "no browser | "
        print(f"| {name} | {seconds:.1f} | {memory:.0f} | {page.stat().st_size / 1e6:.2f} | {shown} |", flush=True)
    figures = chosen.workdir / "figures"
    seconds, memory = measure(MSMOE, "report", *cases["statistics, plan"], "--figures", figures, "--force")
    print(f"| statistics, plan: figures as files | {seconds:.1f} | {memory:.0f} | | | |")


if __name__ == "__main__":
    main()
