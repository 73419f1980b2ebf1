"""Conversations -> source and target: what was said up to the last answer of the assistant, and that answer."""

from collections.abc import Mapping, Sequence
from typing import Any

from msmoe.calibration.files import DataError

ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}  # other people's names


def check_messages(messages: object, place: str) -> list[dict[str, str]]:
    """The messages with their roles and plain texts.

    Args:
        messages: list of `{"role", "content"}`; a content may be a list of parts with a `text`.

    Raises:
        DataError: if it is no such list.
    """
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) for m in messages):
        raise DataError(f"{place}: messages must be a list of objects with role and content")
    checked = []
    for i, message in enumerate(messages, 1):
        role, content = message.get("role"), message.get("content")
        if isinstance(content, list) and all(
            isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content
        ):
            content = "".join(part["text"] for part in content)
        content = "" if content is None else content
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(f"{place}: message {i} must have a role and a content, both texts")
        checked.append({"role": ROLES.get(role, role), "content": content})
    return checked


def conversation(messages: Sequence[Mapping[str, str]]) -> tuple[list[dict[str, str]], str]:
    """What was said before the last turn of the assistant, and that turn; ([], "") if the assistant said nothing."""
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=None)
    if last is None:
        return [], ""
    return [dict(m) for m in messages[:last]], messages[last]["content"]


def render(messages: Sequence[Mapping[str, str]], tokenizer: Any, place: str) -> str:
    """The text that an encoder reads.

    By the tokenizer's chat template, with the prompt of the assistant, where it has one. Else a single message is its
    own text, and several are lines `role: content` with `assistant:` at the end.

    Raises:
        DataError: if the template refuses the messages.
    """
    if getattr(tokenizer, "chat_template", None):
        return by_template(messages, tokenizer, place, prompt=True)
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join([*(f"{m['role']}: {m['content']}" for m in messages), "assistant:"])


def by_template(messages: Sequence[Mapping[str, str]], tokenizer: Any, place: str, *, prompt: bool) -> str:
    """The messages as the tokenizer's chat template writes them, perhaps with the prompt of the assistant.

    Raises:
        DataError: if the template refuses them.
    """
    try:
        return tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, add_generation_prompt=prompt)
    except Exception as error:  # a template raises what it likes
        raise DataError(f"{place}: the tokenizer's chat template refuses the messages: {error}") from error


def prompt_and_answer(
    messages: Sequence[Mapping[str, str]], tokenizer: Any, place: str, answer: str | None = None
) -> tuple[str, str]:
    """What a decoder reads before the last turn of the assistant, and that turn, both as the chat template writes them.

    Args:
        answer: in the place of what the assistant said.

    Raises:
        DataError: without a chat template, or if it refuses the messages or writes the conversation with its answer
            differently from the prompt for it.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{place} is a conversation and the tokenizer has no chat template, which a decoder-only model needs: "
            "use source and target"
        )
    before, said = conversation(messages)
    turn = {"role": "assistant", "content": said if answer is None else answer}
    prompt = by_template(before, tokenizer, place, prompt=True)
    whole = by_template([*before, turn], tokenizer, place, prompt=False)
    if not whole.startswith(prompt):
        raise DataError(
            f"{place}: the tokenizer's chat template writes a conversation with its answer differently from the prompt "
            f"for that answer, which ends with {prompt[-40:]!r}: use source and target"
        )
    return prompt, whole[len(prompt) :]
