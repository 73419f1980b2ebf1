"""Commands killed at their file operations; `scripts/experiments/kill_everything.py` does so to all, more often."""

import pytest
from commands import Inputs, commands, compressing
from killing import kills

NAMES = ("plan", "profile", "apply", "mc-smoe", "factorize")
EACH = 2  # kills


@pytest.fixture(scope="module")
def killable(tmp_path_factory):
    return commands(compressing(Inputs(tmp_path_factory.mktemp("inputs"))))


@pytest.mark.parametrize("name", [name + over for name in NAMES for over in ("", " --force")])
def test_a_command_killed_at_any_file_operation_loses_nothing_and_can_be_run_again(name, killable, tmp_path):
    found = list(kills(killable[name], tmp_path / "runs", EACH, seed=1))
    assert len(found) == EACH
    assert [complaint for complaint in found if complaint[1] is not None] == []
