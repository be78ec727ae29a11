"""Stage "cache-clip": what the frozen teacher sees in every image and every masked instance, computed once."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from pipeline.benchmarks import Benchmark
from pipeline.runtime import Runtime
from pipeline.teaching import TeacherConfig
from storage.keys import Recipe, Ref
from storage.store import Build, Store

STAGE, VERSION = "cache-clip", 1
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TokensConfig:
    """`batch`: teacher inputs at a time, packed across images. It is in the key, for a batch's size may move the last bits."""

    batch: int = 128

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"tokens: batch must be at least 1, not {self.batch}")


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
                        encode_tar(clip, tar, group, config.batch, benchmark, hide=split == "train", bar=bar)
                    else:
                        bar.update(count)
            images, kept, instances = sum(opened.counts(split)), 0, 0
            for tar in tars:
                group = read_tokens(build.path / f"{tar.stem}.zarr")
                kept, instances = kept + int(group.kept.sum()), instances + len(group.instance)
            build.counts[split] = {"images": images, "encoded": kept, "instances": instances}
            if split == "train":
                build.counts[split]["left_out_by_image_filter"] = images - kept
                log.info("%s: %d of %d training images are left for training", benchmark.protocol, kept, images)
                if not kept:
                    raise ValueError(
                        f"the image filter of benchmark {benchmark.name} leaves no training image; add images"
                    )

        build.provenance["device"] = str(runtime.torch_device())

    return store.build(recipe(config, teacher=teacher, benchmark=benchmark, shards=shards), work)
