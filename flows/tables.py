"""How commands print: tables, trees, sizes and ages."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their longest cell, the last one ragged."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in (heads, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_tree(value: Any, indent: str) -> None:
    """Nested settings, one a line; a list of objects keeps one line each."""
    for name, item in value.items():
        if isinstance(item, dict) and item:
            print(f"{indent}{name}")
            print_tree(item, indent + "  ")
        elif isinstance(item, list) and item and isinstance(item[0], dict):
            print(f"{indent}{name}: {len(item)}")
            for entry in item:
                print(f"{indent}  {', '.join(f'{key} {entry[key]}' for key in entry)}")
        else:
            print(f"{indent}{name}: {', '.join(map(str, item)) if isinstance(item, list) else item}")


def size(count: float) -> str:
    """Bytes as "999 B", "1.0 kB", "100 MB" ..."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.5 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def age(created: str) -> str:
    """Since an ISO 8601 date: "3 days", "5 h", "20 min" or "12 s"."""
    then = datetime.fromisoformat(created)
    return roughly(max(0.0, (datetime.now(then.tzinfo) - then).total_seconds()))


def roughly(seconds: float) -> str:
    """A time of two units or more: "3 days", "5 h", "20 min" or "12 s"."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit}"
    return f"{seconds:.0f} s"
