"""Damages to the small files of a checkpoint: configuration, generation defaults, tokenizer."""

import json
from pathlib import Path

from damage import GONE, LFS, ODD, Expect, Table, Trial, as_folder, as_pipe, dump, load, remove, rewrite, text_damages
from world import save_tokenizer

RUNS = frozenset({"evaluate", "profile", "recover", "teacher", "compress"})  # commands that run the model
WRITES = frozenset(
    {"apply", "factorize", "recover", "teacher", "compress", "convert"}
)  # commands that write a checkpoint
READS = RUNS | WRITES
SIZES = (
    "d_ff", "d_model", "d_kv", "num_heads", "num_layers", "num_decoder_layers", "vocab_size", "num_experts",
    "relative_attention_num_buckets",
)  # fmt: skip
IDS = ("pad_token_id", "eos_token_id", "decoder_start_token_id")
EVIL = "open('pwned', 'w').close()\nclass Evil:\n    pass\n"

CONFIG = Table()
GENERATION = Table()
TOKENIZER = Table()


def config_of(trial: Trial) -> Path:
    return trial.path / "config.json"


def change(**fields) -> object:
    """Damage that sets fields of the configuration."""

    def do(trial: Trial) -> None:
        content = load(config_of(trial)) | {k: v for k, v in fields.items() if v is not GONE}
        rewrite(config_of(trial), dump({k: v for k, v in content.items() if fields.get(k) is not GONE}))

    return do


text_damages(CONFIG, config_of, what="config")
for key in SIZES:
    for label, value in ODD.items():
        CONFIG.row(f"{key} {label}", change(**{key: value}), by=RUNS)
    CONFIG.row(f"{key} missing", change(**{key: GONE}), Expect.SAME_OR_REFUSE, by=RUNS)
    CONFIG.row(f"{key} 63", change(**{key: 63}), by=RUNS)
for key in IDS:
    for label in ("negative", "a string", "a fraction", "huge", "beyond 64 bits", "NaN", "an object", "infinite"):
        CONFIG.row(f"{key} {label}", change(**{key: ODD[label]}), by=RUNS)
    CONFIG.row(f"{key} the size of the vocabulary", change(**{key: 64}), by=RUNS)
    CONFIG.row(f"{key} null", change(**{key: None}), Expect.SAME_OR_REFUSE, by=RUNS)
    CONFIG.row(f"{key} missing", change(**{key: GONE}), Expect.SAME_OR_REFUSE, by=RUNS)
    CONFIG.row(f"{key} a list", change(**{key: [1]}), Expect.EITHER)
for key, bad in {
    "expert_capacity": ("zero", "negative", "null", "a string", "a list", "NaN", "a fraction", "beyond 64 bits"),
    "layer_norm_epsilon": ("null", "a string", "NaN", "negative", "a list"),
    "dense_act_fn": ("null", "a string", "zero", "a list"),
    "model_type": ("null", "a string", "zero", "a list", "an object"),
    "router_dtype": ("a string", "a list", "zero"),
    "router_bias": ("true",),
    "dtype": ("a string", "a list", "huge", "an object"),
    "encoder_sparse_step": ("zero", "negative", "null", "a string", "a fraction"),
    "decoder_sparse_step": ("zero", "negative", "null", "a string", "a fraction"),
}.items():
    for label in bad:
        CONFIG.row(f"{key} {label}", change(**{key: ODD[label]}), by=RUNS)
for key in ("dropout_rate", "router_jitter_noise", "router_z_loss_coef", "router_aux_loss_coef", "initializer_factor",
            "relative_attention_max_distance", "use_cache", "architectures", "tie_word_embeddings",
            "is_encoder_decoder", "is_decoder", "add_router_probs", "num_sparse_encoder_layers", "router_bias",
            "num_sparse_decoder_layers", "transformers_version", "router_ignore_padding_tokens", "torch_dtype",
            "expert_capacity", "encoder_sparse_step", "bos_token_id", "add_cross_attention"):  # fmt: skip
    for label in ("negative", "null", "a string", "a list", "an object", "NaN", "huge", "zero"):
        CONFIG.row(f"{key} {label}!", change(**{key: ODD[label]}), Expect.EITHER)
for name in ("t5", "bert", "msmoe_switch_transformers", "mixtral", "../x", "nllb-moe", ""):
    CONFIG.row(f"model_type {name}", change(model_type=name), by=RUNS)
for name in ("nope", "float8_e4m3fn", "int8", "torch.nope", "complex64", "bool"):
    CONFIG.row(f"dtype {name}", change(dtype=name), Expect.SAME_OR_REFUSE, by=RUNS)
    CONFIG.row(f"torch_dtype {name}", change(torch_dtype=name), Expect.SAME_OR_REFUSE, by=RUNS)
for name, left in {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_8bit": True}, "gptq": {"quant_method": "gptq", "bits": 4},
    "unknown": {"quant_method": "nope"}, "empty": {}, "a string": "x", "fp8": {"quant_method": "fp8"},
    "a list": [1], "null": None,
}.items():  # fmt: skip
    CONFIG.row(f"quantization_config {name}", change(quantization_config=left), Expect.SAME_OR_REFUSE, by=RUNS)
HARMFUL = {
    "min_length": 20, "max_length": 2, "max_new_tokens": 1, "forced_bos_token_id": 7, "forced_eos_token_id": 9,
    "num_return_sequences": 3, "num_beams": 4, "return_dict_in_generate": True, "penalty_alpha": 0.6, "do_sample": True,
    "temperature": 0.001, "suppress_tokens": [1, 5, 6], "bad_words_ids": [[5], [6]], "no_repeat_ngram_size": 1,
    "repetition_penalty": 5.0, "output_scores": True, "begin_suppress_tokens": [4], "num_beam_groups": 2, "top_k": 1,
    "min_new_tokens": 9, "eos_token_id": 9, "encoder_repetition_penalty": 3.0, "length_penalty": -5.0,
    "use_cache": False,
    "decoder_start_token_id": 5, "pad_token_id": 9, "early_stopping": "never", "stop_strings": ["w1"],
    "cache_implementation": "static", "guidance_scale": 3.0, "exponential_decay_length_penalty": [1, 3.0],
    "sequence_bias": [[[5], 9.0]], "assistant_early_exit": 1, "prompt_lookup_num_tokens": 2, "watermarking_config": {},
    "max_time": 0.0001, "dola_layers": "low", "epsilon_cutoff": 0.5, "renormalize_logits": True,
    "remove_invalid_values":
    True, "constraints": [1], "force_words_ids": [[5]], "compile_config": {}, "output_attentions": True,
}  # fmt: skip
for key, value in HARMFUL.items():
    GENERATION.row(
        f"generation {key}", lambda t, k=key, v=value: generation(t, {k: v}), Expect.SAME, frozenset({"evaluate"})
    )
    if key not in IDS:
        CONFIG.row(f"legacy {key}", change(**{key: value}), Expect.SAME_OR_REFUSE, by=frozenset({"evaluate"}))
for key in ("max_length", "min_length", "num_beams", "eos_token_id", "pad_token_id", "decoder_start_token_id", "top_k"):
    for label in ("negative", "a string", "an object", "NaN", "beyond 64 bits", "null"):
        GENERATION.row(f"generation {key} {label}", lambda t, k=key, v=ODD[label]: generation(t, {k: v}),
                       Expect.SAME_OR_REFUSE, frozenset({"evaluate"}))  # fmt: skip
text_damages(GENERATION, lambda t: generation_of(t), what="generation", expect=Expect.SAME_OR_REFUSE)


def generation_of(trial: Trial) -> Path:
    return trial.root / "ck" / "generation_config.json"


def generation(trial: Trial, fields: dict) -> None:
    file = generation_of(trial)
    rewrite(file, dump(load(file) | fields))


@CONFIG.add("config d_ff twice, the last wrong", by=RUNS)
def repeat_wrong(trial: Trial) -> None:
    text = config_of(trial).read_text()
    rewrite(config_of(trial), text.replace('"d_ff": 24', '"d_ff": 24, "d_ff": 48'))


@CONFIG.add("config d_ff repeated", Expect.SAME_OR_REFUSE)
def repeat(trial: Trial) -> None:
    text = config_of(trial).read_text()
    rewrite(config_of(trial), text.replace('"d_ff": 24', '"d_ff": 48, "d_ff": 24'))


@CONFIG.add("config with a byte order mark", Expect.SAME_OR_REFUSE, by=RUNS)
def mark(trial: Trial) -> None:
    rewrite(config_of(trial), b"\xef\xbb\xbf" + config_of(trial).read_bytes())


@CONFIG.add("config with a lone surrogate", Expect.SAME_OR_REFUSE, by=RUNS)
def surrogate(trial: Trial) -> None:
    rewrite(config_of(trial), config_of(trial).read_text().replace("{", '{"note": "\\ud800",', 1))


@CONFIG.add("architectures a lone surrogate", Expect.EITHER)
def surrogate_name(trial: Trial) -> None:
    rewrite(config_of(trial), config_of(trial).read_text().replace("SwitchTransformersFor", "\\udc80"))


@CONFIG.add("model_type a lone surrogate")
def surrogate_type(trial: Trial) -> None:
    rewrite(config_of(trial), config_of(trial).read_text().replace('"switch_transformers"', '"\\udc80\\n\\u001b[31m"'))


@CONFIG.add("code in the folder", Expect.SAME_OR_REFUSE, by=RUNS)
def evil_config(trial: Trial) -> None:
    (trial.path / "evil.py").write_text(EVIL)
    change(auto_map={"AutoConfig": "evil.Evil", "AutoModelForSeq2SeqLM": "evil.Evil"})(trial)


@CONFIG.add("code of an unknown model")
def evil_model(trial: Trial) -> None:
    evil_config(trial)
    change(model_type="evil")(trial)


def tokenizer_of(trial: Trial) -> Path:
    return trial.root / "ck" / "tokenizer.json"


def tokenizer_config_of(trial: Trial) -> Path:
    return trial.root / "ck" / "tokenizer_config.json"


def tokenizer_field(key: str, value: object):
    return lambda t: rewrite(tokenizer_config_of(t), dump(load(tokenizer_config_of(t)) | {key: value}))


def core_field(key: str, value: object):
    return lambda t: rewrite(tokenizer_of(t), dump(load(tokenizer_of(t)) | {key: value}))


text_damages(TOKENIZER, tokenizer_of, what="tokenizer")
text_damages(TOKENIZER, tokenizer_config_of, what="tokenizer config", expect=Expect.EITHER)
for key, value, expect in (
    ("tokenizer_class", "Nope", Expect.SAME_OR_REFUSE), ("tokenizer_class", 5, Expect.SAME_OR_REFUSE),
    ("tokenizer_class", "BertTokenizer", Expect.EITHER), ("model_max_length", 3, Expect.EITHER),
    ("model_max_length", -1, Expect.EITHER), ("model_max_length", "x", Expect.EITHER), ("pad_token", None,
    Expect.EITHER),
    ("pad_token", 5, Expect.EITHER), ("eos_token", None, Expect.EITHER), ("eos_token", "w5", Expect.EITHER),
    ("eos_token", "new!", Expect.EITHER), ("unk_token", "beyond", Expect.EITHER), ("padding_side", "left", Expect.SAME),
    ("padding_side", "nope", Expect.SAME_OR_REFUSE), ("truncation_side", "left", Expect.EITHER),
    ("chat_template", "{{ broken", Expect.EITHER), ("backend", "nope", Expect.EITHER),
    ("extra_special_tokens", {"a": 5}, Expect.EITHER), ("add_prefix_space", "x", Expect.EITHER),
    ("model_input_names", ["x"], Expect.EITHER), ("added_tokens_decoder", {"9999": {"content": "zz"}}, Expect.EITHER),
):  # fmt: skip
    TOKENIZER.row(f"tokenizer config {key} {value}", tokenizer_field(key, value), expect)
for key, value, expect in (
    ("model", {}, Expect.REFUSE), ("model", None, Expect.REFUSE), ("model", {"type": "Nope"}, Expect.REFUSE),
    ("added_tokens", [{"id": -1}], Expect.REFUSE), ("version", "99", Expect.EITHER),
    ("pre_tokenizer", None, Expect.EITHER), ("pre_tokenizer", {"type": "Nope"}, Expect.REFUSE),
    ("post_processor", None, Expect.EITHER), ("normalizer", {"type": "Lowercase"}, Expect.SAME),
    ("decoder", {"type": "Nope"}, Expect.REFUSE),
    ("truncation", {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}, Expect.SAME),
    ("padding", {"strategy": {"Fixed": 20}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0,
                 "pad_type_id": 0, "pad_token": "<pad>"}, Expect.SAME),
):  # fmt: skip
    TOKENIZER.row(f"tokenizer {key} {value}", core_field(key, value), expect)


@TOKENIZER.add("more tokens than embeddings, none of them used", Expect.SAME_OR_REFUSE)
def larger(trial: Trial) -> None:
    save_tokenizer(trial.root / "ck", extra=8)


@TOKENIZER.add("more tokens than embeddings, in use")
def larger_used(trial: Trial) -> None:
    save_tokenizer(trial.root / "ck", extra=8)
    for file in trial.root.glob("*.jsonl"):
        rewrite(file, file.read_text().replace(" w", " more3 w", 9))


@TOKENIZER.add("ids far beyond the embeddings")
def shifted(trial: Trial) -> None:
    content = load(tokenizer_of(trial))
    content["model"]["vocab"] = {k: v + 10**6 * (v > 20) for k, v in content["model"]["vocab"].items()}
    rewrite(tokenizer_of(trial), dump(content))


@TOKENIZER.add("no tokenizer at all")
def none_at_all(trial: Trial) -> None:
    for file in (tokenizer_of(trial), tokenizer_config_of(trial)):
        remove(file)


@TOKENIZER.add("code in the tokenizer's folder", Expect.SAME_OR_REFUSE)
def evil_tokenizer(trial: Trial) -> None:
    (trial.root / "ck" / "evil.py").write_text(EVIL)
    tokenizer_field("auto_map", {"AutoTokenizer": ["evil.Evil", "evil.Evil"]})(trial)


@TOKENIZER.add("a sentencepiece file that is a pointer", Expect.SAME_OR_REFUSE)
def pointer(trial: Trial) -> None:
    (trial.root / "ck" / "spiece.model").write_bytes(LFS)


@TOKENIZER.add("only a sentencepiece file that is a pointer")
def only_pointer(trial: Trial) -> None:
    pointer(trial)
    remove(tokenizer_of(trial))
    tokenizer_field("tokenizer_class", "T5Tokenizer")(trial)


@TOKENIZER.add("special tokens broken", Expect.EITHER)
def special(trial: Trial) -> None:
    (trial.root / "ck" / "special_tokens_map.json").write_text(json.dumps({"eos_token": 5, "pad_token": []}))


@TOKENIZER.add("added tokens broken", Expect.EITHER)
def added(trial: Trial) -> None:
    (trial.root / "ck" / "added_tokens.json").write_text('{"x": "y", "z": 2000000000000000000000}')


@TOKENIZER.add("an additional pipe", Expect.EITHER)
def pipes(trial: Trial) -> None:
    as_pipe(trial.root / "ck" / "special_tokens_map.json")


@TOKENIZER.add("a chat template that is a folder", Expect.EITHER)
def folder(trial: Trial) -> None:
    as_folder(trial.root / "ck" / "chat_template.jinja")
