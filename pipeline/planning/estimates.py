"""Estimates of bytes and seconds of each stage before it runs, from comparable artefacts of the store, else assumed.

A measured rate is used only where its conditions are the same: the teacher and the tokens' config, the network and its
views, real or drawn images. The device may differ and is named. Learning rates, seeds and the like are no conditions,
weights only in whether they are 0. Where nothing comparable was built, the rate is one of `DEMO` and `PUBLISHED`, or
follows from a number of FLOPs and `tflops`, and the source says that it is assumed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from models.teacher_files import SMALL_CLIP
from pipeline.data.config import CocoConfig
from pipeline.line import Config, Stage
from pipeline.planning.counts import Counts
from storage.keys import canonical
from storage.lineage import Lineage, Node

UNITS = {
    "scenes": "image", "shard": "image", "text": "class", "cache-clip": "teacher input",
    "v2c": "step", "queries": "view", "g2s": "step", "cpa": "step", "mask-tokens": "image", "evaluate": "image",
}  # fmt: skip
# Stages whose bytes are proportional to their units; a checkpoint's are constant.
GROWING = ("scenes", "shard", "cache-clip", "queries", "mask-tokens")
# Config fields that do not change the seconds per unit: amounts, and numbers that only enter the arithmetic.
FREE = frozenset(
    {
        "seed", "steps", "views", "calibration_images", "train_images", "val_images", "lr", "weight_decay", "warmup",
        "decay", "backbone_lr", "scale_lr", "backbone_weights", "gamma", "tau", "text_scale", "text_centering",
        "overlap_threshold", "threshold_slack", "control_offset", "alpha", "beta",
    }
)  # fmt: skip
# Those of which only matters whether they are 0, which switches something off.
SWITCHES = frozenset(
    {
        "clip", "ema", "class_weight", "bce_weight", "dice_weight", "global_weight", "instance_weight", "mmd_weight",
        "diversity_weight", "semantic_weight", "kl_weight", "real_weight", "synthetic_weight", "candidate_mask_weight",
        "candidate_token_weight",
    }
)  # fmt: skip

# Seconds a unit where nothing was measured: what the preset demo took on 2 virtual CPU cores (Intel Xeon, 2026-11-26).
# Of a view of 96 x 96 pixels in v2c, queries and evaluate, to whose pixels they are taken to be proportional.
DEMO = {
    "scenes": 0.0045, "shard": 0.0021, "text": 0.14, "cache-clip": 0.0021,
    "v2c": 0.0143, "queries": 0.0059, "g2s": 0.0122, "cpa": 0.0077,
    "mask-tokens": 0.072, "evaluate": 0.147,
}  # fmt: skip
DEMO_VIEW, DEMO_BACKBONE = 96**2, "test_resnet"
# The same for the published networks and for photographs, as far as it was measured: 140 images of COCO, and stage 2
# over cached queries of COCO's size (pipeline/bench/README.md). Stage 3, whose steps are alike, is given the same.
PUBLISHED = {"shard": 0.03, "g2s": 0.067, "cpa": 0.067}
# GFLOP of a view of 512 x 512 pixels, to whose pixels they are taken to be proportional, by architecture and backbone:
# a training step of stage 1 and a forward pass, as torch.utils.flop_counter counts them, without the losses. At 50
# TFLOP/s steps of coco-zps-r50 and coco-zps-maskformer-r50 are 0.51 and 0.40 s; an H200 took 0.44 and 0.42 s.
GFLOP = {
    ("mask2former", "resnet50"): (398, 133),
    ("mask2former", "resnet101c"): (523, 175),
    ("maskformer", "resnet50"): (310, 104),
}
GFLOP_VIEW = 512**2
# Teacher inputs of an image, itself and its segments, where they are not counted yet: of the demo 4.9, of 140 images of
# COCO 11.8.
INPUTS_DRAWN, INPUTS_REAL = 5, 12
TFLOPS = 50.0  # assumed speed of the device, in TFLOP/s


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """`bytes` and `seconds` of a stage, None = unknown; `source`: the basis of `seconds` in words, "" = none.

    `assumed`: whether `seconds` rest on no measurement of this store.
    """

    bytes: float | None = None
    seconds: float | None = None
    source: str = ""
    assumed: bool = False


class Estimator:
    """Estimates for the stages of one run.

    Args:
        counts: the input of the run.
        tflops: assumed speed of the teacher and of the published networks, in TFLOP/s, where nothing was measured.
        step_seconds: stated seconds per step of stage 1, used instead of a measurement; 0 = none stated.
    """

    def __init__(
        self,
        config: Config,
        stages: list[Stage],
        lineage: Lineage,
        counts: Counts,
        *,
        tflops: float = TFLOPS,
        step_seconds: float = 0.0,
    ) -> None:
        self.config, self.lineage, self.counts = config, lineage, counts
        self.tflops, self.step_seconds = tflops, step_seconds
        self.configs = {stage.name: json.loads(canonical(stage.recipe.config)) for stage in stages}
        left = counts.train if counts.left is None else counts.left
        # stages whose amounts are not counted yet, and what is taken in their place
        self.supposed: dict[str, str] = {}
        if counts.left is None:
            self.supposed["queries"] = "of all training images, as not counted yet"
        if (inputs := counts.inputs) is None:
            each = INPUTS_REAL if isinstance(config.data, CocoConfig) else INPUTS_DRAWN
            inputs = (left + counts.val) * each
            self.supposed["cache-clip"] = f"{each} an image, as not counted yet"
        self.amounts = {
            "scenes": counts.train + counts.val, "shard": counts.train + counts.val, "cache-clip": inputs,
            "queries": left * config.queries.views, "text": len(self.configs["text"]["categories"]),
            "mask-tokens": counts.val + min(left, self.configs["mask-tokens"]["calibration_images"]),
            "evaluate": counts.val, "v2c": config.v2c.steps, "g2s": config.g2s.steps, "cpa": config.cpa.steps,
        }  # fmt: skip

    def estimate(self, stage: Stage) -> Estimate:
        """The bytes and seconds that building this stage would take."""
        guess = self._estimate(stage)
        if stage.name in self.supposed and guess.source:
            return replace(guess, source=f"{guess.source}; {self.supposed[stage.name]}", assumed=True)
        return guess

    def _estimate(self, stage: Stage) -> Estimate:
        name, amount = stage.name, self.amounts[stage.name]
        size = self._bytes(name)
        if name == "v2c" and self.step_seconds:
            seconds = self.step_seconds * self.config.v2c.steps
            source = f"stated: {self.step_seconds:g} s a step"
            return Estimate(bytes=size, seconds=seconds, source=source, assumed=True)
        if alike := self._newest_alike(stage):
            did = _amount(alike)
            share = amount / did
            seconds = alike.provenance["seconds"] * share
            pace = f"{alike.provenance['seconds'] / did:.2g} s {_a(UNITS[name])}"
            device = f" on {alike.provenance['device']}" if "device" in alike.provenance else ""
            size = alike.bytes * (share if name in GROWING else 1)
            return Estimate(bytes=size, seconds=seconds, source=f"measured: {pace}{device}, {alike.ref}")
        if gflop := self._gflop(name):
            source = f"assumed: {gflop:,.1f} GFLOP {_a(UNITS[name])} at {self.tflops:g} TFLOP/s"
            return Estimate(bytes=size, seconds=amount * gflop / 1000 / self.tflops, source=source, assumed=True)
        if rate := self._rate(name):
            source = f"assumed: {rate:.2g} s {_a(UNITS[name])}, measured on 2 CPU cores"
            return Estimate(bytes=size, seconds=amount * rate, source=source, assumed=True)
        return Estimate(bytes=size)

    def _gflop(self, name: str) -> float | None:
        """GFLOP of a unit of the stage, of a network or a teacher of which they are known."""
        v2c = self.config.v2c
        work = GFLOP.get((v2c.segmenter.architecture, v2c.segmenter.backbone))
        if name == "cache-clip":
            return teacher_gflop(self.config.teacher.name)
        if name == "mask-tokens" and work and (teacher := teacher_gflop(self.config.teacher.name)):
            # at most: every query's mask through the teacher
            return work[1] * self._pixels(name) / GFLOP_VIEW + v2c.segmenter.queries * teacher
        if work and name in ("v2c", "queries"):
            return work[name == "queries"] * self._pixels(name) / GFLOP_VIEW
        return None

    def _rate(self, name: str) -> float | None:
        """Seconds a unit of the stage, where they were measured elsewhere for a network, or images, like these."""
        real, small = isinstance(self.config.data, CocoConfig), self.config.v2c.segmenter.backbone == DEMO_BACKBONE
        if name == "cache-clip":
            return DEMO[name] if self.config.teacher.name == "small" else None
        if name in ("scenes", "shard", "text"):
            return PUBLISHED[name] if real and name in PUBLISHED else DEMO[name]
        if not small:
            return PUBLISHED.get(name)
        return DEMO[name] * (
            self._pixels(name) / DEMO_VIEW if name in ("v2c", "queries", "mask-tokens", "evaluate") else 1
        )

    def _pixels(self, name: str) -> float:
        """The pixels of a unit: of a batch of training views, else of the test view of an image of 4 to 3."""
        v2c = self.config.v2c
        if name == "v2c":
            return v2c.batch * v2c.augment.size**2
        return v2c.resize.short * min(v2c.resize.longest, v2c.resize.short * 4 / 3)

    def _bytes(self, name: str) -> float | None:
        """The stage's bytes by arithmetic alone; None where they do not follow from the config and the counts."""
        counts, segmenter = self.counts, self.config.v2c.segmenter
        if name == "shard":
            return counts.bytes
        if name == "cache-clip" and counts.inputs and (dim := teacher_dim(self.config.teacher.name)):
            return counts.inputs * dim * 2
        if name == "mask-tokens" and (dim := teacher_dim(self.config.teacher.name)):  # at most, as above
            return self.amounts[name] * segmenter.queries * (dim * 2 + 4)
        if name == "queries":
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
        return _conditional(own["scenes"])
    if name == "text":
        return {"text": own["text"], "teacher": own["teacher"]}
    real = configs["shard"]["source"] is not None  # photographs, or drawn scenes
    if name == "shard":
        return {"real": real}
    if name == "cache-clip":
        return {"real": real, "teacher": own["teacher"], "tokens": own["tokens"]}
    if name == "evaluate":
        own = own["evaluate"]
    return {"real": real, "own": _conditional(own), "v2c": _conditional(configs["v2c"])}


def _conditional(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings on which the seconds per unit depend."""
    kept: dict[str, Any] = {}
    for name, value in config.items():
        if name in SWITCHES:
            kept[name] = value != 0
        elif name not in FREE:
            kept[name] = _conditional(value) if isinstance(value, Mapping) else value
    return kept


def _a(unit: str) -> str:
    """ "an image", "a step"."""
    return f"{'an' if unit[0] in 'aeiou' else 'a'} {unit}"


def _amount(manifest: Node) -> int:
    """The units of work, see `UNITS`, that the artefact took."""
    counts = manifest.counts
    if manifest.stage in ("v2c", "g2s", "cpa"):
        return manifest.config["steps"]
    if manifest.stage == "scenes":
        return counts["train2017"]["images"] + counts["val2017"]["images"]
    if manifest.stage == "shard":
        return counts["train"]["images"] + counts["val"]["images"]
    if manifest.stage == "mask-tokens":
        return counts["train"]["images"] + counts["val"]["images"]
    if manifest.stage == "cache-clip":
        inputs = sum(counts[split]["encoded"] + counts[split]["instances"] for split in ("train", "val"))
        return inputs + counts["train"].get("regions", 0)
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
