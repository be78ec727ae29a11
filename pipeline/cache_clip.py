"""Stage "cache-clip": what the frozen teacher sees in every image and every masked instance, computed once."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal, get_args

from pipeline.benchmarks import Benchmark
from pipeline.runtime import Runtime
from pipeline.teaching import TeacherConfig
from storage.keys import Recipe, Ref
from storage.store import Build, Store

STAGE, VERSION = "cache-clip", 2
Method = Literal["pixels", "attention"]
Crop = Literal["full", "box"]
Resize = Literal["squeeze", "letterbox"]
Precision = Literal["float32", "bfloat16", "float16"]
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TokensConfig:
    """How the teacher looks at images and instances. All of it is in the key.

    `batch`: teacher inputs at a time, packed across images; a batch's size may move the last bits. `method`: "pixels" shows the
    teacher each instance alone, in the fill colour; "attention" shows it the image once, and each instance is a further CLS token
    that sees its own patches only (open_clip's ViTs and ResNets; much faster, and another token).
    `crop`: an instance is shown where it is in the whole image ("full"), or in a "box": a square around it, `margin` of its longer
    side wider at each side. `resize`: what is shown is stretched to the teacher's square input ("squeeze"), or keeps its shape between
    borders of the fill colour ("letterbox"). `min_area`: segments of fewer pixels are not encoded; their rows are zero, the
    instance loss leaves them out, and the report counts them as misnamed by its ceiling. `views`: 2 encodes the mirrored image too,
    for the mirrored training views. `dtype`: what the image tower computes in; rows are stored in float16 all the same.
    """

    batch: int = 128
    method: Method = "pixels"
    crop: Crop = "full"
    margin: float = 0.1
    resize: Resize = "squeeze"
    min_area: int = 0
    views: Literal[1, 2] = 1
    dtype: Precision = "float32"

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"tokens: batch must be at least 1, not {self.batch}")
        if self.min_area < 0 or self.margin < 0:
            raise ValueError("tokens: min_area and margin must be 0 or more")
        for field, allowed in (("method", Method), ("crop", Crop), ("resize", Resize), ("dtype", Precision)):
            if (value := getattr(self, field)) not in get_args(allowed):
                raise ValueError(f"tokens: {field} must be one of {', '.join(get_args(allowed))}, not {value!r}")
        if self.views not in (1, 2):
            raise ValueError(f"tokens: views must be 1, or 2 with the mirrored images, not {self.views}")
        if self.method == "attention" and self.crop == "box":
            raise ValueError(
                "tokens: method 'attention' sees the whole image at once; set crop 'full', or method 'pixels'"
            )


def recipe(config: TokensConfig, *, teacher: TeacherConfig, benchmark: Benchmark, shards: Ref) -> Recipe:
    content = {
        "tokens": config, "teacher": teacher.identity, "unseen_ids": benchmark.unseen_ids, "protocol": benchmark.protocol,
    }  # fmt: skip
    return Recipe(kind="tokens", stage=STAGE, version=VERSION, config=content, inputs={"shards": shards})


def run(
    config: TokensConfig, *, teacher: TeacherConfig, benchmark: Benchmark, shards: Ref, store: Store, runtime: Runtime
) -> Ref:
    """Encode every tar into one token group of the same name; a group that is there is not made again."""

    def work(build: Build) -> None:
        from pipeline.encoding import encode_tar
        from storage.shards import Shards
        from storage.tokens import read_tokens

        opened = Shards(store.open(shards).path)
        clip = None
        for split in ("train", "val"):
            tars = opened.tars(split)
            with runtime.bar(sum(opened.counts(split)), f"teacher tokens, {split}", "image") as bar:
                for tar, count in zip(tars, opened.counts(split), strict=True):
                    group = build.path / f"{tar.stem}.zarr"
                    if not group.exists():
                        clip = clip or teacher.load(runtime)
                        encode_tar(
                            clip, tar, group, config, benchmark,
                            hide=split == "train", progress=lambda images, instances, bar=bar: bar.update(images),
                        )  # fmt: skip
                    else:
                        bar.update(count)
            images, kept, instances, too_small = sum(opened.counts(split)), 0, 0, 0
            for tar in tars:
                group = read_tokens(build.path / f"{tar.stem}.zarr")
                kept, instances = kept + int(group.kept.sum()), instances + len(group.instance)
                too_small += int((~group.encoded).sum())
            build.counts[split] = {"images": images, "encoded": kept, "instances": instances, "too_small": too_small}
            if split == "train":
                build.counts[split]["left_out_by_image_filter"] = images - kept
                log.info("%s: %d of %d training images are left for training", benchmark.protocol, kept, images)
                if not kept:
                    raise ValueError(
                        f"the image filter of benchmark {benchmark.name} leaves no training image; add images"
                    )

        build.provenance["device"] = str(runtime.torch_device())

    return store.build(recipe(config, teacher=teacher, benchmark=benchmark, shards=shards), work)
