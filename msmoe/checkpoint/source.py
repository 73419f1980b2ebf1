"""Where a checkpoint lies: a folder, or the id of a repository on the hub; and which of its files hold the weights."""

import contextlib
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from msmoe.errors import UserError
from msmoe.strict_json import read_object, shown

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.vocab", "README.md", "LICENSE*")
OTHER_FORMATS = (".h5", ".msgpack", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".safetensors")
MAX_NAME = 255  # characters of a file name
TIMEOUT = 10  # seconds that the hub has to answer
HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]*\w)(?:@([\w./-]+))?", re.ASCII)


class HubId(NamedTuple):
    """A repository of the hub; `revision` is a branch, a tag or a commit, None for the default branch."""

    repository: str
    revision: str | None

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}" if self.revision else self.repository


@dataclass(frozen=True)
class WeightFiles:
    """The files of a folder that hold weights; `pickled` ones are read by torch's restricted unpickler.

    Attributes:
        weight_map: tensor -> file name, of a sharded checkpoint; empty for a single file.
    """

    files: tuple[Path, ...]
    pickled: bool
    weight_map: dict[str, str]


def hub_id(name: str | Path) -> HubId | None:
    """The repository that `OWNER/NAME` or `OWNER/NAME@REVISION` names; None for a path, which wins where it exists."""
    match = HUB_ID.fullmatch(str(name))
    if match is None or Path(name).exists() or Path(match[1]).exists():
        return None
    return HubId(match[1], match[2])


def local_folder(name: str | Path) -> Path:
    """Folder of a checkpoint; one on the hub is downloaded into the hub's cache (`HF_HOME`), the weights last.

    Only what is needed is downloaded: configuration, tokenizer, and the weights in the one format that is read.

    Raises:
        UserError: if there is no such folder or repository, or the hub cannot be reached.
    """
    path = Path(name)
    if path.is_dir():
        return path
    wanted = hub_id(name)
    if wanted is None:
        found = " (it is a file)" if path.exists() else ""
        raise UserError(f"no checkpoint folder at {name}{found}")
    return download(wanted)


@lru_cache(maxsize=32)
def download(wanted: HubId) -> Path:
    """Fetch a repository, as far as it is needed, and return its folder in the cache."""
    from huggingface_hub import snapshot_download

    with explain_hub_errors(wanted):
        available = repository_files(wanted)
        patterns = [*SMALL_FILES, *weight_patterns(available, wanted)] if available is not None else None
        folder = snapshot_download(
            wanted.repository, revision=wanted.revision, allow_patterns=patterns, local_files_only=available is None
        )
    return Path(folder)


@lru_cache(maxsize=32)
def repository_files(wanted: HubId) -> tuple[str, ...] | None:
    """Names of all files of a repository; None where there is no network and the cache has to serve."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        info = HfApi().model_info(wanted.repository, revision=wanted.revision, timeout=TIMEOUT)
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        is_down = status is not None and status >= 500 if isinstance(error, HfHubHTTPError) else False
        if is_down or is_connection_error(error):
            return None
        raise
    return tuple(sibling.rfilename for sibling in info.siblings or ())


def weight_patterns(available: tuple[str, ...], wanted: HubId) -> list[str]:
    """The files that hold the weights of a repository, in the first format of those that are read.

    Raises:
        UserError: if there is none.
    """
    for single, index, shards in ((SAFETENSORS, SAFETENSORS_INDEX, "model-*.safetensors"),
                                  (PICKLE, PICKLE_INDEX, "pytorch_model-*.bin")):  # fmt: skip
        if single in available:
            return [single]
        if index in available:
            return [index, shards]
    raise UserError(f"{wanted} holds no weights that can be read: neither {SAFETENSORS} nor {PICKLE}, nor their shards")


def remote_headers(wanted: HubId) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    """Tensor -> (dtype, shape) of a repository's safetensors files, without downloading them.

    Returns:
        None where they are cached already, stored as pickles, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return None
    with explain_hub_errors(wanted):
        available = repository_files(wanted)
        if available is None or not {SAFETENSORS, SAFETENSORS_INDEX} & set(available):
            return None
        described = HfApi().get_safetensors_metadata(wanted.repository, revision=wanted.revision)
    entries = {}
    for file in described.files_metadata.values():
        entries |= {name: (info.dtype, tuple(info.shape)) for name, info in file.tensors.items()}
    return entries


def download_configuration(wanted: HubId) -> Path:
    """Folder with the small files of a repository."""
    from huggingface_hub import snapshot_download

    with explain_hub_errors(wanted):
        return Path(snapshot_download(wanted.repository, revision=wanted.revision, allow_patterns=[*SMALL_FILES]))


@contextlib.contextmanager
def explain_hub_errors(wanted: HubId) -> Iterator[None]:
    """Say in one line why the hub did not give a repository, and what to do."""
    from huggingface_hub import errors

    remedy = (
        f"where there is a network, `hf download {wanted.repository} --local-dir DIR`, then give DIR; or set HF_HOME "
        "to a cache that holds it"
    )
    try:
        yield
    except UserError:
        raise
    except errors.GatedRepoError as error:
        raise UserError(f"{wanted} is gated: ask for access on its page, then `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"there is no folder {wanted.repository}, and no such repository on the hub (a private one needs "
            "`hf auth login`)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{wanted.repository} has no revision {wanted.revision!r}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise UserError(f"there is no folder {wanted}, and the hub cannot be reached: {remedy}") from error
    except errors.HFValidationError as error:
        raise UserError(f"{wanted} is neither a folder nor the id of a hub repository: {first_line(error)}") from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise UserError(f"the hub did not give {wanted}: {first_line(error)}; {remedy}") from error
    except Exception as error:
        if is_connection_error(error):
            raise UserError(f"there is no folder {wanted}, and the hub cannot be reached: {remedy}") from error
        raise


def is_connection_error(error: BaseException) -> bool:
    """Whether the network is to blame; the hub's client has had several HTTP libraries."""
    modules = ("httpx", "httpcore", "requests", "urllib3", "httpx2", "httpcore2")
    return isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.split(".")[0] in modules


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


# ---- files of a folder


def weight_files(folder: Path) -> WeightFiles:
    """The weight files of a folder: safetensors before pickles, a single file before shards, as transformers does.

    Raises:
        UserError: if there is none, an index is damaged or names what is not there, or a file lies elsewhere.
    """
    for single, index, pickled in ((SAFETENSORS, SAFETENSORS_INDEX, False), (PICKLE, PICKLE_INDEX, True)):
        if (folder / single).exists():
            return WeightFiles((regular_file(folder, single, may_be_elsewhere=True),), pickled, {})
        if (folder / index).exists():
            weight_map = read_weight_map(folder / index)
            names = sorted(set(weight_map.values()))
            return WeightFiles(tuple(regular_file(folder, name) for name in names), pickled, weight_map)
    others = sorted(p.name for p in folder.iterdir() if p.suffix in OTHER_FORMATS)
    hint = f"; it holds {others[0]}, which is not read" if others else ""
    raise UserError(f"{folder} holds no {SAFETENSORS} and no {PICKLE}, nor their shards{hint}")


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file name of a sharded checkpoint.

    Raises:
        UserError: if it is damaged, or a name leads out of the folder.
    """
    weight_map: Any = read_object(index, "an index of weights").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise UserError(f"{index}: the file of {shown(tensor)} must be a file name, it is {shown(name)}")
        if Path(name).name != name or name in (".", ".."):
            raise UserError(f"{index}: the file of {shown(tensor)} lies outside the folder: {shown(name)}")
    return weight_map


def regular_file(folder: Path, name: str, *, may_be_elsewhere: bool = False) -> Path:
    """A weight file; one that an index names must lie in its folder, or be a link of the hub's cache to its blobs.

    Raises:
        UserError: if it is missing, no regular file, or a link to somewhere else.
    """
    path = folder / name
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path} is not a regular file")
    except FileNotFoundError:
        raise UserError(f"the index of weights names the shard {name}, which is missing from {folder}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    home, target = folder.resolve(), path.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    if not may_be_elsewhere and target.parent not in (home, blobs):
        raise UserError(f"{path} is a link out of its folder, to {target}: put the file itself there")
    return path
