"""Damage every kind of input in every known way and see that each command refuses it in one line or handles it.

python scripts/experiments/fuzz.py --cases 2000 --seed 0 [--kind NAME] [--jobs 1] [--keep DIR]
python scripts/experiments/fuzz.py --replay KIND:SEED [--keep DIR]
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "faults")]

from campaign import cases_of, prepare, run, share, table  # noqa: E402
from judge import Case  # noqa: E402
from kinds import KINDS  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000, help="number of cases, shared among the kinds")
    parser.add_argument("--seed", type=int, default=0, help="other seeds draw other values at other places")
    parser.add_argument("--kind", choices=KINDS, action="append", help="this kind only (repeatable)")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--keep", type=Path, help="folder for the inputs of mishandled cases")
    parser.add_argument("--json", type=Path, help="file for the verdicts, one JSON object a line")
    parser.add_argument("--replay", help="KIND:SEED of one case")
    chosen = parser.parse_args()
    counts = share(chosen.cases, chosen.kind or KINDS)
    cases = [case for kind, count in counts.items() for case in cases_of(kind, count, chosen.seed)]
    if chosen.replay:
        kind, seed = chosen.replay.split(":")
        cases = [Case(kind, int(seed))]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        world = prepare(Path(folder))
        verdicts = []
        for verdict in run(cases, world, jobs=chosen.jobs, keep=chosen.keep):
            verdicts.append(verdict)
            if chosen.json:
                with chosen.json.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(verdict.describe()) + "\n")
            if verdict.wrong or chosen.replay:
                print(f"--replay {verdict}", f"[{verdict.line}]" if chosen.replay else "", flush=True)
    print(table(verdicts))
    print(f"{time.perf_counter() - started:.0f} s")
    return 1 if any(verdict.wrong for verdict in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
