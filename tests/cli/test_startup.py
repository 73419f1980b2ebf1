"""What the command answers without loading anything heavy, and how a run ends: in fresh processes."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from msmoe.cli import COMMANDS, app

HEAVY = ("torch", "transformers", "numpy", "pandas", "scipy", "altair", "rich", "huggingface_hub", "safetensors")
MSMOE = Path(sys.executable).with_name("msmoe")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(*arguments, **options) -> subprocess.CompletedProcess:
    settings = {"capture_output": True, "text": True, "env": ENVIRONMENT} | options
    return subprocess.run([MSMOE, *map(str, arguments)], **settings)


def imported_by(*arguments, environment: dict | None = None) -> tuple[set[str], str]:
    """Top-level packages that a command line imports, and what it prints."""
    command = [sys.executable, "-X", "importtime", "-m", "msmoe", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT | (environment or {}))
    found = re.findall(r"^import time:\s+\d+ \|\s+\d+ \|\s*(\S+)$", result.stderr, re.MULTILINE)
    return {name.partition(".")[0] for name in found}, result.stdout


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["complss"], *([name, "--help"] for name in COMMANDS)]
)
def test_help_version_and_typos_import_nothing_heavy(arguments):
    found, _ = imported_by(*arguments)
    assert "click" in found
    assert not found & set(HEAVY)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("msmoe pl", {"plan"}),
        ("msmoe plan --keep", {"--keep-layer", "--keep-rows"}),
        ("msmoe report --fi", {"--figures"}),
    ],
)
def test_shells_complete_commands_and_options_without_loading_anything_heavy(words, expected):
    asked = {"_MSMOE_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    found, printed = imported_by(environment=asked)
    assert {line.partition(",")[2] for line in printed.splitlines()} == expected
    assert not found & set(HEAVY)


def test_the_line_of_every_command_in_the_help_begins_its_own_help():
    for name, line in COMMANDS.items():
        command = app.get_command(None, name)
        whole = " ".join(command.help.split())
        assert whole.startswith(line.removesuffix(".").partition(":")[0]), name


def test_a_mistyped_command_is_answered_with_the_closest_one():
    result = run("complss")
    assert result.returncode == 2
    assert result.stderr.startswith("msmoe: no command 'complss' - did you mean 'compress'?")
    assert result.stderr.count("\n") == 1


def test_a_mistyped_option_is_answered_with_the_closest_one():
    result = run("plan", "--keep-layers", "none")
    assert (result.returncode, "'--keep-layer'" in result.stderr, result.stderr.count("\n")) == (2, True, 1)


@pytest.mark.parametrize("module", ["msmoe", "msmoe.cli"])
def test_the_package_runs_as_a_module(module):
    result = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("msmoe, version ")


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"], ["methods"], ["methods", "--json"]])
def test_a_full_standard_output_is_one_line(arguments):
    with open("/dev/full", "w") as full:
        result = run(*arguments, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert result.returncode == 2
    assert result.stderr == "msmoe: cannot write to standard output: No space left on device\n"


def test_a_closed_standard_output_is_one_line():
    result = subprocess.run(f"{MSMOE} methods >&-", shell=True, capture_output=True, text=True)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith("msmoe: standard output is closed")


def test_a_reader_that_leaves_early_is_no_error():
    result = subprocess.run(
        ["bash", "-c", f"{MSMOE} methods --json | head -c 1; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (0, "")


def with_default_signals() -> None:
    """In the child: tests that run in the background of a shell have inherited that SIGINT is ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def listens_to(pid: int, number: int) -> bool:
    """Whether a process catches a signal by a handler of its own: Python starts with one for SIGINT alone."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(re.search(r"^SigCgt:\s*(\w+)$", status, re.MULTILINE).group(1), 16)
    return all(caught >> (n - 1) & 1 for n in (number, signal.SIGTERM))


@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
@pytest.mark.parametrize("delay", [0.0, 0.3, 1.0])
def test_a_signal_during_imports_ends_with_one_line_and_its_code(number, word, delay):
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([MSMOE, "families"], preexec_fn=with_default_signals, **pipes)
    while process.poll() is None and not listens_to(process.pid, number):  # the interpreter itself has to start first
        time.sleep(0.002)
    time.sleep(delay)
    if process.poll() is None:
        process.send_signal(number)
        _, written = process.communicate()
        assert (process.returncode, written) == (128 + number, f"msmoe: {word}\n")


BUSY = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor
from msmoe.cli.signals import interruptible

def work():
    with ThreadPoolExecutor(1) as pool:
        pool.submit(threading.Event().wait)
        print("busy", flush=True)
        threading.Event().wait()

interruptible(work)
"""


def test_a_pool_that_never_ends_does_not_hold_a_signal_up():
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "busy\n"
    process.send_signal(signal.SIGTERM)
    _, written = process.communicate(timeout=20)
    assert (process.returncode, written) == (143, "msmoe: terminated\n")


FORKS = """
import os, signal, time
from msmoe.cli.signals import interruptible

def work():
    ready, started = os.pipe()
    child = os.fork()
    if not child:
        os.write(started, b"1")
        time.sleep(30)
        os._exit(0)
    os.read(ready, 1)
    os.kill(child, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    time.sleep(3)
    print("alive")

interruptible(work)
"""


def test_a_signal_to_a_fork_is_none_to_its_parent():
    result = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("-15\nalive\n", "")


def test_a_report_of_statistics_alone_needs_no_torch(stats, tmp_path):
    stats.save(tmp_path / "stats")
    found, printed = imported_by("report", tmp_path / "stats", "--out", tmp_path / "page.html")
    assert "wrote" in printed
    assert not found & {"torch", "transformers", "sklearn"}


def test_inspect_reads_headers_without_torch_or_numpy(switch):
    found, printed = imported_by("inspect", switch)
    assert "switch_transformers" in printed
    assert not found & {"torch", "transformers", "numpy", "pandas", "scipy"}


def test_the_table_of_methods_needs_no_arithmetic():
    found, printed = imported_by("methods")
    assert "m-smoe-refit" in printed
    assert not found & {"torch", "transformers", "numpy", "pandas", "scipy", "safetensors"}
