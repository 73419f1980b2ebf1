"""The state of a run and its log on disk: what comes back, and what becomes of damage."""

import contextlib
import json
import os
import resource

import pytest
import torch
from tiny import bits
from torch import nn

from msmoe.errors import UserError
from msmoe.recovery.log import MetricsLog
from msmoe.recovery.state import load_tensors, optimizer_tensors, restore, save_tensors


@contextlib.contextmanager
def small_files():
    """A limit of 4,000 bytes per file, as a disk with little room has one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_tensors_and_their_record_come_back_bit_for_bit(tmp_path):
    tensors = {
        "half": torch.tensor([[1.5, -0.0], [3e38, 1e-40]]).bfloat16(),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "mask": torch.tensor([1, 0], dtype=torch.uint8),
        "none": torch.empty(2, 0, 3),
    }
    about = {"step": 7, "best_loss": float("inf"), "first": 0.1}
    save_tensors(tmp_path / "state.safetensors", tensors, about)
    read, read_about = load_tensors(tmp_path / "state.safetensors")
    assert {k: (t.shape, t.dtype, bits(t)) for k, t in read.items()} == {
        k: (t.shape, t.dtype, bits(t)) for k, t in tensors.items()
    }
    assert read_about == about


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:5], lambda b: b"", lambda b: b"x" * len(b)])
def test_a_damaged_state_is_named(damage, tmp_path):
    file = tmp_path / "state-00000003.safetensors"
    save_tensors(file, {"a": torch.ones(100)}, {"step": 3})
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=r"state-00000003\.safetensors is damaged: .*start without --resume"):
        load_tensors(file)


def test_a_file_of_other_tensors_is_no_state(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(3)}, tmp_path / "state.safetensors")
    with pytest.raises(UserError, match=r"state\.safetensors is damaged"):
        load_tensors(tmp_path / "state.safetensors")


def test_a_state_that_does_not_fit_leaves_the_one_before(tmp_path):
    file = tmp_path / "state.safetensors"
    save_tensors(file, {"a": torch.ones(10)}, {"step": 1})
    with small_files(), pytest.raises(UserError, match=r"cannot write .*state\.safetensors"):
        save_tensors(file, {"a": torch.ones(2000)}, {"step": 2})
    assert load_tensors(file)[1] == {"step": 1}


def test_a_state_in_a_folder_that_is_gone_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*gone/state\.safetensors"):
        save_tensors(tmp_path / "gone" / "state.safetensors", {"a": torch.ones(3)}, {})


def network() -> tuple[dict[str, nn.Parameter], torch.optim.AdamW]:
    torch.manual_seed(0)
    parameters = {name: nn.Parameter(torch.randn(3, 2)) for name in ("used", "rare", "never")}
    return parameters, torch.optim.AdamW(parameters.values(), lr=0.1)


def train(parameters, optimizer, steps) -> None:
    """A function whose gradients differ from step to step; `rare` has one in step 3 and later, `never` has none."""
    for step in steps:
        loss = (parameters["used"] * (step + 1)).sin().sum()
        if step >= 3:
            loss = loss + (parameters["rare"] ** 3).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("cut", [2, 5])
def test_a_restored_optimiser_goes_on_bit_for_bit(cut, tmp_path):
    parameters, optimizer = network()
    train(parameters, optimizer, range(cut))
    save_tensors(tmp_path / "state", optimizer_tensors(parameters, optimizer), {})
    train(parameters, optimizer, range(cut, 9))
    others, other = network()
    restore(others, other, load_tensors(tmp_path / "state")[0])
    train(others, other, range(cut, 9))
    assert {k: bits(p.detach()) for k, p in others.items()} == {k: bits(p.detach()) for k, p in parameters.items()}


def steps_in(file) -> list[int]:
    return [json.loads(line)["step"] for line in file.read_text().splitlines()]


def write_steps(log: MetricsLog, steps) -> None:
    for step in steps:
        log.write(step, loss=step / 10)
    log.close()


def test_a_resumed_log_drops_what_came_after_the_state(tmp_path):
    write_steps(MetricsLog(tmp_path, resume_from=None), range(1, 8))
    write_steps(MetricsLog(tmp_path, resume_from=4), range(5, 10))
    assert steps_in(tmp_path / "metrics.jsonl") == list(range(1, 10))


def test_a_torn_last_line_is_dropped(tmp_path):
    write_steps(MetricsLog(tmp_path, resume_from=None), range(1, 6))
    file = tmp_path / "metrics.jsonl"
    os.truncate(file, file.stat().st_size - 9)
    write_steps(MetricsLog(tmp_path, resume_from=4), [5])
    assert steps_in(file) == [1, 2, 3, 4, 5]


def test_a_fresh_log_keeps_nothing_of_an_older_one(tmp_path):
    write_steps(MetricsLog(tmp_path, resume_from=None), range(1, 6))
    write_steps(MetricsLog(tmp_path, resume_from=None), [1, 2])
    assert steps_in(tmp_path / "metrics.jsonl") == [1, 2]
