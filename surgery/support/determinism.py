"""Results that do not depend on the number of threads.

BLAS and LAPACK sum in an order that depends on how many threads they have, and with it the last bits of a product, an
eigenvector or a QR. What has to be the same everywhere runs in one thread; where there is more than one thing to do,
they run side by side, which uses all threads, and for factorisations better than a single one would.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


@contextlib.contextmanager
def one_thread(enabled: bool = True) -> Iterator[None]:
    """Run operations on the CPU in one thread; also a decorator."""
    before = torch.get_num_threads()
    if not enabled or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def side_by_side(function: Callable[[T], R], items: Iterable[T], workers: int) -> Generator[R, None, None]:
    """Results of a function in the order of the items, each formed in one thread, few of them ahead of the consumer.

    Close the iterator (``contextlib.closing``) where it may not be exhausted. An exception of the function is raised
    where its result is due.

    Args:
        workers: how many run at a time, at most ``torch.get_num_threads()``.
    """
    before = torch.get_num_threads()
    workers = max(1, min(workers, before))
    if workers == 1:
        for item in items:
            with one_thread():
                result = function(item)
            yield result
        return
    waiting: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)  # what a worker has set is the default of threads to come
