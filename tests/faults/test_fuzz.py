"""A quick share of the fuzzer; `python scripts/experiments/fuzz.py` runs as many cases as one likes."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from kinds import KINDS

FUZZ = Path(__file__).resolve().parents[2] / "scripts" / "experiments" / "fuzz.py"
CASES = 150


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory) -> dict[str, list[dict]]:
    """By kind; in a fresh process, which forks for each case and must have run no backward pass before."""
    file = tmp_path_factory.mktemp("fuzz") / "verdicts.jsonl"
    command = [sys.executable, FUZZ, "--cases", str(CASES), "--seed", "0", "--json", file]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert file.exists(), done.stderr
    found = defaultdict(list)
    for line in file.read_text(encoding="utf-8").splitlines():
        verdict = json.loads(line)
        found[verdict["kind"]].append(verdict)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_input_is_refused_in_one_line_or_handled(verdicts, kind):
    wrong = [
        f"python scripts/experiments/fuzz.py --replay {kind}:{v['seed']}  # {v['argv'][0]}, {v['damage']}: {v['wrong']}"
        for v in verdicts[kind]
        if v["wrong"]
    ]
    assert verdicts[kind]
    assert not wrong, "\n".join(wrong)
