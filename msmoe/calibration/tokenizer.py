"""A checkpoint's tokenizer and special tokens: what comes from its files is checked where it is read."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from msmoe.errors import UserError, explain_library_errors
from msmoe.strict_json import LFS_ADVICE, LFS_POINTER, read_object

FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model")
MORE_FILES = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
DEFAULTS = {
    "vocab_size": 32128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": None,
}  # of T5 and Switch


ENCODER_DECODER = ("decoder_start_token_id", "num_decoder_layers", "decoder_layers")  # keys of such a model alone


@dataclass(frozen=True)
class SpecialTokens:
    """Ids that a model's configuration names, each below `vocab_size`.

    Attributes:
        pad_id: what batches are filled up with.
        eos_id: the end of sequence, the first where there are several; None for a decoder that names none.
        start_id: what the decoder of an encoder-decoder starts with; None for a decoder-only model.
        eos_ids: every end of sequence.
    """

    pad_id: int
    eos_id: int | None
    start_id: int | None
    vocab_size: int
    eos_ids: tuple[int, ...] = ()

    @property
    def is_causal(self) -> bool:
        return self.start_id is None


def is_causal(config: Any) -> bool:
    """Whether a configuration, of a file or of a model in memory, is of a decoder-only model."""
    config = config if isinstance(config, Mapping) else vars(config)
    return not config.get("is_encoder_decoder") and not any(key in config for key in ENCODER_DECODER)


def special_tokens(config: Mapping[str, Any], where: str | Path) -> SpecialTokens:
    """The special tokens of a configuration, checked.

    Decoders may name no pad token, for which the end of sequence stands then, and several ends of sequence. A
    configuration of several models keeps those of the language model in its `text_config`.

    Args:
        where: the file or the model that it is of, for messages.

    Raises:
        UserError: if one is missing, no integer or outside the vocabulary.
    """
    if is_causal(config):
        return special_tokens_of_decoder(config, where)
    values = {name: config.get(name, default) for name, default in DEFAULTS.items()}
    size = values.pop("vocab_size")
    check_size(size, where)
    for name, value in values.items():
        if value is None:
            hint = "; Switch and T5 start with the pad token" if name == "decoder_start_token_id" else ""
            raise UserError(f"{where}: {name} is missing: set it to the token's id{hint}")
        check_token(name, value, size, where)
    pad_id, eos_id, start_id = values.values()
    return SpecialTokens(pad_id, eos_id, start_id, size, (eos_id,))


def special_tokens_of_decoder(config: Mapping[str, Any], where: str | Path) -> SpecialTokens:
    inner = config.get("text_config")
    inner = inner if isinstance(inner, Mapping) else {}
    size, pad_id, ends = (
        value if (value := config.get(name)) is not None else inner.get(name)
        for name in ("vocab_size", "pad_token_id", "eos_token_id")
    )
    check_size(size, where)
    eos_ids = tuple(ends) if isinstance(ends, list | tuple) else () if ends is None else (ends,)
    for eos_id in eos_ids:
        check_token("eos_token_id", eos_id, size, where)
    if pad_id is None:
        pad_id = eos_ids[0] if eos_ids else 0
    check_token("pad_token_id", pad_id, size, where)
    return SpecialTokens(pad_id, eos_ids[0] if eos_ids else None, None, size, eos_ids)


def check_size(size: Any, where: str | Path) -> None:
    if type(size) is not int or size < 1:
        raise UserError(f"{where}: vocab_size must be a positive integer, got {size!r}")


def check_token(name: str, value: Any, size: int, where: str | Path) -> None:
    if type(value) is not int or not 0 <= value < size:
        raise UserError(f"{where}: {name} must be an integer from 0 to {size - 1} (vocab_size {size}), got {value!r}")


def load_tokenizer(path: str | Path) -> Any:
    """The checkpoint's tokenizer, or None if it has none; no code from the folder runs.

    Raises:
        UserError: if its files are damaged.
    """
    path = Path(path)
    present = [path / name for name in FILES if (path / name).exists()]
    if not present:
        return None
    for file in present:
        check_file(file)
    from transformers import AutoTokenizer

    from msmoe.formats.registration import register

    register()  # a compressed checkpoint's configuration is then known without its own code
    with tokenizer_errors(f"the tokenizer of {path} cannot be loaded"):
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def encode(tokenizer: Any, text: str, place: str, *, special: bool = True) -> list[int]:
    """Token ids of a text, uncut.

    Raises:
        UserError: if the tokenizer cannot read it.
    """
    with tokenizer_errors(f"{place}: the tokenizer cannot read the text"):
        return tokenizer(text, add_special_tokens=special, verbose=False).input_ids


def check_file(file: Path) -> None:
    """Raise `UserError` for a tokenizer file that is a git-lfs pointer, no regular file, or JSON that is not."""
    if not file.is_file():
        raise UserError(f"{file} is not a regular file, but should be of a tokenizer")
    try:
        with file.open("rb") as stream:
            start = stream.read(len(LFS_POINTER))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    if start == LFS_POINTER.encode():
        raise UserError(f"{file} cannot be read: {LFS_ADVICE}")
    if file.suffix == ".json":
        read_object(file, "a tokenizer file")


def tokenizer_digest(path: str | Path) -> str:
    """SHA-256 over the files that decide how a checkpoint reads texts."""
    digest = sha256()
    for name in (*FILES, *MORE_FILES):
        if (Path(path) / name).is_file():
            digest.update(f"{name}\0{sha256((Path(path) / name).read_bytes()).hexdigest()}\0".encode())
    return digest.hexdigest()


@contextlib.contextmanager
def tokenizer_errors(what: str) -> Iterator[None]:
    """Turn what a tokenizer library raises about files or texts into one `UserError`.

    Panics of Rust code are no `Exception` (tokenizers 0.23).
    """
    try:
        with explain_library_errors(what):
            yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what}: {' '.join(str(error).split())}") from error
