"""What an exception means to the one who typed the command."""

import errno
import warnings

import click
import pytest
import torch

from msmoe.cli.console import print_warnings_as_lines
from msmoe.cli.faults import explain
from msmoe.errors import UserError, warn


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    ],
)
def test_too_little_memory_is_said_with_what_to_lower(error):
    command = click.Command("profile", params=[click.Option(["--batch-size"]), click.Option(["--token-sample"])])
    with click.Context(command):
        line = explain(error)
    assert line.startswith("out of memory: lower --batch-size or --token-sample")


def test_a_full_disk_is_said_with_the_file():
    line = explain(OSError(errno.ENOSPC, "No space left on device", "/data/out"))
    assert line.startswith("/data/out: No space left on device")


def test_a_full_disk_is_seen_behind_the_words_of_a_rust_library():
    assert "No space left" in explain(RuntimeError("I/O error: No space left on device (os error 28)"))


def test_a_limit_of_file_sizes_is_said_with_how_to_raise_it():
    assert "ulimit -f" in explain(OSError(errno.EFBIG, "File too large"))


def test_a_mistake_of_the_caller_becomes_one_line():
    assert explain(UserError("two\nlines")) == "two lines"


@pytest.mark.parametrize("error", [ValueError("ours"), RuntimeError("shape mismatch"), OSError(errno.EINVAL, "x")])
def test_a_fault_of_ours_keeps_its_traceback(error):
    assert explain(error) is None


def test_a_warning_of_the_package_is_a_line_and_one_of_a_library_is_nothing(capsys):
    with print_warnings_as_lines():
        warn("mind the gap")
        warnings.warn("deprecated in a library", FutureWarning, stacklevel=1)
    assert capsys.readouterr().err == "msmoe: warning: mind the gap\n"
