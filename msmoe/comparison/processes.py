"""Processes that do the work of a comparison and share the cores."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.connection import wait
from typing import Any

import torch


@contextlib.contextmanager
def workers(processes: int, *, own: bool = False) -> Iterator[Callable[..., Future]]:
    """Fresh processes that share the cores; an interrupt, or the end of this one, ends them at once.

    One process is this one, if not `own`.
    """
    if processes == 1 and not own:
        yield done_here
        return
    threads = max(1, torch.get_num_threads() // processes)
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=start_worker, initargs=(threads, sys.argv[0])
    )
    try:
        yield pool.submit
    except BaseException:
        for process in list((pool._processes or {}).values()):  # shutdown would wait for the cells at hand
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def done_here(function: Callable, *arguments: Any) -> Future:
    """Call a function at once, as an executor would."""
    future: Future = Future()
    try:
        future.set_result(function(*arguments))
    except Exception as error:
        future.set_exception(error)
    return future


def start_worker(threads: int, program: str) -> None:
    """A worker's share of the cores, and nothing of the library's between our lines."""
    sys.argv[0] = program
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()

    from transformers.utils import logging

    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def end_with_parent() -> None:
    """End this process as soon as the one that started it is gone, whatever it was killed by."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def in_a_process_of_its_own(function: Callable, *arguments: Any) -> Any:
    with workers(1, own=True) as submit:
        return submit(function, *arguments).result()
