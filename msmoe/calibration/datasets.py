"""Rows of `datasets` data sets, by name or from a folder."""

from collections.abc import Iterator
from pathlib import Path

from msmoe.calibration.files import FORMATS, DataError, Fits, Row, files_in, read_file

KNOWN = ", ".join(f"*{suffix}" for suffix in FORMATS)
SAVED = ("state.json", "dataset_dict.json")  # in a folder of `save_to_disk`


def task_files_in(task: str | Path) -> list[Path]:
    """The tasks that a name stands for: the data files of a folder of them, else itself.

    Raises:
        DataError: for a folder without data files.
    """
    folder = Path(task)
    if not folder.is_dir() or is_saved(folder):
        return [folder]
    files = files_in(folder)
    if not files:
        raise DataError(f"{folder} is a folder without *.jsonl files, or any other data ({KNOWN})")
    return files


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return any((folder / name).exists() for name in SAVED)


def read_folder(folder: Path, split: str, fits: Fits) -> Iterator[Row]:
    """Rows of a folder: of `save_to_disk`, or of data files.

    Of data files, those whose names begin with the split; without one with `train`, and all where none does.

    Raises:
        DataError: if there are none, or the split is missing.
    """
    if is_saved(folder):
        yield from saved_rows(folder, split)
        return
    files = files_in(folder)
    chosen = [file for file in files if file.name.startswith(split or "train")]
    if split and not chosen:
        raise DataError(f"{folder} has no data file that begins with {split!r}")
    if not files:
        raise DataError(f"{folder} is a folder without data files ({KNOWN})")
    for file in chosen or files:
        yield from read_file(file, fits)


def saved_rows(folder: Path, split: str) -> Iterator[Row]:
    try:
        from datasets import load_from_disk
    except ImportError:
        raise DataError(f"{folder} was saved by datasets, which it needs: `pip install datasets`") from None
    try:
        saved = load_from_disk(str(folder))
    except Exception as error:  # the library raises many kinds; each means that the folder is damaged
        raise DataError(f"{folder} is no data set that can be loaded: {error}") from error
    if isinstance(saved, dict):
        wanted = split or "train"
        if wanted not in saved:
            raise DataError(f"{folder} has no split {wanted!r}; choose {folder}:NAME with one of {', '.join(saved)}")
        saved = saved[wanted]
    for i, row in enumerate(saved, 1):
        yield f"{folder}, row {i}", dict(row)


def named_rows(name: str) -> Iterator[Row]:
    """Rows of `NAME`, `NAME:SPLIT` or `NAME:CONFIGURATION:SPLIT`, as the library finds it; default split `train`."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(f"no file {name}, and data set names need `pip install datasets`") from None
    repository, *rest = name.split(":")
    split, configuration = (rest or [""])[-1] or "train", rest[0] if len(rest) > 1 else None
    try:
        rows = load_dataset(repository, configuration, split=split)
    except Exception as error:  # the library raises many kinds; each means that there is no such data here
        raise DataError(f"{name} is neither a file nor a data set that can be loaded: {error}") from error
    for i, row in enumerate(rows, 1):
        yield f"{name}, row {i}", dict(row)
