"""Worker threads with one arithmetic thread each: results do not depend on the number of cores."""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

Progress = Callable[[int, int], None]  # (pieces of work done, pieces in all)


def in_order(function: Callable, items: list, workers: int) -> Iterator:
    """`map` on worker threads with one arithmetic thread each, at most `workers` results ahead of the consumer."""
    with single_threaded(), ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        running: list[Future] = []
        try:
            for item in items:
                running.append(pool.submit(function, item))
                if len(running) == workers:
                    yield running.pop(0).result()
            while running:
                yield running.pop(0).result()
        finally:
            for future in running:
                future.cancel()


def on_one_thread(results: Iterator) -> Iterator:
    """The same results, each computed with one arithmetic thread."""
    with single_threaded():
        yield from results


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """One arithmetic thread per Python thread: sums come out the same on any number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
