"""Published sizes: switch-base-32, eight experts on average, rank 32 and a tenth of the rows, from headers alone."""

import json
import struct

import pytest
import torch
from tiny import layer_plan, plan_for
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from msmoe.checkpoint import Checkpoint
from msmoe.errors import UserError
from msmoe.families import family_of
from msmoe.families.inspection import inspect
from msmoe.planning.planner import predict

EXPERT = 2 * 768 * 3072
OTHERS = 166_575_360  # embeddings, attention, dense feed-forward, norms and the routers


@pytest.fixture(scope="module")
def base32(tmp_path_factory):
    """A folder with the configuration and the tensor names of switch-base-32, and a hole in place of the weights."""
    config = SwitchTransformersConfig(
        d_model=768, d_ff=3072, d_kv=64, num_heads=12, num_layers=12, num_decoder_layers=12, num_experts=32,
        num_sparse_encoder_layers=6, num_sparse_decoder_layers=6, vocab_size=32128,
    )  # fmt: skip
    with torch.device("meta"):
        model = SwitchTransformersForConditionalGeneration(config)
    header, end = {}, 0
    for name, parameter in model.named_parameters():
        size = 4 * parameter.numel()
        header[name] = {"dtype": "F32", "shape": list(parameter.shape), "data_offsets": [end, end + size]}
        end += size
    folder = tmp_path_factory.mktemp("geometry") / "switch-base-32"
    config.save_pretrained(folder)
    text = json.dumps(header).encode()
    file = folder / "model.safetensors"
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)
    yield folder
    file.unlink()


@pytest.fixture(scope="module")
def layers(base32):
    """Layer -> groups, 88 in all: the first layer of the encoder is kept, the others keep six or ten, one of them 8."""
    names = [layer.name for layer in inspect(base32).layers]
    counts = [6, 10] * 5 + [8]
    return {
        name: layer_plan(32, *(list(range(g, 32, count)) for g in range(count)))
        for name, count in zip(names[1:], counts, strict=True)
    }


def predicted(folder, layers, **parameters):
    source = Checkpoint(folder)
    return predict(family_of(source), source, plan_for(source, layers, **parameters), export="exact").predicted


def test_the_checkpoint_has_the_published_size(base32):
    assert inspect(base32).num_parameters == OTHERS + 12 * 32 * EXPERT == 1_978_514_688


def test_merging_to_eight_experts_keeps_732_8_million_parameters(base32, layers):
    size = predicted(base32, layers)
    assert size["num_parameters"] == OTHERS + (32 + 88) * EXPERT == 732_806_400
    assert size["bytes"] == 4 * 732_806_400 + 12 * 32 * 8  # and twelve maps


def test_factorising_keeps_380_7_million_parameters_and_indices_in_the_bytes_only(base32, layers):
    size = predicted(base32, layers, rank=32, keep_rows=0.1)
    # wi: 307 rows of 768, wo: 77 rows of 3072; rank 32 of 768 + 3072
    expert = 2 * 32 * (768 + 3072) + 307 * 768 + 77 * 3072
    assert size["num_parameters"] == OTHERS + 32 * EXPERT + 88 * expert == 380_761_344
    fractional = OTHERS + 32 * EXPERT + 88 * (2 * 32 * 3840 + 0.1 * EXPERT)  # as published: a tenth, not whole rows
    assert size["num_parameters"] == pytest.approx(fractional, rel=2e-4)
    assert size["bytes"] == 4 * 380_761_344 + 88 * (307 + 77) * 4 + 12 * 32 * 8


def test_a_budget_that_no_rank_can_meet_is_refused_with_the_size_of_rank_one(base32, layers):
    smallest = 4 * (OTHERS + 32 * EXPERT + 88 * 2 * (768 + 3072)) + 12 * 32 * 8
    with pytest.raises(UserError, match=f"smallest possible model: {smallest:,} bytes"):
        predicted(base32, layers, target_bytes=10**9)
