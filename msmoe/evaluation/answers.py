"""Generated answers: the settings that they depend on, all of them fixed, and how they are compared with targets."""

import contextlib
from collections.abc import Iterator
from typing import Any

from msmoe.calibration.tokenizer import SpecialTokens, encode

MORE_TOKENS = 2  # that an answer may have than the longest target


def greedy(special: SpecialTokens, *, max_new_tokens: int, min_new_tokens: int | None = None) -> Any:
    """Settings of greedy generation that take nothing from a checkpoint but its special tokens."""
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=special.pad_id,
        eos_token_id=list(special.eos_ids) or None if special.is_causal else special.eos_id,
        decoder_start_token_id=special.start_id,
    )


def describe(settings: Any) -> dict:
    """The settings that decide what is generated, for results."""
    names = ["max_new_tokens", "do_sample", "num_beams", "pad_token_id", "eos_token_id"]
    if settings.decoder_start_token_id is not None:
        names.append("decoder_start_token_id")
    return {name: getattr(settings, name) for name in names}


@contextlib.contextmanager
def generating(model: Any, settings: Any) -> Iterator[None]:
    """Put the settings in the place of the model's own, which `generate` fills gaps from (transformers 5.23)."""
    own = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = own


def decode(tokenizer: Any, ids: list[list[int]]) -> list[str]:
    """Texts of generated ids, without special tokens and white space at the ends."""
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def canonical(tokenizer: Any, text: str, place: str) -> str:
    """A target as a perfect model would write it: the tokenizer's round trip, which answers have gone through too.

    A text with unknown tokens, or with nothing but special ones, stays as it is, but for white space at the ends: no
    answer equals it.
    """
    ids = encode(tokenizer, text, place)
    unknown = getattr(tokenizer, "unk_token_id", None)
    return text.strip() if unknown is not None and unknown in ids else decode(tokenizer, [ids])[0] or text.strip()
