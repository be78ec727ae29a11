"""Threads ahead of their consumer: the same items in order, errors in their place, no work beyond what was agreed."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from pipeline.data.ahead import ahead, mapped


def until(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came true")


def counted(made: list[int]) -> Iterator[int]:
    for number in itertools.count():
        made.append(number)
        yield number


def test_the_next_item_is_made_while_one_is_in_use_and_no_more() -> None:
    made: list[int] = []
    source = ahead(counted(made))
    for number in range(3):
        assert next(source) == number
        until(lambda: made == list(range(number + 2)))  # noqa: B023 (called here)
    time.sleep(0.05)
    assert made == [0, 1, 2, 3]


def test_an_end_is_an_end() -> None:
    assert list(ahead(iter([]))) == [] and list(ahead(iter([None, 0, False]))) == [None, 0, False]
    assert list(mapped(abs, [], workers=2, count=3)) == []
    for count in (0, 1, 7, 50):
        assert list(mapped(lambda n: n * n, range(20), workers=3, count=count)) == [n * n for n in range(20)]


def test_results_keep_their_order_whichever_thread_is_first() -> None:
    started: list[int] = []

    def slow_at_first(number: int) -> int:
        started.append(number)
        time.sleep(0.1 if number == 0 else 0)
        return -number

    assert list(mapped(slow_at_first, range(9), workers=3, count=4)) == [-n for n in range(9)]
    assert len(started) == 9


def test_only_so_many_results_wait() -> None:
    begun: list[int] = []
    results = mapped(lambda n: begun.append(n) or n, itertools.count(), workers=4, count=5)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    until(lambda: sorted(begun) == list(range(8)))  # 5 wait behind the one that was handed out
    time.sleep(0.05)
    assert len(begun) == 8


def test_an_error_comes_where_its_item_would_have() -> None:
    def picky(number: int) -> int:
        if number == 3:
            raise OSError("three")
        return number

    for results in (mapped(picky, range(9), workers=2, count=4), ahead(map(picky, range(9)))):
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(OSError, match="three"):
            next(results)
    reading = ahead(mapped(abs, ahead(map(picky, range(9))), workers=2, count=4))
    with pytest.raises(OSError, match="three"):
        assert list(reading) == []  # one of what is read ends it as soon as it is met, before results that wait


def test_who_leaves_early_waits_for_no_more_work_and_no_thread_stays() -> None:
    before, begun = threading.active_count(), []
    results = ahead(mapped(lambda n: (begun.append(n), time.sleep(0.05)), itertools.count(), workers=2, count=100))
    next(results)
    began = time.perf_counter()
    del results
    assert time.perf_counter() - began < 2  # 100 of them would take 2.5 s
    until(lambda: threading.active_count() == before)
    assert len(begun) < 20


def test_each_thread_computes_with_one_thread_of_torch() -> None:
    own = torch.get_num_threads()
    assert set(mapped(lambda _: torch.get_num_threads(), range(8), workers=3, count=8)) == {1}
    assert torch.get_num_threads() == own
