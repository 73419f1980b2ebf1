"""The commands after `apply` on decoders: what they print, the report, and the code of the model cards."""

import json
import os
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner
from decoder_runs import EXPERTS, choices, compressed, questions, save_decoder, texts, write_lines

from msmoe.calibration.stats import Stats
from msmoe.cli import app
from msmoe.compression.factorize import factorize


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("decoder")


@pytest.fixture(scope="module")
def checkpoints(folder):
    """Original, `native`, `exact`, and `exact` with factors."""
    source = save_decoder(folder / "original")
    found = {
        "original": source,
        "native": compressed(source, folder / "native", export="native"),
        "exact": compressed(source, folder / "exact", export="exact"),
        "factors": folder / "factors",
    }
    factorize(found["exact"], found["factors"], rank=4, workers=1)
    return found


def run(*arguments) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_inspect_names_parts_and_counts_and_no_capacity(checkpoints):
    for kind, rows, stored in (("original", 6, 6), ("native", 3, 3), ("exact", 6, 3), ("factors", 6, 3)):
        assert "capacity" not in run("inspect", checkpoints[kind])
        found = json.loads(run("inspect", checkpoints[kind], "--json"))
        assert found["expert_capacity"] is None
        counts = {(layer["num_experts"], layer["num_stored"]) for layer in found["layers"]}
        assert counts == {(rows, stored)} if kind != "exact" else {rows for rows, _ in counts} == {6}
        assert {"experts", "routers", "attention", "embeddings", "norms"} <= found["parts"].keys()
        assert sum(size for _, size in found["parts"].values()) == found["num_bytes"]
        assert found["parts"]["experts"][1] + found["parts"].get("row indices", [0, 0])[1] == sum(
            layer["num_bytes"] for layer in found["layers"]
        )


def test_evaluate_names_checkpoints_of_decoders_with_their_bytes_and_source(checkpoints, tmp_path):
    data = write_lines(tmp_path / "choices.jsonl", choices(6))
    fingerprints = set()
    for kind, path in checkpoints.items():
        [found] = json.loads(run("evaluate", path, "--data", data, "--reference", checkpoints["original"], "--json"))
        assert found["checkpoint"] == kind
        assert found["num_bytes"] == json.loads(run("inspect", path, "--json"))["num_bytes"]
        assert found["majority_share"] is None  # choices are no labels
        assert {"accuracy", "accuracy_norm", "loss", "perplexity", "kl"} <= found["metrics"].keys()
        assert (found["metrics"]["kl"]["value"] < 1e-6) == (kind == "original")
        fingerprints.add(found["source"])
    assert len(fingerprints) == 1


def test_a_report_of_decoders_speaks_of_what_they_have(checkpoints, folder, tmp_path):
    source = checkpoints["original"]
    data = write_lines(
        tmp_path / "text.jsonl", [record | {"domain": "ab"[i % 2]} for i, record in enumerate(texts(24))]
    )
    run("profile", source, "--data", data, "--token-sample", 64, "--out", tmp_path / "stats")
    assert Stats.load(tmp_path / "stats").layers["model.layers.0.mlp"].top_k == 2
    task = write_lines(tmp_path / "questions.jsonl", questions(8))
    run("evaluate", checkpoints["exact"], "--data", task, "--out", tmp_path / "results.json")
    artefacts = (*checkpoints.values(), tmp_path / "stats", folder / "native" / "plan.json", tmp_path / "results.json")
    shown = run("report", *artefacts, "--out", tmp_path / "report.html", "--terminal")
    page = (tmp_path / "report.html").read_text()
    for words in ("over capacity", "encoder kept", "ispatched tokens", "ropped tokens"):
        assert words not in shown
        assert words not in page
    assert re.search(r"layer 0 +\S+ +\S+ +\d", shown)
    assert "Each token goes to 2 experts and counts once for each" in shown
    tables = json.loads(run("report", *artefacts, "--json"))
    shares = [row for row in tables["usage-experts"] if row["layer"] == "model.layers.0.mlp"]
    assert len(shares) == EXPERTS
    assert sum(row["usage_frequency"] for row in shares) == pytest.approx(1)
    ranks = [row for row in tables["cost-layers"] if row["checkpoint"] == "factors"]
    assert all(row["wi_before"] > 1 and row["wo_before"] > 1 for row in ranks)


@pytest.mark.parametrize("kind", ["native", "factors"])
def test_the_code_of_a_card_opens_the_decoder_in_a_fresh_process(kind, checkpoints, tmp_path):
    card = (checkpoints[kind] / "README.md").read_text()
    assert "text2text-generation" not in card
    assert "pipeline_tag: text-generation" in card
    assert ("trust_remote_code" in card) == (kind == "factors")
    code = re.search(r"```python\n(.*?)```", card, re.S)[1]
    env = os.environ | {"HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=checkpoints[kind], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("['...")  # a decoder goes on from what it is given
