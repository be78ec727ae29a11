"""Checks of cached tokens: statistics of the rows (without torch), and a comparison with a sample encoded again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.runtime import Runtime
from storage.errors import counted
from storage.keys import Ref
from storage.store import Store
from storage.tokens import TokenGroup, read_tokens

if TYPE_CHECKING:
    from storage.shards import Sample

AGREE = 0.999  # least cosine between a stored row, which is half precision, and its image encoded again
PLAIN = {"crop": "full", "method": "pixels"}  # the options under which a row is one masked image through the teacher


def summary(groups: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Statistics of a tokens artefact's groups, by split and kind of row, such as "train images".

    Each has `rows`, `norm` (least, mean, largest), the number of `zero` rows and of `duplicates` (rows that equal an
    earlier one of that split and kind in every bit); images also have `left_out`, those that the protocol drops.
    """
    result: dict[str, dict[str, Any]] = {}
    for split in ("train", "val"):
        for kind in ("images", "instances"):
            norms, seen, rows, left_out = [np.zeros(0, np.float32)], set(), 0, 0
            for path in (path for path in groups if path.name.startswith(f"{split}-")):
                group = read_tokens(path)
                tokens = group.global_[group.kept] if kind == "images" else group.instance
                norms.append(np.linalg.norm(tokens.astype(np.float32), axis=1))
                seen.update(hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in tokens)
                rows += len(tokens)
                left_out += int((~group.kept).sum())
            norm = np.concatenate(norms)
            result[f"{split} {kind}"] = {
                "rows": rows,
                "norm": [round(float(f(norm)), 4) for f in (np.min, np.mean, np.max)] if rows else [],
                "zero": int((norm == 0).sum()),
                "duplicates": rows - len(seen),
                **({"left_out": left_out} if kind == "images" else {}),
            }
    return result


def encode_again(
    store: Store, ref: Ref, *, rows: int, seed: int, teacher_weights: str, runtime: Runtime
) -> tuple[list[str], str]:
    """Encode `rows` rows of a tokens artefact again, drawn from `seed`, one image or masked instance at a time.

    Returns one line per row whose cosine to the stored row is below `AGREE`, and one line on the whole sample.
    Raises UserError when the teacher's weights or the shards are missing.
    """
    import torch

    from pipeline.data.transforms import channels_first
    from pipeline.teacher.config import teacher_of
    from storage.shards import Shards, decode_ids, decode_image

    artefact = store.open(ref)
    config = artefact.manifest.config
    for option, plain in PLAIN.items():
        if (value := config["tokens"].get(option, plain)) != plain:
            return [], f"rows not checked for {option}={value}"
    kind, _, key = artefact.manifest.inputs["shards"].partition("/")
    shards = Shards(store.open(Ref(kind=kind, key=key)).path)
    tars = [tar for split in ("train", "val") for tar in shards.tars(split)]
    groups = [read_tokens(artefact.path / f"{tar.stem}.zarr") for tar in tars]
    drawn = _draw(groups, rows, seed)
    teacher = teacher_of(config["teacher"], teacher_weights).load(runtime)
    device = runtime.torch_device()
    problems, cosines = [], []
    for number in sorted({tar for tar, _, _ in drawn}):
        wanted = [(sample, row) for tar, sample, row in drawn if tar == number]
        for sample, row, found in _pairs(tars[number], wanted):
            prepared = teacher.prepare(channels_first(decode_image(found)).to(device))
            if row is None:
                stored, what, inputs = groups[number].global_[sample], "its image", prepared[None]
            else:
                segment = int(groups[number].segment_id[row])
                stored, what = groups[number].instance[row], f"segment {segment}"
                mask = torch.from_numpy(decode_ids(found) == segment)[None].to(device)
                inputs = teacher.mask(prepared, mask)
            again = teacher.encode_images(inputs)[0].cpu()
            cosines.append(float(torch.nn.functional.cosine_similarity(torch.from_numpy(stored).float(), again, dim=0)))
            if not cosines[-1] >= AGREE:
                problems.append(
                    f"image {found.image_id}, {what}: cosine {cosines[-1]:.4f} to the teacher's row, below {AGREE}"
                )
    if not cosines:
        return [], "no rows to check"
    return problems, f"{counted(len(cosines), 'row')} encoded again, least cosine {min(cosines):.5f}"


def _draw(groups: list[TokenGroup], rows: int, seed: int) -> list[tuple[int, int, int | None]]:
    """(tar, sample, instance row or None for the image's own row) of `rows` distinct rows, or of all if there are
    fewer."""
    of_images = [(tar, int(sample), None) for tar, group in enumerate(groups) for sample in np.flatnonzero(group.kept)]
    of_instances = [
        (tar, sample, row)
        for tar, group in enumerate(groups)
        for sample in range(len(group.kept))
        for row in range(*group.rows(sample).indices(len(group.instance)))
    ]
    everything: list[tuple[int, int, int | None]] = [*of_images, *of_instances]
    chosen = np.random.default_rng([seed]).choice(len(everything), min(rows, len(everything)), replace=False)
    return [everything[i] for i in sorted(chosen.tolist())]


def _pairs(tar: Path, wanted: list[tuple[int, int | None]]) -> Iterator[tuple[int, int | None, Sample]]:
    """The wanted (sample, row) of a tar with their samples."""
    from storage.shards import read_shard

    for position, sample in enumerate(read_shard(tar)):
        for which, row in wanted:
            if which == position:
                yield position, row, sample
