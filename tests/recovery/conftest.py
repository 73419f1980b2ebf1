"""Checkpoints and data that several tests recover; none of them may be changed by a test."""

import os

import pytest
import torch
from tiny import layer_plan, plan_for, save_switch, write_records
from transformers import T5Config, T5ForConditionalGeneration
from trials import LAYERS, QUIET, lesson

from msmoe.checkpoint import Checkpoint
from msmoe.compression.apply import apply
from msmoe.compression.factorize import factorize

os.environ["ACCELERATE_USE_CPU"] = "1"


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """Float32 Switch checkpoint: 2 + 2 blocks, every second one sparse, 4 experts, no dropout, no router noise."""
    return save_switch(tmp_path_factory.mktemp("teacher") / "ckpt", **QUIET)


@pytest.fixture(scope="session")
def student(teacher, tmp_path_factory):
    """`exact` export of `teacher`, 2 experts per layer."""
    out = tmp_path_factory.mktemp("student") / "out"
    apply(teacher, plan_for(Checkpoint(teacher), {name: layer_plan(4, [0, 1], [2, 3]) for name in LAYERS}), out)
    return out


@pytest.fixture(scope="session")
def factorised(student, tmp_path_factory):
    """`student` with experts of rank 4 and half of their rows: wi (24, 16) keeps 12, wo (16, 24) keeps 8."""
    out = tmp_path_factory.mktemp("factorised") / "out"
    factorize(student, out, rank=4, keep_rows=0.5, keep_layers=["none"])
    return out


@pytest.fixture(scope="session")
def crowded(tmp_path_factory):
    """As `teacher`, with so many experts that every batch leaves some without a token."""
    return save_switch(tmp_path_factory.mktemp("crowded") / "ckpt", **QUIET | {"num_experts": 12})


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    """A T5 checkpoint of the same vocabulary, no dropout."""
    torch.manual_seed(5)
    config = T5Config(
        vocab_size=64, d_model=16, d_kv=4, d_ff=24, num_heads=4, num_layers=2, dropout_rate=0.0, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    out = tmp_path_factory.mktemp("dense") / "ckpt"
    T5ForConditionalGeneration(config).save_pretrained(out)
    return out


@pytest.fixture(scope="session")
def lessons(tmp_path_factory):
    """Training data: 48 records."""
    return write_records(tmp_path_factory.mktemp("lessons") / "train.jsonl", lesson(48))
