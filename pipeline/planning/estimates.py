"""Estimates of bytes and seconds of each stage before it runs, from comparable artefacts of the store, else assumed.

A measured rate is used only where its conditions are the same: the teacher and the tokens' config, the network and its
views, real or drawn images. The device may differ and is named.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from models.teacher_files import SMALL_CLIP
from pipeline.line import Config, Stage
from pipeline.planning.counts import Counts
from storage.keys import canonical
from storage.lineage import Lineage, Node

UNITS = {
    "scenes": "image", "shard": "image", "text": "class", "cache-clip": "teacher input",
    "v2c": "step", "queries": "view", "g2s": "step", "cpa": "step", "evaluate": "image",
}  # fmt: skip
# Stages whose bytes are proportional to their units; a checkpoint's are constant.
GROWING = ("scenes", "shard", "cache-clip", "queries")
# Config fields that do not change the seconds per unit.
AMOUNTS = frozenset({"seed", "steps", "views", "calibration_images", "train_images", "val_images"})


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """`bytes` and `seconds` of a stage, None = unknown; `source`: the basis of `seconds` in words, "" = none."""

    bytes: float | None = None
    seconds: float | None = None
    source: str = ""


class Estimator:
    """Estimates for the stages of one run.

    Args:
        counts: the input of the run.
        tflops: assumed speed of the teacher's forward pass, in TFLOP/s, where nothing was measured.
        step_seconds: stated seconds per step of stage 1, used instead of a measurement; 0 = none stated.
    """

    def __init__(
        self,
        config: Config,
        stages: list[Stage],
        lineage: Lineage,
        counts: Counts,
        *,
        tflops: float,
        step_seconds: float,
    ) -> None:
        self.config, self.lineage, self.counts = config, lineage, counts
        self.tflops, self.step_seconds = tflops, step_seconds
        self.configs = {stage.name: json.loads(canonical(stage.recipe.config)) for stage in stages}
        views = None if counts.left is None else counts.left * config.queries.views
        self.amounts = {
            "scenes": counts.train + counts.val, "shard": counts.train + counts.val, "cache-clip": counts.inputs,
            "queries": views, "text": len(self.configs["text"]["categories"]), "evaluate": counts.val,
            "v2c": config.v2c.steps, "g2s": config.g2s.steps, "cpa": config.cpa.steps,
        }  # fmt: skip

    def estimate(self, stage: Stage) -> Estimate:
        """The bytes and seconds that building this stage would take."""
        name, amount = stage.name, self.amounts[stage.name]
        size = self._bytes(name)
        if name == "v2c" and self.step_seconds:
            seconds = self.step_seconds * self.config.v2c.steps
            return Estimate(bytes=size, seconds=seconds, source=f"stated: {self.step_seconds:g} s a step")
        if amount is not None and (alike := self._newest_alike(stage)):
            did = _amount(alike)
            share = amount / did
            seconds = alike.provenance["seconds"] * share
            pace = f"{alike.provenance['seconds'] / did:.2g} s a {UNITS[name]}"
            device = f" on {alike.provenance['device']}" if "device" in alike.provenance else ""
            size = alike.bytes * (share if name in GROWING else 1)
            return Estimate(bytes=size, seconds=seconds, source=f"measured: {pace}{device}, {alike.ref}")
        work = teacher_gflop(self.config.teacher.name) if name == "cache-clip" else None
        if amount is not None and work is not None:
            seconds = amount * work / 1000 / self.tflops
            return Estimate(
                bytes=size, seconds=seconds, source=f"assumed: {work:.1f} GFLOP an input at {self.tflops:g} TFLOP/s"
            )
        return Estimate(bytes=size)

    def _bytes(self, name: str) -> float | None:
        """The stage's bytes by arithmetic alone; None where they do not follow from the config and the counts."""
        counts, segmenter = self.counts, self.config.v2c.segmenter
        if name == "shard":
            return counts.bytes
        if name == "cache-clip" and counts.inputs and (dim := teacher_dim(self.config.teacher.name)):
            return counts.inputs * dim * 2
        if name == "queries" and self.amounts["queries"]:
            return self.amounts["queries"] * segmenter.queries * (segmenter.dim * 2 + 8)
        return None

    def _newest_alike(self, stage: Stage) -> Node | None:
        """The newest artefact of the stage that was made under the same conditions without being resumed."""
        wanted = _conditions(stage.name, self.configs)
        nodes = [node for node in self.lineage.nodes(stage.recipe.kind) if node.stage == stage.name]
        for node in sorted(nodes, key=lambda node: node.provenance["created"], reverse=True):
            if not node.provenance["resumed"] and _amount(node):
                line = self.lineage.line(node.ref)
                there = {one.ref for one in line.values()}
                if all(source in there for one in line.values() for source in one.inputs.values()):
                    found = {name: one.config for name, one in line.items()}
                    if _conditions(stage.name, found) == wanted:
                        return node
        return None


def _conditions(name: str, configs: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that determine the stage's seconds per unit."""
    own = configs[name]
    if name == "scenes":
        return _without_amounts(own["scenes"])
    if name == "text":
        return {"text": own["text"], "teacher": own["teacher"]}
    real = configs["shard"]["source"] is not None  # photographs, or drawn scenes
    if name == "shard":
        return {"real": real}
    if name == "cache-clip":
        return {"real": real, "teacher": own["teacher"], "tokens": own["tokens"]}
    if name == "evaluate":
        own = own["evaluate"]
    return {"real": real, "own": _without_amounts(own), "v2c": _without_amounts(configs["v2c"])}


def _without_amounts(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in AMOUNTS}


def _amount(manifest: Node) -> int:
    """The units of work, see `UNITS`, that the artefact took."""
    counts = manifest.counts
    if manifest.stage in ("v2c", "g2s", "cpa"):
        return manifest.config["steps"]
    if manifest.stage == "scenes":
        return counts["train2017"]["images"] + counts["val2017"]["images"]
    if manifest.stage == "shard":
        return counts["train"]["images"] + counts["val"]["images"]
    if manifest.stage == "cache-clip":
        return sum(counts[split]["encoded"] + counts[split]["instances"] for split in ("train", "val"))
    return counts[{"text": "classes", "queries": "views", "evaluate": "images"}[manifest.stage]]


def teacher_dim(name: str) -> int | None:
    """Width D of the teacher's embeddings; None for a model without a config in open_clip."""
    config = _model_config(name)
    return config["embed_dim"] if config else None


def teacher_gflop(name: str) -> float | None:
    """GFLOP of one image in the teacher's image tower, at two FLOP per multiplication; None unless it is a plain ViT.

    For n patches and the class token, width w and MLP ratio r, a layer takes (4 + 2 r) (n + 1) w^2 + 2 (n + 1)^2 w
    multiplications; the patch embedding is added.
    """
    vision = (_model_config(name) or {}).get("vision_cfg", {})
    patch, width = vision.get("patch_size"), vision.get("width")
    if not patch or isinstance(vision["image_size"], list):
        return None
    patches = (vision["image_size"] // patch) ** 2
    tokens, ratio = patches + 1, vision.get("mlp_ratio", 4.0)
    layer = (4 + 2 * ratio) * tokens * width**2 + 2 * tokens**2 * width
    return 2e-9 * (vision["layers"] * layer + patches * 3 * patch**2 * width)


def _model_config(name: str) -> dict[str, Any] | None:
    """open_clip's config file of the model, read without importing open_clip, which takes seconds."""
    if name == "small":
        return json.loads((SMALL_CLIP / "open_clip_config.json").read_text(encoding="utf-8"))["model_cfg"]
    package = find_spec("open_clip")
    assert package and package.origin
    path = Path(package.origin).parent / "model_configs" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
