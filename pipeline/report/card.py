"""The model card of an exported folder: what the network is, where it comes from, and how it scored."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.inference.model import CheckpointMeta
from pipeline.scoring.records import HEADLINE
from storage.keys import Ref
from storage.lineage import Lineage, Node
from storage.store import MANIFEST, Store

ROW_OF_STAGE = {"v2c": "inductive", "cpa": "transductive"}
NAMES_SHOWN = 200


def card(folder: Path, meta: CheckpointMeta, store: Store) -> str:
    """Markdown. `folder` is the checkpoint that was exported, `meta` has the classes that the export knows. What the
    store does not have, for a folder that was copied out of it, is left out, and the card says so."""
    known = meta.classes
    seen = sum(known.seen)
    lines = [
        f"# A zero-shot segmenter ({ROW_OF_STAGE[meta.stage]}, after stage {1 if meta.stage == 'v2c' else 3})",
        "",
        "```python",
        "import zs_seg",
        "",
        'result = zs_seg.load("THIS FOLDER")("photo.jpg", names=["zebra", "grass:stuff"])',
        "```",
        "",
        f"{len(known.names)} classes, {seen} of them seen in training, {len(known.names) - seen} not. Names are embedded by "
        f"the CLIP {known.teacher['name']} ({known.teacher['pretrained'][:23]}) in {len(meta.templates)} sentences.",
        "",
    ]
    if known.teacher["name"] == "small":
        lines += ["That CLIP was trained on generated scenes alone: on photographs names and scores mean nothing.", ""]
    lines += ["## Scores", "", *_scores(folder, meta, store), ""]
    lines += ["## Lineage", "", *_lineage(folder, store), ""]
    names = [name if is_seen else f"*{name}*" for name, is_seen in zip(known.names, known.seen, strict=True)]
    rest = f" and {len(names) - NAMES_SHOWN} more, in meta.json" if len(names) > NAMES_SHOWN else ""
    lines += ["## Classes", "", "Unseen ones in italics: " + ", ".join(names[:NAMES_SHOWN]) + rest + "."]
    return "\n".join(lines) + "\n"


def _node(folder: Path, lineage: Lineage) -> Node | None:
    """The checkpoint in the store."""
    try:
        made = json.loads((folder / MANIFEST).read_bytes())
        return lineage.node(Ref(kind=made["kind"], key=made["key"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _lineage(folder: Path, store: Store) -> Sequence[str]:
    lineage = Lineage(store)
    if not (node := _node(folder, lineage)):
        return ["The store that it was exported from does not have it."]
    rows = [
        f"| {stage} | {made.ref} | {made.provenance['created']} | {made.provenance['seconds']:.0f} | "
        f"{(made.provenance.get('git') or 'none')[:12]} |"
        for stage, made in reversed(lineage.line(node.ref).items())
    ]
    return ["| stage | artefact | made | seconds | git |", "| --- | --- | --- | --- | --- |", *rows]


def _scores(folder: Path, meta: CheckpointMeta, store: Store) -> Sequence[str]:
    lineage = Lineage(store)
    node = _node(folder, lineage)
    reports = [ref for ref in lineage.users(node.ref) if ref.kind == "report"] if node else []
    found: list[dict[str, Any]] = []
    for ref in reports:
        if store.state(ref) == "fresh":
            found.append({"ref": ref, **json.loads((store.path(ref) / "report.json").read_bytes())})
    if not found:
        return ["No report of it was in the store that it was exported from."]
    heads = [*HEADLINE["panoptic"], *HEADLINE["semantic"]]
    rows = []
    for report in found:
        scores = report[ROW_OF_STAGE[meta.stage]]
        cells = [f"{scores[head]:.1f}" if scores.get(head) is not None else "-" for head in heads]
        rows.append(f"| {report['benchmark']}, {report['ref']} | {' | '.join(cells)} |")
    lines = [f"| benchmark | {' | '.join(heads)} |", "| --- |" + " --- |" * len(heads), *rows]
    marks = [f"- {mark}" for report in found for mark in report["marks"]]
    return [
        *lines,
        "",
        "Percent; of the classes that it was trained and evaluated with.",
        *(["", *marks] if marks else []),
    ]
