"""Quality beside size: the first thing a report says, from whatever was measured."""

import json
import subprocess
import sys

import pytest
from comparison.synthetic import comparison
from msmoe.analysis.report import artefacts
from msmoe.analysis.report.artefacts import gather
from msmoe.analysis.report.build import report
from msmoe.analysis.report.sections.glance import section
from msmoe.analysis.report.sections.quality import lead, quality_frame

from msmoe.errors import UserError
from msmoe.evaluation.results import FORMAT as RESULTS_FORMAT
from msmoe.planning.plan import FORMAT as PLAN_FORMAT


def record(checkpoint, task, value, num_bytes, *, metric="exact_match") -> dict:
    estimate = {"value": value, "ci95": [value - 0.05, value + 0.05], "num_examples": 100}
    return {
        "checkpoint": checkpoint, "source": None, "task": task, "metrics": {metric: estimate}, "majority_share": 0.5,
        "num_parameters": 1000, "bytes": num_bytes, "flops_per_token": 1e6, "seconds": 1.0,
        "peak_memory_bytes": 10**8,
    }  # fmt: skip


def results(*records) -> dict:
    return {"format": "msmoe-results/1", "results": list(records)}


@pytest.fixture
def evaluated():
    """An original of 4 MB and a checkpoint of 1 MB on two tasks and on text."""
    return gather(
        [
            results(
                record("small", "a", 0.7, 10**6),
                record("small", "b", 0.5, 10**6),
                record("small", "text", 2.5, 10**6, metric="loss"),
            ),
            results(record("whole", "a", 0.9, 4 * 10**6), record("whole", "b", 0.6, 4 * 10**6)),
        ]
    )


def quiet(note: str) -> None:
    pass


def test_the_page_opens_with_the_scores_beside_the_bytes(evaluated):
    found = report(*[results(*item.records) for item in evaluated.evaluations])
    first = found.document.sections[0]
    assert [block.name for block in first.blocks] == ["glance-quality-size", "glance-quality"]


def test_the_lead_compares_the_smallest_checkpoint_with_the_largest_by_hand(evaluated):
    # (0.7 + 0.5) / 2 = 0.6 beside (0.9 + 0.6) / 2 = 0.75, 1 of 4 MB
    assert lead(quality_frame(evaluated)) == (
        "small stores 1.0 MB, 25% of the original, and scores 0.600 where whole scores 0.750 (mean over 2 tasks)."
    )


def test_checkpoints_stand_from_the_largest_with_their_share_of_the_bytes(evaluated):
    frame = quality_frame(evaluated).drop_duplicates("checkpoint")
    assert frame.checkpoint.tolist() == ["whole", "small"]
    assert frame["share"].tolist() == [1.0, 0.25]


def test_a_loss_that_may_fall_below_the_originals_is_explained(evaluated):
    table = section(evaluated, quiet).blocks[1]
    assert "recovery trains on text" in table.reading


def test_a_comparison_opens_with_the_full_model_and_the_best_method_of_each_size():
    (table,) = section(gather([comparison(seed_deviation=0.0, num_examples=900)]), quiet).blocks
    assert table.frame.method.tolist() == ["full", "alpha", "alpha"]
    assert table.frame["size"].tolist() == [16, 8, 4]
    assert table.frame["share"].tolist() == pytest.approx([1, 11 / 19, 7 / 19])


def test_without_scores_the_report_says_how_to_get_them(stats):
    first = section(gather([stats]), quiet).blocks[0]
    assert "msmoe evaluate CHECKPOINT --data TASK.jsonl --out results.json" in first.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seconds": "long"}, r"results\[0\].seconds must be a finite number, at least 0, got 'long'"),
        ({"bytes": 2.5}, r"results\[0\].bytes must be a whole number"),
        ({"checkpoint": None}, r"results\[0\].checkpoint must be a text, got None"),
        ({"metrics": []}, r"results\[0\].metrics must be an object, got \[\]"),
        ({"metrics": {"loss": {"value": float("nan")}}}, r"metrics.loss.value must be a finite number, got nan"),
    ],
)
def test_a_wrong_field_of_an_evaluation_is_named_with_its_file(change, message, tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(results(record("a", "t", 0.5, 1) | change)))
    with pytest.raises(UserError, match=rf"{file}: damaged: .*{message}"):
        gather([file])


@pytest.mark.parametrize("version", ["msmoe-results/2", "msmoe-comparison/7"])
def test_results_of_another_version_are_refused_as_such(version, tmp_path):
    (tmp_path / "new.json").write_text(json.dumps({"format": version}))
    with pytest.raises(UserError, match=rf"new.json is no artefact of msmoe .*{version}.*this version reads"):
        gather([tmp_path / "new.json"])


def test_formats_that_are_known_without_their_modules_are_those_that_are_written():
    assert (artefacts.PLAN, artefacts.RESULTS) == (PLAN_FORMAT, RESULTS_FORMAT)


LIGHT = """
import importlib.util, sys, types
from pathlib import Path
root = Path(sys.argv[1])
for name, folder in (("msmoe", root / "msmoe"), ("msmoe.analysis", root / "analysis")):  # as after a lazy import
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(folder)]
from msmoe.analysis.report import report
report(sys.argv[2]).save(sys.argv[3])
heavy = ["planning.planner", "planning.similarity", "planning.plan", "compression.layer_errors"]
heavy = ["msmoe." + name for name in heavy] + ["sklearn", "transformers"]
print([name for name in heavy if name in sys.modules])
"""


def test_a_report_of_statistics_imports_nothing_that_reads_weights(stats, tmp_path, request):
    stats.save(tmp_path / "stats")
    command = [sys.executable, "-c", LIGHT, str(request.config.rootpath), str(tmp_path / "stats")]
    done = subprocess.run([*command, str(tmp_path / "page.html")], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
