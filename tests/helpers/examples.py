"""How many examples hypothesis draws: tests/conftest.py has the profiles."""

from __future__ import annotations

from typing import Any

from hypothesis import settings


def examples(count: int, **options: Any) -> settings:
    """So many in the profile "ci", and ten times as many in "deep"."""
    return settings(max_examples=count * settings().max_examples // 100, **options)
