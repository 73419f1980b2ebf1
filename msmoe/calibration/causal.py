"""Records -> token ids of a decoder-only model: one sequence of what is given and what is wanted.

A text is wanted as a whole. Of a source and a target, a conversation, or a question with choices, the answer is wanted,
and everything before it is its prompt. The two are tokenised apart, so that the prompt is what the model reads when it
writes the answer itself; white space between them is what the texts hold.
"""

from collections.abc import Sequence
from typing import Any

from msmoe.calibration.chat import prompt_and_answer
from msmoe.calibration.files import DataError
from msmoe.calibration.records import MASKS, kind_of
from msmoe.calibration.spans import IGNORE, TokenRecord
from msmoe.calibration.tokenizer import encode


class CausalReader:
    """Reads the tokens of single records, uncut; see the head of this file.

    Attributes:
        eos_id: what ends an answer: the tokenizer's end of sequence, else the model's.
    """

    def __init__(
        self, tokenizer: Any, *, pad_id: int = 0, eos_id: int | None = None, max_source: int | None = None,
        max_target: int | None = None,
    ):  # fmt: skip
        own = getattr(tokenizer, "eos_token_id", None)
        self.tokenizer, self.pad_id = tokenizer, pad_id
        self.eos_id, self.model_eos_id = eos_id if own is None else own, eos_id
        self.max_source, self.max_target = max_source, max_target

    def read(self, record: dict, place: str) -> TokenRecord:
        kind = kind_of(record)
        if kind in ("tokens", "ids"):
            return self._tokens(record, place)
        self.check_tokenizer(place)
        if kind == "text":
            ids = encode(self.tokenizer, record["text"], place)
            return wanted(ids, ids)
        prompt = self.prompt(record, place)
        return answered(prompt, self.answer(record, place)) if prompt else TokenRecord([], [])

    def check_tokenizer(self, place: str) -> None:
        if self.tokenizer is None:
            raise DataError(f"{place} is text and the checkpoint has no tokenizer: use input_ids")

    def prompt(self, record: dict, place: str) -> list[int]:
        """What a record of the kind `pair`, `chat` or `choices` gives: the tokens before its answer."""
        if kind_of(record) == "chat":
            prompt, _ = prompt_and_answer(record["messages"], self.tokenizer, place)
            return encode(self.tokenizer, prompt, place, special=False)
        return without_end(self.tokenizer, record["source"], place)

    def answer(self, record: dict, place: str, text: str | None = None, *, ends: bool = True) -> list[int]:
        """The tokens of the answer of a record of the kind `pair`, `chat` or `choices`, with an end of sequence.

        Args:
            text: in the place of the record's own answer.
            ends: whether the end of sequence belongs to it; a conversation ends as its template says.
        """
        if kind_of(record) == "chat":
            return self._turn(record["messages"], place, text)
        if text is None:
            text = record["target"] if kind_of(record) == "pair" else record["choices"][record["answer"]]
        ids = encode(self.tokenizer, text, place, special=False)
        if not ends:
            return ids
        if self.eos_id is None:
            raise DataError(f"{place}: neither the tokenizer nor the model has an end of sequence, which ends a target")
        return [*ids, self.eos_id]

    def _turn(self, messages: Sequence[dict], place: str, text: str | None) -> list[int]:
        """The last answer of a conversation as the template writes it, up to its first end of sequence.

        Tokenised together with the prompt where that leaves the prompt's own tokens as they are.
        """
        prompt, answer = prompt_and_answer(messages, self.tokenizer, place, text)
        before = encode(self.tokenizer, prompt, place, special=False)
        whole = encode(self.tokenizer, prompt + answer, place, special=False)
        ids = whole[len(before) :]
        if whole[: len(before)] != before:
            ids = encode(self.tokenizer, answer, place, special=False)
        ends = [i for i, token in enumerate(ids) if token in (self.eos_id, self.model_eos_id)]
        return ids[: ends[0] + 1] if ends else ids

    def _tokens(self, record: dict, place: str) -> TokenRecord:
        """A record of token ids without its padding: what its mask hides.

        Without a mask, padding is the pad token at either end where the labels leave it out. Where there are no labels,
        or the pad token is the end of sequence as well, it counts as a token, but for one at the end that the labels
        leave out.
        """
        ids, labels = record["input_ids"], record.get("labels")
        if labels is not None and len(labels) != len(ids):
            raise DataError(
                f"{place}: a decoder-only model needs a label for each of the {len(ids)} input_ids, its own token or "
                f"{IGNORE}, got {len(labels)}"
            )
        mask, start, end = record.get(MASKS["input_ids"]), 0, len(ids)
        if mask is not None:
            start, end = mask.index(1), len(mask) - mask[::-1].index(1)
        own = self.pad_id not in (self.eos_id, self.model_eos_id)
        hidden = [i == self.pad_id and (own if labels is None else labels[at] == IGNORE) for at, i in enumerate(ids)]
        while mask is None and end > start and hidden[end - 1]:
            end -= 1
        while mask is None and own and start < end and hidden[start]:
            start += 1
        labels = ids if labels is None else labels
        wrong = next((i for i in range(start, end) if labels[i] not in (IGNORE, ids[i])), None)
        if wrong is not None:
            raise DataError(
                f"{place}: label {labels[wrong]} stands at input id {ids[wrong]}: labels of a decoder-only model are "
                f"not shifted, each is its own token or {IGNORE}"
            )
        return wanted(ids[start:end], labels[start:end])

    def cut(self, read: TokenRecord, kind: str | None) -> tuple[TokenRecord, tuple[bool, bool]]:
        """The record just read, cut where it is too long, and whether its prompt and its answer were.

        Where everything is wanted, the first `max_source` tokens stay.
        """
        if kind in ("text", "ids") or (kind == "tokens" and prompt_length(read) == 1):
            kept = TokenRecord(read.input_ids[: self.max_source], read.labels[: self.max_source])
            return kept, (len(kept.labels) < len(read.labels), False)
        starts = [getattr(self.tokenizer, "bos_token_id", None)]
        kept = cut(read, self.max_source, self.max_target, starts=starts, ends=(self.eos_id, self.model_eos_id))
        return kept, (prompt_length(kept) < prompt_length(read), self.target_length(kept) < self.target_length(read))

    def target_length(self, read: TokenRecord) -> int:
        """Tokens from the first that is wanted on."""
        return len(read.labels) - prompt_length(read)


def wanted(ids: Sequence[int], labels: Sequence[int]) -> TokenRecord:
    """A record whose first token is only given: no position before it predicts it."""
    return TokenRecord(list(ids), [IGNORE, *labels[1:]] if ids else [])


def answered(prompt: Sequence[int], answer: Sequence[int]) -> TokenRecord:
    """A record that gives a prompt, at least one token, and wants an answer."""
    return TokenRecord([*prompt, *answer], [IGNORE] * len(prompt) + list(answer))


def prompt_length(record: TokenRecord) -> int:
    """How many tokens stand before the first that is wanted."""
    return next((i for i, label in enumerate(record.labels) if label != IGNORE), len(record.labels))


def without_end(tokenizer: Any, text: str, place: str) -> list[int]:
    """Token ids of a text with what the tokenizer puts before it, without what it puts after it."""
    plain, full = (encode(tokenizer, text, place, special=special) for special in (False, True))
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[: start + len(plain)]
    return full[:-1] if full and full[-1] == getattr(tokenizer, "eos_token_id", None) else full


def cut(
    record: TokenRecord,
    max_source: int | None,
    max_target: int | None,
    *,
    starts: Sequence[int | None] = (),
    ends: Sequence[int | None] = (),
) -> TokenRecord:
    """Cut the prompt of a record to its last `max_source` tokens, and the answer to its first `max_target`.

    What stands next to the answer stays. A token that starts sequences, one of `starts`, stays the first; an end of
    sequence, one of `ends`, stays the last.
    """
    length = prompt_length(record)
    prompt, kept = record.input_ids[:length], [*range(length, len(record.input_ids))]
    if max_source is not None and length > max_source:
        head = prompt[:1] if prompt[0] in starts else []
        prompt = [*head, *prompt[length - (max_source - len(head)) :]]
    if max_target is not None and len(kept) > max_target:
        last = kept[-1:] if record.input_ids[-1] in ends else []
        kept = [*kept[: max_target - len(last)], *last]
    return TokenRecord(
        [*prompt, *(record.input_ids[i] for i in kept)], [IGNORE] * len(prompt) + [record.labels[i] for i in kept]
    )
