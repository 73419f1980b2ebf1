"""Devices, precisions, and running out of memory."""

import pytest
import torch

from msmoe.device import choose_device, choose_dtype, memory_explained
from msmoe.errors import UserError


def test_auto_is_cuda_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("cuda")


def test_auto_is_the_cpu_elsewhere(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")


def test_auto_runs_in_float32():
    assert choose_dtype("auto") == torch.float32


@pytest.mark.parametrize("name", ["abacus", "meta", "cpu:x", ""])
def test_a_device_that_cannot_be_used_is_named(name):
    with pytest.raises(UserError, match=f"device '{name}' cannot be used: .*; choose auto, cpu or one that is there"):
        choose_device(name)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")])
def test_running_out_of_memory_says_what_to_lower(error):
    with (
        pytest.raises(UserError, match="memory is too small: lower --batch-size"),
        memory_explained("lower --batch-size"),
    ):
        raise error


def test_a_request_beyond_the_machine_says_what_to_lower():
    with pytest.raises(UserError, match="the machine's memory is too small: lower it"), memory_explained("lower it"):
        torch.empty(2**50)


def test_other_faults_keep_their_traceback():
    with pytest.raises(RuntimeError, match="size"), memory_explained("lower it"):
        torch.empty(3) @ torch.empty(4)
