"""Model cards: metadata that the hub reads, taken over from the source, and a warning where one is due."""

import shutil

import pytest
from huggingface_hub import ModelCard, metadata_load
from tiny import compress

from msmoe.compression.card import hub_id, source_metadata
from msmoe.compression.factorize import factorize

CARD = """---
license: other
license_name: research
license_link: https://example.org/licence
language: [en, de]
base_model: someone/else
tags: [theirs]
---
# A model
"""


@pytest.fixture
def carded(switch, tmp_path):
    """A folder of the hub's cache: `owner/tiny-switch` with a card of its own."""
    folder = tmp_path / "models--owner--tiny-switch" / "snapshots" / "0123abc"
    shutil.copytree(switch, folder)
    (folder / "README.md").write_text(CARD)
    return folder


def card_of(folder) -> dict:
    return metadata_load(folder / "README.md")


def test_a_card_has_the_metadata_by_which_the_hub_lists_a_model(exact):
    card = ModelCard.load(exact / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert {"msmoe", "mixture-of-experts", "text2text-generation"} <= set(card.data.tags)
    assert "license" not in card.data.to_dict()  # the source states none


def test_licence_and_languages_come_from_the_source_and_the_source_is_the_base_model(carded, stats, tmp_path):
    compress(carded, stats, tmp_path / "out")
    found = card_of(tmp_path / "out")
    assert (found["license"], found["license_name"], found["language"]) == ("other", "research", ["en", "de"])
    assert found["base_model"] == "owner/tiny-switch"
    assert "theirs" not in found["tags"]


def test_a_checkpoint_made_of_an_exports_keeps_its_base_model(carded, stats, tmp_path):
    compress(carded, stats, tmp_path / "out")
    factorize(tmp_path / "out", tmp_path / "small", rank=4, workers=1)
    assert card_of(tmp_path / "small")["base_model"] == "owner/tiny-switch"
    assert card_of(tmp_path / "small")["license"] == "other"


def test_a_plain_folders_own_base_model_is_not_taken_for_the_outputs(carded, tmp_path):
    plain = shutil.copytree(carded, tmp_path / "plain")
    assert source_metadata(plain) == {
        "license": "other", "license_name": "research", "license_link": "https://example.org/licence",
        "language": ["en", "de"],
    }  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no metadata",
        "---\nlicense: [\n---\n",
        "---\n- a list\n---\n",
        "---\nlicense: 7\nlanguage: [1]\ndatasets: []\n---\n",
    ],
)
def test_a_card_that_cannot_be_read_gives_nothing(text, tmp_path):
    (tmp_path / "README.md").write_text(text)
    assert source_metadata(tmp_path) == {}


def test_a_card_that_is_no_text_gives_nothing(tmp_path):
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\xfe\n---\n")
    assert source_metadata(tmp_path) == {}


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("hub/models--google--switch-base-8/snapshots/abc", "google/switch-base-8"),
        ("hub/models--gpt2/snapshots/abc", "gpt2"),
        ("models/google/switch-base-8", None),
        ("hub/datasets--a--b/snapshots/abc", None),
        ("snapshots/abc", None),
    ],
)
def test_only_a_snapshot_of_the_cache_has_a_name_on_the_hub(folder, name, tmp_path):
    assert hub_id(tmp_path / folder) == name


def test_only_an_exact_export_warns_of_the_stock_class(exact, native):
    warning = "Do not load it with `SwitchTransformersForConditionalGeneration`"
    assert warning in (exact / "README.md").read_text()
    assert warning not in (native / "README.md").read_text()
    assert "trust_remote_code" not in (native / "README.md").read_text()
