"""Checkpoints, calibration data and statistics that many tests share; none of them may be changed by a test."""

import os
import shutil

import pytest
import torch
from tiny import compress, profile_small, random_records, save_switch, write_records

from msmoe.compression.factorize import factorize

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def switch(tmp_path_factory):
    """Float32 checkpoint: 4 + 4 blocks, every second one sparse, 6 experts, tied embeddings."""
    return save_switch(tmp_path_factory.mktemp("switch") / "ckpt")


@pytest.fixture(scope="session")
def dropping_switch(tmp_path_factory):
    """As `switch`, with room for two tokens per expert and sequence: tokens drop."""
    return save_switch(tmp_path_factory.mktemp("dropping") / "ckpt", expert_capacity=2)


@pytest.fixture(scope="session")
def records():
    return random_records(40)


@pytest.fixture(scope="session")
def data(tmp_path_factory, records):
    return write_records(tmp_path_factory.mktemp("data") / "calibration.jsonl", records)


@pytest.fixture(scope="session")
def stats(switch, data):
    return profile_small(switch, data)


@pytest.fixture(scope="session")
def full_stats(switch, data):
    """`stats` with everything that any method may need."""
    return profile_small(switch, data, fisher=64, gradients=True)


@pytest.fixture(scope="session")
def dropping_stats(dropping_switch, data):
    return profile_small(dropping_switch, data)


@pytest.fixture(scope="session")
def exact(switch, stats, tmp_path_factory):
    """`exact` export of `switch` by the default method, 3 experts on average."""
    out = tmp_path_factory.mktemp("exact") / "out"
    compress(switch, stats, out)
    return out


@pytest.fixture(scope="session")
def native(switch, stats, tmp_path_factory):
    """`native` export of `switch`, 3 experts in every layer."""
    out = tmp_path_factory.mktemp("native") / "out"
    compress(switch, stats, out, export="native")
    return out


@pytest.fixture(scope="session")
def factorized(exact, stats, tmp_path_factory):
    """`exact`, its experts at rank 4 with a tenth of their rows kept; the first layer is dense."""
    out = tmp_path_factory.mktemp("factorized") / "out"
    factorize(exact, out, stats=stats, rank=4, workers=1)
    return out


@pytest.fixture
def copied(switch, tmp_path):
    """A copy of `switch` that a test may damage."""
    return shutil.copytree(switch, tmp_path / "copied")
