"""How long the light commands take, and the memory they need: the best of some runs, each in a fresh process.

python scripts/bench/startup.py [CKPT [STATS]]
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNS = 5
MSMOE = Path(sys.executable).with_name("msmoe")


def best(arguments: list[str], environment: dict[str, str] | None = None) -> float:
    """Seconds of the fastest run."""
    seconds = []
    for _ in range(RUNS):
        started = time.perf_counter()
        subprocess.run([MSMOE, *arguments], env=os.environ | (environment or {}), capture_output=True)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def main() -> None:
    completing = {"_MSMOE_COMPLETE": "bash_complete", "COMP_WORDS": "msmoe plan --ke", "COMP_CWORD": "2"}
    rows: list[tuple[list[str], dict[str, str] | None]] = [
        (["--help"], None), (["--version"], None), (["complss"], None), (["plan", "--help"], None), ([], completing),
    ]  # fmt: skip
    if len(sys.argv) > 1:
        rows.append((["inspect", sys.argv[1]], None))
    with tempfile.TemporaryDirectory() as folder:
        if len(sys.argv) > 2:
            rows.append((["report", sys.argv[2], "--out", f"{folder}/report.html", "--force"], None))
        for arguments, environment in rows:
            name = " ".join(arguments) or "completion"
            largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
            print(f"{name[:60]:60} {best(arguments, environment):6.2f} s", end="")
            after = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
            print(f"  {after:6.0f} MB" if after > largest else f"  below {largest:.0f} MB")


if __name__ == "__main__":
    main()
