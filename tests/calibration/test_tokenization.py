"""Records as token ids: padding by mask and by value, cuts, conversations, and tokenizers that do not fit."""

import json
import shutil

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from msmoe.calibration.records import DataError, DataWarning, read_records
from msmoe.calibration.spans import TokenRecord
from msmoe.calibration.tokenization import tokenize
from msmoe.calibration.tokenizer import load_tokenizer, special_tokens
from msmoe.demo import CHECKPOINT
from msmoe.errors import UserError

TURNS = [
    {"role": "system", "content": "be brief"}, {"role": "user", "content": "w1 w2"},
    {"role": "assistant", "content": "w3"}, {"role": "user", "content": "w4"},
    {"role": "assistant", "content": "w5 w6"}, {"role": "user", "content": "w7"},
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    """Words w0 to w49 are 8 to 57; `</s>`, 1, ends every sequence."""
    words = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{i}>" for i in range(5)), *(f"w{i}" for i in range(50))]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    core.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def tokens(record: dict, **options) -> TokenRecord:
    [result] = tokenize(read_records([record]), None, **options)
    return result


@pytest.mark.parametrize(
    "labels", [[7, 8, 0, 0], [7, 8, -100, -100], [7, 8, 0, -100], [0, 0, 7, 8], [-100, 7, 8], [0, -100, 7, 8, -100, 0]]
)
def test_padding_of_labels_is_removed_at_either_end_whatever_it_is_made_of(labels):
    assert tokens({"input_ids": [5], "labels": labels}, pad_id=0, eos_id=1).labels == [7, 8]


@pytest.mark.parametrize("inputs", [[5, 6, 0, 0], [0, 0, 5, 6], [0, 5, 6, 0]])
def test_padding_of_inputs_is_removed_at_either_end(inputs):
    assert tokens({"input_ids": inputs, "labels": [7]}, pad_id=0, eos_id=1).input_ids == [5, 6]


@pytest.mark.parametrize(
    ("mask", "expected"), [([1, 1, 1, 0], [0, 5, 0]), ([0, 1, 1, 1], [5, 0, 0]), ([1, 1, 1, 1], [0, 5, 0, 0])]
)
def test_the_mask_says_what_is_padding_not_the_value(mask, expected):
    record = {"input_ids": [0, 5, 0, 0], "attention_mask": mask, "labels": [7]}
    assert tokens(record, pad_id=0, eos_id=1).input_ids == expected


def test_labels_have_a_mask_too():
    record = {"input_ids": [5], "labels": [7, 0, 0], "decoder_attention_mask": [1, 1, 0]}
    assert tokens(record, pad_id=0, eos_id=1).labels == [7, 0]


@pytest.mark.parametrize(
    ("padded", "expected"), [([5, 6, 2, 2, 2], [5, 6, 2]), ([2, 2, 5, 6, 2], [5, 6, 2]), ([5, 6], [5, 6])]
)
def test_where_padding_is_the_end_of_sequence_one_of_it_ends_the_sequence(padded, expected):
    record = tokens({"input_ids": padded, "labels": padded}, pad_id=2, eos_id=2)
    assert record == TokenRecord(expected, expected)


def test_a_record_of_padding_is_left_out_and_counted():
    records = read_records([{"input_ids": [0, 0], "labels": [5]}, {"input_ids": [5], "labels": [6]}])
    with pytest.warns(DataWarning, match="1 of 2 records are blank, padding or too short: skipped"):
        result = tokenize(records, None)
    assert (result, result.kept) == ([TokenRecord([5], [6])], [1])


def test_a_text_too_short_for_span_corruption_is_left_out(tokenizer):
    with pytest.warns(DataWarning, match="1 of 2 records"):
        assert tokenize([{"text": "w1"}, {"text": "w1 w2 w3"}], tokenizer).kept == [1]


TEXT = {"source": "w0 w1 w2 w3", "target": "w4 w5 w6"}
IDS = {"input_ids": [8, 9, 10, 11, 1], "labels": [12, 13, 14, 1]}


@pytest.mark.parametrize("record", [TEXT, IDS])
def test_a_cut_keeps_the_end_of_sequence_and_is_counted(record, tokenizer):
    with pytest.warns(DataWarning) as caught:
        result = tokenize([record], tokenizer, max_source_length=3, max_target_length=2)
    assert result == [TokenRecord([8, 9, 1], [12, 1])]
    assert result.num_cut == {"sources": 1, "targets": 1}
    assert result.longest_target == 4
    assert [str(w.message) for w in caught] == [
        "1 of 1 sources were cut to 3 tokens (--max-source-length)",
        "1 of 1 targets were cut to 2 tokens (--max-target-length)",
    ]


@pytest.mark.parametrize("record", [TEXT, IDS])
@pytest.mark.parametrize("length", [5, None])
def test_what_fits_is_not_cut(record, length, tokenizer):
    result = tokenize([record], tokenizer, max_source_length=length, max_target_length=length)
    assert result == [TokenRecord(IDS["input_ids"], IDS["labels"])]
    assert result.num_cut == {"sources": 0, "targets": 0}


def test_a_conversation_is_what_led_to_the_last_answer_and_that_answer(tokenizer):
    rendered = {"source": "system: be brief\nuser: w1 w2\nassistant: w3\nuser: w4\nassistant:", "target": "w5 w6"}
    assert tokenize(read_records([{"messages": TURNS}]), tokenizer) == tokenize([rendered], tokenizer)


def test_a_conversation_of_one_question_is_the_question(tokenizer):
    turns = [{"role": "human", "content": [{"type": "text", "text": "w1"}]}, {"role": "gpt", "content": "w2"}]
    assert tokenize(read_records([{"messages": turns}]), tokenizer) == [TokenRecord([9, 1], [10, 1])]


def test_a_conversation_goes_through_the_chat_template_of_the_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    own = load_tokenizer(tmp_path)
    own.chat_template = (
        "{% for m in messages %}w9 {{ m.content }} {% endfor %}{% if add_generation_prompt %}w10{% endif %}"
    )
    turns = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    # w9 w1 w10 and the end of sequence
    assert tokenize(read_records([{"messages": turns}]), own) == [TokenRecord([17, 9, 18, 1], [10, 1])]


def test_messages_that_a_template_refuses_are_named(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    own = load_tokenizer(tmp_path)
    own.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="record 1: the tokenizer's chat template refuses the messages: roles must"):
        tokenize(read_records([{"messages": TURNS}]), own)


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [("hello", "must be a list of objects"), ([{"role": "user"}, 5], "must be a list of objects"),
     ([{"role": 5, "content": "x"}], "message 1 must have a role and a content, both texts")],
)  # fmt: skip
def test_malformed_messages_are_named(messages, complaint):
    with pytest.raises(DataError, match=f"record 1: .*{complaint}"):
        read_records([{"messages": messages}])


def test_a_tokenizer_with_more_tokens_than_the_model_is_named(tokenizer):
    with pytest.raises(
        DataError, match="record 1: token id 57 is outside the vocabulary of 40; the tokenizer is not this"
    ):
        tokenize([{"source": "w1 w49", "target": "w2"}], tokenizer, vocab_size=40)


# What a tokenizer's and a model's files say


@pytest.fixture
def files(tmp_path):
    """The tokenizer files of the embedded checkpoint, to be damaged."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINT / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_git_lfs_pointer_is_named(name, files):
    (files / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(UserError, match=f"{name} cannot be read: it is a git-lfs pointer"):
        load_tokenizer(files)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a":' * 50_000, "\ud800"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_file_that_is_no_json_object_is_named(name, content, files):
    (files / name).write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(UserError, match=name):
        load_tokenizer(files)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("model"), lambda t: t.update(model=5), lambda t: t["model"].update(type="Nope"),
        lambda t: t["model"].update(vocab=None), lambda t: t.update(added_tokens=7), lambda t: t.clear(),
    ],
)  # fmt: skip
def test_a_damaged_tokenizer_is_one_line(change, files):
    content = json.loads((files / "tokenizer.json").read_text())
    change(content)
    (files / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"the tokenizer of {files} cannot be loaded"):
        load_tokenizer(files)


def test_a_folder_without_tokenizer_has_none(tmp_path):
    assert load_tokenizer(tmp_path) is None


GOOD = {"vocab_size": 64, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"decoder_start_token_id": None}, "decoder_start_token_id is missing: set it .*start with the pad token"),
        ({"pad_token_id": None}, "pad_token_id is missing: set it to the token's id$"),
        ({"pad_token_id": 64}, r"pad_token_id must be an integer from 0 to 63 \(vocab_size 64\), got 64"),
        ({"eos_token_id": -1}, "eos_token_id must be .* got -1"),
        ({"eos_token_id": True}, "eos_token_id must be .* got True"),
        ({"eos_token_id": [1, 2]}, r"eos_token_id must be .* got \[1, 2\]"),
        ({"vocab_size": "64"}, "vocab_size must be a positive integer, got '64'"),
    ],
)
def test_special_tokens_that_no_model_can_use_are_named(change, complaint):
    with pytest.raises(UserError, match=rf"config\.json: {complaint}"):
        special_tokens(GOOD | change, "config.json")


def test_special_tokens_that_a_configuration_leaves_out_are_those_of_t5():
    special = special_tokens({"decoder_start_token_id": 0}, "config.json")
    assert (special.pad_id, special.eos_id, special.vocab_size) == (0, 1, 32128)


@pytest.mark.parametrize(("name", "length"), [("max_source_length", 0), ("max_target_length", -1)])
def test_a_length_below_one_is_refused(name, length):
    with pytest.raises(DataError, match=f"{name} must be at least 1, got {length}"):
        tokenize([{"input_ids": [3, 4], "labels": [5]}], None, **{name: length})
