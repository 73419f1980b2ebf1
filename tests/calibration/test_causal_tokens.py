"""Records as token ids of decoder-only models: what is given, what is wanted, cuts, padding and conversations."""

import pytest
from tiny_decoder import BOS, CHAT, EOS, byte_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    SwitchTransformersConfig,
    T5Config,
)

from msmoe.calibration.batches import collate, collate_prompts
from msmoe.calibration.causal import CausalReader, prompt_length
from msmoe.calibration.records import DataError, DataWarning, kind_of, read_records
from msmoe.calibration.spans import TokenRecord
from msmoe.calibration.tokenization import tokenize
from msmoe.calibration.tokenizer import is_causal, special_tokens
from msmoe.errors import UserError

TURNS = [
    {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"},
    {"role": "assistant", "content": "de"},
]  # fmt: skip


def words(template: str) -> PreTrainedTokenizerFast:
    """Words w0 to w29 are 4 to 33; `<s>` is 1, `</s>` 2."""
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(30))]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    core.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def tokenizer():
    return words("<s> $A")


def read(record: dict, tokenizer=None, **options) -> TokenRecord:
    [result] = tokenize(read_records([record]), tokenizer, causal=True, **options)
    return result


# What is wanted


@pytest.mark.parametrize(
    ("template", "ids"), [("<s> $A", [1, 5, 6]), ("$A", [5, 6]), ("<s> $A </s>", [1, 5, 6, 2]), ("$A </s>", [5, 6, 2])]
)
def test_of_a_text_every_token_but_the_first_is_wanted_and_nothing_is_added(template, ids):
    assert read({"text": "w1 w2"}, words(template)) == TokenRecord(ids, [-100, *ids[1:]])


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>"])
def test_of_a_pair_the_target_and_its_end_are_wanted(template):
    # <s> w1 w2 | w3 </s>
    assert read({"source": "w1 w2", "target": "w3"}, words(template)) == TokenRecord(
        [1, 5, 6, 7, 2], [-100, -100, -100, 7, 2]
    )


def test_a_source_keeps_an_end_of_sequence_that_it_holds_itself():
    assert read({"source": "w1 </s>", "target": "w3"}, words("<s> $A </s>")).input_ids == [1, 5, 2, 7, 2]


def test_a_text_of_one_token_is_left_out():
    with pytest.warns(DataWarning, match="1 of 2 records are blank, padding or too short"):
        assert tokenize([{"text": "w1"}, {"text": "w1 w2"}], words("$A"), causal=True).kept == [1]


def test_a_target_needs_an_end_of_sequence():
    plain = words("$A")
    plain.eos_token = None
    with pytest.raises(DataError, match="record 1: neither the tokenizer nor the model has an end of sequence"):
        read({"source": "w1", "target": "w2"}, plain)
    assert read({"source": "w1", "target": "w2"}, plain, eos_id=33).input_ids == [5, 6, 33]


def test_a_question_with_choices_wants_the_right_one(tokenizer):
    record = {"source": "w1", "choices": ["w2", "w3 w4"], "answer": 1}
    assert read(record, tokenizer) == read({"source": "w1", "target": "w3 w4"}, tokenizer)
    reader = CausalReader(tokenizer)
    assert reader.answer(record, "here", "w2", ends=False) == [6]


def test_a_text_needs_a_tokenizer():
    with pytest.raises(DataError, match="record 1 is text and the checkpoint has no tokenizer: use input_ids"):
        read({"text": "w1"})


def test_an_encoder_decoder_reads_choices_as_the_right_one_and_needs_labels():
    own = words("$A </s>")
    record = {"source": "w1", "choices": ["w2", "w3"], "answer": 1}
    assert tokenize(read_records([record]), own) == [TokenRecord([5, 2], [7, 2])]
    with pytest.raises(DataError, match="record 1 has no labels, which an encoder-decoder model needs"):
        tokenize(read_records([{"input_ids": [4, 5]}]), None)


# Conversations


def test_of_a_conversation_the_last_answer_is_wanted_as_the_template_closes_it():
    tokenizer = byte_tokenizer()
    record = read({"messages": TURNS}, tokenizer)
    text = "<|bos|><|user|>a<|eos|>\n<|assistant|>b<|eos|>\n<|user|>c<|eos|>\n<|assistant|>de<|eos|>"
    assert record.input_ids == tokenizer(text, add_special_tokens=False).input_ids
    at = prompt_length(record)
    assert tokenizer.decode(record.input_ids[at:]) == "de<|eos|>"  # the line's end after it is not wanted
    assert record.labels == [-100] * at + record.input_ids[at:]


def test_an_answer_that_no_end_of_sequence_closes_is_wanted_as_it_stands():
    tokenizer = byte_tokenizer(chat_template=CHAT.replace("<|eos|>", "##"))
    record = read({"messages": TURNS}, tokenizer)
    assert tokenizer.decode(record.input_ids[prompt_length(record) :]) == "de##\n"


def test_the_prompt_of_a_conversation_is_what_generation_starts_from():
    tokenizer = byte_tokenizer()
    prompt = tokenizer.apply_chat_template(TURNS[:3], add_generation_prompt=True, return_dict=False)
    record = read({"messages": TURNS}, tokenizer)
    assert record.input_ids[: prompt_length(record)] == prompt


def test_a_conversation_needs_a_chat_template():
    with pytest.raises(DataError, match="record 1 is a conversation and the tokenizer has no chat template"):
        read({"messages": TURNS}, byte_tokenizer(chat_template=None))


def test_a_template_that_writes_answers_otherwise_than_it_asks_for_them_is_named():
    template = CHAT.replace("<|assistant|>{% endif %}", "<|assistant|>think{% endif %}")
    with pytest.raises(DataError, match=r"record 1: the tokenizer's chat template writes .* ends with .*think"):
        read({"messages": TURNS}, byte_tokenizer(chat_template=template))


# Tokens


def test_without_labels_every_token_but_the_first_is_wanted():
    assert read({"input_ids": [5, 6, 7]}) == TokenRecord([5, 6, 7], [-100, 6, 7])


def test_labels_say_what_is_wanted():
    record = {"input_ids": [5, 6, 7, 8], "labels": [5, -100, 7, -100]}
    assert read(record) == TokenRecord([5, 6, 7, 8], [-100, -100, 7, -100])


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"input_ids": [0, 5, 6, 0], "attention_mask": [0, 1, 1, 0]}, [5, 6]),
        ({"input_ids": [0, 5, 6, 0], "attention_mask": [1, 1, 1, 1]}, [0, 5, 6, 0]),
        ({"input_ids": [0, 5, 6, 0, 0]}, [5, 6]),
        ({"input_ids": [0, 5, 6, 0], "labels": [-100, 5, 6, -100]}, [5, 6]),
        ({"input_ids": [5, 6, 0], "labels": [-100, 6, 0]}, [5, 6, 0]),  # the labels want it
    ],
)
def test_padding_is_what_the_mask_hides_or_the_pad_tokens_that_no_label_wants(record, expected):
    assert read(record, pad_id=0, eos_id=2).input_ids == expected


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"input_ids": [2, 5, 6, 2]}, [2, 5, 6, 2]),
        ({"input_ids": [2, 5, 2, 2], "labels": [-100, 5, 2, -100]}, [2, 5, 2]),
    ],
)
def test_an_end_of_sequence_that_also_pads_stays_unless_labels_leave_it_out(record, expected):
    assert read(record, pad_id=2, eos_id=2).input_ids == expected


def test_labels_of_another_length_are_refused():
    with pytest.raises(DataError, match="record 1: a decoder-only model needs a label for each of the 3 input_ids"):
        read({"input_ids": [5, 6, 7], "labels": [6, 7]})


def test_shifted_labels_are_refused():
    with pytest.raises(DataError, match=r"record 1: label 6 stands at input id 5: .* are not shifted"):
        read({"input_ids": [5, 6, 7], "labels": [6, 7, -100]})


def test_a_token_outside_the_vocabulary_is_refused():
    with pytest.raises(DataError, match="record 1: token id 64 is outside the vocabulary of 64"):
        read({"input_ids": [5, 64]}, vocab_size=64)


# Cuts


def test_a_text_is_cut_at_its_end(tokenizer):
    with pytest.warns(DataWarning, match="1 of 1 sources were cut to 3 tokens"):
        result = tokenize([{"text": "w1 w2 w3"}], tokenizer, causal=True, max_source_length=3, max_target_length=1)
    assert result == [TokenRecord([1, 5, 6], [-100, 5, 6])]
    assert result.num_cut == {"sources": 1, "targets": 0}


def test_a_prompt_is_cut_at_its_start_and_an_answer_at_its_end(tokenizer):
    with pytest.warns(DataWarning) as caught:
        result = tokenize(
            [{"source": "w1 w2 w3", "target": "w4 w5 w6"}], tokenizer, causal=True, max_source_length=3,
            max_target_length=2,
        )  # fmt: skip
    # <s> w2 w3 | w4 </s>: the tokens that start and end sequences stay
    assert result == [TokenRecord([1, 6, 7, 8, 2], [-100, -100, -100, 8, 2])]
    assert result.num_cut == {"sources": 1, "targets": 1}
    assert result.longest_target == 4
    assert [str(w.message).split(" (")[0] for w in caught] == [
        "1 of 1 sources were cut to 3 tokens", "1 of 1 targets were cut to 2 tokens",
    ]  # fmt: skip


def test_a_prompt_may_be_cut_to_a_single_token():
    with pytest.warns(DataWarning):
        assert read({"source": "w1 w2", "target": "w3"}, words("$A"), max_source_length=1).input_ids == [6, 7, 2]


def test_a_pair_of_a_single_source_token_is_no_text():
    with pytest.warns(DataWarning, match="targets were cut to 2"):
        cut = read({"source": "w1", "target": "w2 w3"}, words("$A"), max_source_length=1, max_target_length=2)
    assert cut == TokenRecord([5, 6, 2], [-100, 6, 2])


# Batches


def test_records_are_padded_on_the_right_and_prompts_on_the_left():
    batch = collate([TokenRecord([5, 6, 7], [-100, 6, 7]), TokenRecord([8, 9], [-100, 9])], pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]
    prompts = collate_prompts([[5, 6, 7], [8, 9]], pad_id=0)
    assert prompts["input_ids"].tolist() == [[5, 6, 7], [0, 8, 9]]
    assert prompts["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]


# Records


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"choices": "ab"}, "choices must be a list of at least two strings"),
        ({"choices": ["a"]}, "choices must be a list of at least two strings"),
        ({"choices": ["a", 5]}, "choices must be a list of at least two strings"),
        ({"choices": ["a", " "]}, "choices must not be blank, got ' '"),
        ({"answer": 2}, "answer must be the position of a choice, from 0 to 1, got 2"),
        ({"answer": -1}, "answer must be the position of a choice"),
        ({"answer": True}, "answer must be the position of a choice"),
        ({"answer": "1"}, "answer must be the position of a choice, from 0 to 1, got '1'"),
    ],
)
def test_choices_that_cannot_be_used_are_named(change, complaint):
    with pytest.raises(DataError, match=f"record 1: {complaint}"):
        read_records([{"source": "q", "choices": ["a", "b"], "answer": 0} | change])


def test_choices_are_read_from_columns_of_text(tmp_path):
    (tmp_path / "d.csv").write_text('q,options,right\nwhy,"[""a"", ""b""]",1\n')
    [record] = read_records(
        tmp_path / "d.csv", columns={"source": "q", "choices": "options", "answer": "right"}
    )  # fmt: skip
    assert dict(record) == {"source": "why", "choices": ["a", "b"], "answer": 1}
    assert kind_of(record) == "choices"


def test_ids_with_null_for_labels_are_blank_and_ids_alone_are_not():
    assert kind_of({"input_ids": [1], "labels": None}) is None
    assert kind_of({"input_ids": [1]}) == "ids"


# Special tokens


def test_configurations_say_whether_they_are_of_a_decoder():
    assert is_causal(Qwen3MoeConfig())
    assert is_causal(Qwen3MoeConfig().to_dict())
    assert is_causal(MixtralConfig().to_diff_dict())
    for config in (SwitchTransformersConfig(), T5Config()):
        assert not is_causal(config)
        assert not is_causal(config.to_dict())
        assert not is_causal(config.to_diff_dict())
    assert not is_causal({"model_type": "t5", "decoder_start_token_id": 0})


@pytest.mark.parametrize(
    ("config", "pad_id", "eos_ids"),
    [
        ({"eos_token_id": 2}, 2, (2,)), ({"eos_token_id": [5, 3]}, 5, (5, 3)), ({}, 0, ()),
        ({"pad_token_id": 7, "eos_token_id": 2}, 7, (2,)), ({"pad_token_id": None, "eos_token_id": 3}, 3, (3,)),
    ],
)  # fmt: skip
def test_a_decoder_may_name_no_pad_token_and_several_ends(config, pad_id, eos_ids):
    special = special_tokens({"vocab_size": 64, **config}, "config.json")
    assert (special.pad_id, special.eos_ids, special.start_id, special.vocab_size) == (pad_id, eos_ids, None, 64)
    assert special.eos_id == (eos_ids[0] if eos_ids else None)
    assert special.is_causal


def test_a_configuration_of_several_models_keeps_the_tokens_with_the_language_model():
    special = special_tokens({"text_config": {"vocab_size": 9, "eos_token_id": [4]}, "eos_token_id": 5}, "config.json")
    assert (special.vocab_size, special.eos_ids) == (9, (5,))


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({}, "vocab_size must be a positive integer, got None"),
        ({"vocab_size": 8, "eos_token_id": [2, 8]}, r"eos_token_id must be an integer from 0 to 7 .*, got 8"),
        ({"vocab_size": 8, "eos_token_id": "2"}, "eos_token_id must be an integer from 0 to 7 .*, got '2'"),
        ({"vocab_size": 8, "pad_token_id": -1}, "pad_token_id must be an integer from 0 to 7 .*, got -1"),
    ],
)
def test_tokens_that_a_decoder_cannot_use_are_named(config, complaint):
    with pytest.raises(UserError, match=rf"config\.json: {complaint}"):
        special_tokens(config, "config.json")


def test_the_byte_tokenizer_is_what_the_tests_take_it_for():
    assert byte_tokenizer()("a").input_ids[0] == BOS
    assert byte_tokenizer().eos_token_id == EOS
