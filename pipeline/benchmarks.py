"""Which classes there are, which of them are unseen in training, and how training leaves the unseen ones out.

The published splits are JSON files in `pipeline/facts`; a file of one's own in the same format does as well.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

Protocol = Literal["image-filter", "none"]
FACTS = Path(__file__).parent / "facts"


@dataclass(frozen=True, kw_only=True)
class Category:
    """A class as the annotations know it: `id` as in their JSON, `isthing` for countable objects."""

    id: int
    name: str
    isthing: bool


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Classes in a fixed order, the unseen ones among them, and the protocol that hides those from training.

    `image-filter` drops every training image that holds a segment of an unseen class. `none` keeps every image; segments
    of unseen classes are still never targets.
    """

    name: str
    categories: tuple[Category, ...]
    unseen_ids: tuple[int, ...]
    protocol: Protocol

    def __post_init__(self) -> None:
        ids = [category.id for category in self.categories]
        names = [category.name for category in self.categories]
        if not ids:
            raise ValueError(f"benchmark {self.name}: categories is empty; list at least one")
        for what, values in (("category id", ids), ("category name", names), ("unseen id", self.unseen_ids)):
            if len(set(values)) < len(values):
                value, _ = Counter(values).most_common(1)[0]
                raise ValueError(f"benchmark {self.name}: {what} {value!r} is listed twice; keep one")
        if strange := sorted(set(self.unseen_ids) - set(ids)):
            raise ValueError(f"benchmark {self.name}: unseen_ids {strange} are no category ids; correct them")
        if self.protocol == "pixel-ignore":
            raise ValueError(
                f"benchmark {self.name}: protocol 'pixel-ignore' is not implemented in training yet; use image-filter"
            )
        if self.protocol not in get_args(Protocol):
            known = ", ".join(get_args(Protocol))
            raise ValueError(f"benchmark {self.name}: protocol {self.protocol!r} is unknown; use one of {known}")

    @cached_property
    def index(self) -> dict[int, int]:
        """Category id -> position in `categories`, which is the class index everywhere else."""
        return {category.id: position for position, category in enumerate(self.categories)}

    @cached_property
    def seen(self) -> list[bool]:
        """In category order: may training see this class?"""
        unseen = set(self.unseen_ids)
        return [category.id not in unseen for category in self.categories]

    @cached_property
    def names(self) -> list[str]:
        """Class names in category order."""
        return [category.name for category in self.categories]


def load_benchmark(name: str) -> Benchmark:
    """The benchmark of that name in `pipeline/facts` ("coco-panoptic-zps"), or of a JSON file in that format.

    A file holds `categories` (each with `id`, `name`, `isthing`), `unseen_ids` and `protocol`; text after a colon in
    `protocol` explains it. Where it lists `unseen_names` too, they must be the names of the unseen ids, in order.

    Raises ValueError for an unknown name and for a file that is missing, broken, incomplete or at odds with itself.
    """
    path = Path(name) if name.endswith(".json") else FACTS / f"{name.replace('-', '_')}.json"
    if not path.is_file():
        known = ", ".join(sorted(file.stem.replace("_", "-") for file in FACTS.glob("*.json")))
        raise ValueError(f"benchmark {name!r} not found; use one of {known}, or the path of a JSON file")
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        benchmark = Benchmark(
            name=path.stem if name.endswith(".json") else name,
            categories=tuple(
                Category(id=int(c["id"]), name=str(c["name"]), isthing=bool(c["isthing"])) for c in facts["categories"]
            ),
            unseen_ids=tuple(int(i) for i in facts["unseen_ids"]),
            protocol=facts["protocol"].partition(":")[0],
        )
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: no valid JSON ({error}); correct it") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: field {error} is missing or malformed; see {FACTS.name}/coco_panoptic_zps.json"
        ) from error
    names = [benchmark.names[benchmark.index[i]] for i in benchmark.unseen_ids]
    if facts.get("unseen_names", names) != names:
        raise ValueError(
            f"{path}: unseen_names are not the names of unseen_ids, which are {names}; correct one of them"
        )
    return benchmark
