"""Groups of one size: every item once, and as few groups as a window allows; numbered values back in their turn."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from pipeline.data.sizes import grouped, in_turn

Item = tuple[int, int]  # number, size


def items(seed: int, count: int, sizes: int) -> list[Item]:
    return list(enumerate(np.random.default_rng(seed).integers(sizes, size=count).tolist()))


def of(item: Item) -> int:
    return item[1]


@pytest.mark.parametrize("window", [1, 3, 16, 1000])
@pytest.mark.parametrize("most", [1, 2, 7])
@pytest.mark.parametrize("sizes", [1, 2, 5])
def test_every_item_is_in_one_group_of_its_size(window: int, most: int, sizes: int) -> None:
    given = items(window + most, 60, sizes)
    groups = list(grouped(given, of, most=most, window=window))
    assert sorted(itertools.chain.from_iterable(groups)) == given
    assert all(len(group) <= most and len({*map(of, group)}) == 1 for group in groups)
    for group in groups:  # equal sizes keep their order
        assert group == sorted(group)


def test_a_window_of_one_takes_neighbours() -> None:
    given = list(enumerate([3, 3, 3, 1, 1, 3, 2, 2, 2, 2, 2]))
    assert [[of(i) for i in g] for g in grouped(given, of, most=2)] == [[3, 3], [3], [1, 1], [3], [2, 2], [2, 2], [2]]
    assert list(itertools.chain.from_iterable(grouped(given, of, most=2))) == given
    assert list(grouped([], of, most=2)) == []


@pytest.mark.parametrize("window", [1, 5, 64])
def test_items_of_one_size_are_cut_in_their_order_whatever_the_window(window: int) -> None:
    given = items(0, 22, 1)
    assert list(grouped(given, of, most=4, window=window)) == [given[i : i + 4] for i in range(0, 22, 4)]


def test_a_window_of_all_makes_the_fewest_groups() -> None:
    given = items(0, 100, 7)
    groups = list(grouped(given, of, most=8, window=100))
    assert len(groups) == sum(-(-count // 8) for count in Counter(map(of, given)).values())
    assert len(groups) < len(list(grouped(given, of, most=8, window=10))) < len(list(grouped(given, of, most=8)))


def test_no_more_than_a_window_is_taken_before_a_group_comes() -> None:
    taken: list[int] = []

    def source() -> Iterator[Item]:
        for number, size in items(0, 100, 4):
            taken.append(number)
            yield number, size

    given = 0
    for group in grouped(source(), of, most=3, window=10):
        given += len(group)
        assert len(taken) - given <= 10 + 3
    assert given == 100


def test_values_come_in_turn_and_as_soon_as_they_can() -> None:
    asked: list[int] = []

    def numbered() -> Iterator[tuple[int, str]]:
        for number in (2, 0, 1, 4, 3):
            asked.append(number)
            yield number, str(number)

    values = in_turn(numbered())
    assert next(values) == "0" and asked == [2, 0]
    assert next(values) == "1" and next(values) == "2" and asked == [2, 0, 1]
    assert list(values) == ["3", "4"]
    with pytest.raises(AssertionError):
        list(in_turn([(0, "0"), (2, "2")]))
