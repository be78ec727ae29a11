"""Iterators whose items are computed in threads before they are asked for, in order.

Every thread computes with one torch thread of its own: an image is small, and nested threads would only contend. An
error ends the iteration where its item would have come, one of `mapped`'s own `items` as soon as it is met.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
S = TypeVar("S")
_END = object()


def ahead(source: Iterator[T]) -> Iterator[T]:
    """The items of `source`; while one is in use, a thread computes the next."""
    with _threads(1) as thread:
        following = thread.submit(next, source, _END)
        while (item := following.result()) is not _END:
            following = thread.submit(next, source, _END)
            yield item  # pyright: ignore[reportReturnType]


def mapped(function: Callable[[S], T], items: Iterable[S], *, workers: int, count: int) -> Iterator[T]:
    """`function` of each item, computed by `workers` threads, of which up to `count` results wait to be asked for."""
    with _threads(workers) as pool:
        pending: deque[Future[T]] = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > count:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


@contextmanager
def _threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """A pool that drops what it has not begun when it is left, instead of computing it for nobody."""
    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
