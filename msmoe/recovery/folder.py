"""The folder of a training run, beside its output: states to resume from, metrics, TensorBoard events."""

import contextlib
import os
import shutil
from pathlib import Path

from msmoe.errors import UserError
from msmoe.files import clear, explain_os_errors, locked, remove, write_whole

LOCK, RUN = ".lock", "run.json"


class TrainingFolder:
    """`OUT.training`: held against other processes while the run lasts; kept by an interrupt.

    An error keeps it only if there is a step to go on from.

    Attributes:
        keep: whether an error keeps it in any case.
    """

    def __init__(self, path: Path):
        self.path = path
        self.keep = False
        self._held = contextlib.ExitStack()
        self._is_open = False

    def check(self, identity: str | None) -> None:
        """Refuse a folder that is a stranger's, or was left by another run than the one to be resumed.

        Args:
            identity: of the run to be resumed; None to start over.

        Raises:
            UserError: in these cases.
        """
        if not os.path.lexists(self.path):
            return
        is_folder = self.path.is_dir() and not self.path.is_symlink()
        names = {entry.name for entry in self.path.iterdir()} if is_folder else set()
        if not is_folder or (names and not names & {LOCK, RUN}):
            raise UserError(f"{self.path} is in the way, and no training folder: move it away or choose another --out")
        run = self.path / RUN
        if identity is not None and run.exists() and run.read_text(encoding="utf-8") != identity:
            raise UserError(f"{self.path} was left by a run with other inputs; remove it or run without --resume")

    def open(self, identity: str, *, resume: bool) -> None:
        """Make the folder of a run, emptied unless it is gone on with.

        Raises:
            UserError: if it cannot be written, or another process trains there.
        """
        with explain_os_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._held.enter_context(locked(self.path / LOCK))
            self._is_open = True
            if not resume:
                clear(self.path, last=LOCK)
            write_whole(self.path / RUN, identity)

    def finish(self) -> None:
        """Remove what only a resumed run would need."""
        for file in (*self.path.glob("state-*"), *self.path.glob("best-*")):
            file.unlink()
        shutil.rmtree(self.path / "teacher", ignore_errors=True)

    def close(self, error: BaseException | None) -> None:
        """Let go of the folder; after an error before the first step it is removed."""
        if self._is_open and isinstance(error, Exception) and not self.keep and not self._has_steps():
            remove(self.path, last=LOCK)
        self._held.close()

    def _has_steps(self) -> bool:
        return any(int(state.stem.split("-")[1]) for state in self.path.glob("state-*.safetensors"))
