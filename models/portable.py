"""A switch for export: inside of `portable()` the networks compute with operations that other runtimes know, and for
images of any size.

Outside they take what is fastest here: an operator of our own that samples, convolutions in place of linear layers, and
tables that are kept for each size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import _lru_cache_wrapper
from typing import Any, TypeVar

T = TypeVar("T")
# A plain value, which torch.compile can read without a break of the graph.
_STATE = {"portable": False}


@contextmanager
def portable() -> Iterator[None]:
    """Inside, `is_portable` is true, in all threads."""
    _STATE["portable"] = True
    try:
        yield
    finally:
        _STATE["portable"] = False


def is_portable() -> bool:
    return _STATE["portable"]


def by_size(table: _lru_cache_wrapper[T], *arguments: Any) -> T:
    """`table(*arguments)`, a function that keeps its results; inside of `portable`, where a size may be a symbol and no
    key, computed anew."""
    return (table.__wrapped__ if is_portable() else table)(*arguments)
