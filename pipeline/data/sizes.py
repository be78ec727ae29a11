"""Full batches from images of many sizes: only images of one size share a forward pass, so that none is padded for the
sake of another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

T = TypeVar("T")


def grouped(items: Iterable[T], size: Callable[[T], Any], *, most: int, window: int = 1) -> Iterator[list[T]]:
    """Groups of at most `most` neighbours of one `size`, after every `window` items were sorted by it.

    The sort is stable, so items that all have one size keep their order, and with `window` 1 so do any.
    """
    source, group = iter(items), list[T]()
    while some := list(islice(source, window)):
        for item in sorted(some, key=size):
            if group and (len(group) == most or size(group[0]) != size(item)):
                yield group
                group = []
            group.append(item)
    if group:
        yield group


def in_turn(numbered: Iterable[tuple[int, T]]) -> Iterator[T]:
    """The values of (number, value), the numbers 0, 1, 2, ... in any order, by number; each as soon as it can be."""
    waiting, turn = dict[int, T](), 0
    for number, value in numbered:
        waiting[number] = value
        while turn in waiting:
            yield waiting.pop(turn)
            turn += 1
    assert not waiting, sorted(waiting)
