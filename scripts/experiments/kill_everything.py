"""Kill every command that writes at many of its file operations, and check what it leaves.

    python scripts/experiments/kill_everything.py       20 kills of each command, first runs and over an old output
    python scripts/experiments/kill_everything.py --kills 1000 --only apply    at every operation

After each kill the final name must hold the old or the new output, complete; folders of other people with names like
our own must be untouched; and the next run must end with the bytes of an undisturbed one and leave nothing beside it.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
TESTS = Path(__file__).resolve().parents[2] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "faults")]

import torch  # noqa: E402
from commands import Inputs, commands, compressing, measuring  # noqa: E402
from killing import kills  # noqa: E402


def main() -> int:
    """Returns 1 if a kill was mishandled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each command")
    parser.add_argument("--only", nargs="*", help="commands whose names begin with one of these")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of operations")
    chosen = parser.parse_args()
    torch.set_num_threads(1)  # a forked process has no threads of its parent
    total = bad = 0
    with tempfile.TemporaryDirectory() as work:
        inputs = Inputs(Path(work))
        made = commands(compressing(inputs) | measuring(inputs))
        for name, command in made.items():
            if chosen.only and not name.startswith(tuple(chosen.only)):
                continue
            started, done, wrong = time.monotonic(), 0, 0
            for die_at, complaint in kills(command, Path(work) / "runs", chosen.kills, seed=chosen.seed):
                done += 1
                if complaint is not None:
                    wrong += 1
                    print(f"  {name}, killed before operation {die_at}: {complaint}", flush=True)
            print(f"{name}: {done} kills, {wrong} mishandled, {time.monotonic() - started:.0f} s", flush=True)
            total, bad = total + done, bad + wrong
    print(f"{total} kills, {bad} mishandled")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
