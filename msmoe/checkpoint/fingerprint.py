"""What tells checkpoints apart: every byte of every tensor, and the configuration.

Reading a large checkpoint takes a while, so the digest is kept in the user's cache under the identity of the weight
files. Their change times are part of it, which no program can set: a file that was written to is read again.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from msmoe.errors import UserError
from msmoe.strict_json import read_object

if TYPE_CHECKING:
    from msmoe.checkpoint.reader import Checkpoint

SAYS_NOTHING = ("_name_or_path", "transformers_version")  # of the configuration
SETTLED_NS = 2 * 10**9  # a file changed later than this ago may change again within one tick of its clock
MAX_REMEMBERED = 512
THREADS = 4


def fingerprint(checkpoint: Checkpoint) -> str:
    """`sha256:...` over names, dtypes, shapes and values of all tensors, and the configuration.

    It does not depend on how the tensors are spread over files, or whether they are pickled.
    """
    digest = sha256(config_text(checkpoint.config).encode())
    digest.update(tensors_digest(checkpoint).encode())
    return f"sha256:{digest.hexdigest()}"


def config_text(config: dict) -> str:
    """The configuration but for what says nothing about the model, keys in order."""
    return json.dumps({k: v for k, v in config.items() if k not in SAYS_NOTHING}, sort_keys=True)


def tensors_digest(checkpoint: Checkpoint) -> str:
    """Digest of all tensors, from the cache where the files are those that it was computed for."""
    files = checkpoint.files
    before = identity(files)
    known = remembered()
    if before in known:
        return known[before]
    names = sorted(checkpoint)
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        digests = pool.map(lambda name: tensor_digest(checkpoint, name), names)
        digest = sha256("".join(digests).encode()).hexdigest()
    if identity(files) != before:
        raise UserError(f"the weights of {checkpoint.path} changed while they were read")
    if all(time.time_ns() - file.stat().st_ctime_ns > SETTLED_NS for file in files):
        remember(before, digest)
    return digest


def tensor_digest(checkpoint: Checkpoint, name: str) -> str:
    spec = checkpoint.spec(name)
    digest = sha256(f"{name}\0{spec.dtype}\0{spec.shape}\0".encode(errors="surrogatepass"))
    for block in checkpoint.blocks(name):
        digest.update(block)
    return digest.hexdigest()


def identity(files: tuple[Path, ...]) -> str:
    """What the file system says of the files: place, device, inode, size, and times of the last writing and change."""
    parts = []
    for file in files:
        s = file.stat()
        parts.append([str(file.resolve()), s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns])
    return sha256(json.dumps(parts).encode()).hexdigest()


# ---- the cache


def cache_file() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "msmoe" / "fingerprints.json"


def remembered() -> dict[str, str]:
    """Identity of files -> digest of their tensors; empty where there is no cache or it cannot be read."""
    try:
        content = read_object(cache_file())
    except (UserError, RuntimeError):
        return {}
    return {key: value for key, value in content.items() if isinstance(value, str) and len(value) == 64}


def remember(key: str, digest: str) -> None:
    """Keep a digest, if the cache can be written to; the oldest make room."""
    with contextlib.suppress(OSError, RuntimeError):  # it is a cache: what cannot be kept is computed again
        file = cache_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        content = [*remembered().items(), (key, digest)][-MAX_REMEMBERED:]
        partial = file.with_name(f"{file.name}.{os.getpid()}")
        try:
            partial.write_text(json.dumps(dict(content)), encoding="utf-8")
            os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)
