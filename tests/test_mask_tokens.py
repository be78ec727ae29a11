"""Stage mask-tokens: each row is a single call of open_clip on the image masked by what the network found; the training
protocol holds; the bytes are those of an undisturbed build."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_reference import embed, masked, small_clip
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from tiny import QUIET, build, copy_artefacts, tiny_config

from pipeline import mask_tokens, scenes
from pipeline.data.benchmarks import LabelFiles
from pipeline.data.transforms import channels_first
from pipeline.inference.forward import outputs
from pipeline.inference.model import load_model
from pipeline.line import Stage
from storage import transfer
from storage.checkpoints import FILES, load_checkpoint, save_checkpoint
from storage.errors import UserError
from storage.kept_outputs import read_kept_outputs, write_kept_outputs
from storage.mask_tokens import MaskTokenGroup, check_mask_tokens, read_mask_tokens, write_mask_tokens
from storage.remote import Remote
from storage.shards import Shards, decode_image, read_shard
from storage.store import Artefact, Store

CONFIG = tiny_config()
assert isinstance(CONFIG.data, scenes.ScenesConfig)
WORLD = scenes.benchmark(CONFIG.data)
UNSEEN = set(WORLD.unseen_ids)


@pytest.fixture(scope="module")
def steps(shared_store: Store) -> dict[str, Stage]:
    return build(shared_store, CONFIG, until="v2c")


def stage(steps: dict[str, Stage], **change: Any) -> Stage:
    given: dict[str, Any] = {
        "teacher": CONFIG.teacher, "benchmark": WORLD, "calibration_images": 6,
        "shards": steps["shard"].recipe.ref, "checkpoint": steps["v2c"].recipe.ref,
    }  # fmt: skip
    return Stage.of(mask_tokens, CONFIG.tokens, **given | change)


@pytest.fixture(scope="module")
def made(shared_store: Store, steps: dict[str, Stage]) -> Artefact:
    return shared_store.open(stage(steps).run(shared_store, QUIET))


def content(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_every_row_is_a_single_call_of_open_clip(shared_store: Store, steps: dict[str, Stage], made: Artefact) -> None:
    clip, _ = small_clip()
    prepare: Any = image_transform_v2(PreprocessCfg(**clip.visual.preprocess_cfg), is_train=False)
    model = load_model(shared_store.path(steps["v2c"].recipe.ref))
    compared = 0
    for tar in Shards(shared_store.path(steps["shard"].recipe.ref)).tars("val"):
        group = read_mask_tokens(made.path / f"{tar.stem}.zarr")
        assert float(group.scale[0]) == pytest.approx(float(clip.logit_scale.detach().exp()))
        for row, sample in enumerate(read_shard(tar)):
            picture = decode_image(sample)
            _, output = next(outputs(model.segmenter, [(None, channels_first(picture))], model.meta.resize, batch=1))
            masks = (output.probabilities() >= 0.5).numpy()
            queries, tokens = group.of(row)
            assert group.image_id[row] == sample.image_id
            assert queries.tolist() == [q for q, mask in enumerate(masks) if mask.any()]
            prepared = prepare(Image.fromarray(picture))
            for query, token in zip(queries[:4], torch.from_numpy(tokens[:4]).double(), strict=True):
                alone = embed(clip, masked(prepared, masks[query], torch.zeros(3)))
                assert float(torch.cosine_similarity(token, alone, dim=0)) >= 0.9995
                compared += 1
    assert compared >= 10 and made.manifest.counts["val"]["images"] == 10


def test_of_training_images_the_first_that_the_protocol_leaves(
    shared_store: Store, steps: dict[str, Stage], made: Artefact
) -> None:
    samples = [s for tar in Shards(shared_store.path(steps["shard"].recipe.ref)).tars("train") for s in read_shard(tar)]
    left = [s.image_id for s in samples if not UNSEEN & {segment.category_id for segment in s.segments}]
    found = [
        read_mask_tokens(path).image_id.tolist() for path in made.folders(".zarr") if path.name.startswith("train")
    ]
    assert [i for some in found for i in some] == left[:6] and made.manifest.counts["train"]["images"] == 6
    hidden = replace(WORLD, unseen_ids=tuple(sorted({s.category_id for s in samples[0].segments})))
    tars = Shards(shared_store.path(steps["shard"].recipe.ref)).tars("train")
    kept = dict(mask_tokens._left_for_training(tars, hidden, most=10**6))
    assert 0 < sum(kept.values()) < len(samples)
    everything = replace(hidden, protocol="pixel-ignore")
    assert sum(dict(mask_tokens._left_for_training(tars, everything, most=10**6)).values()) == len(samples)


def test_options_that_change_no_token_move_no_key(steps: dict[str, Stage]) -> None:
    """Mirrored views are of training; thresholds of semantic maps do not exist."""
    recipe = stage(steps).recipe
    given: dict[str, Any] = {"teacher": CONFIG.teacher, "calibration_images": 6, **recipe.inputs}
    benchmark = WORLD

    def key(**change: Any) -> str:
        return mask_tokens.recipe(replace(CONFIG.tokens, **change), benchmark=benchmark, **given).key

    assert key() == key(views=2) == recipe.key
    assert len({key(), key(method="attention"), key(crop="box"), key(dtype="bfloat16"), key(batch=7)}) == 5
    semantic = replace(benchmark, files=LabelFiles(images=("*.jpg",), labels=("*.png",), ignored=(), splits={}))
    few, many = (stage(steps, benchmark=semantic, calibration_images=n).recipe.key for n in (1, 9))
    assert few == many != recipe.key


def test_a_killed_build_goes_on_to_the_same_bytes(
    shared_store: Store, steps: dict[str, Stage], made: Artefact, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One group is whole, one is damaged, the others are missing."""
    store, again = Store(tmp_path), stage(steps)
    copy_artefacts(shared_store, store, again.recipe.inputs.values())
    partial = store.partial(made.ref)
    groups = made.folders(".zarr")
    for group in groups[:2]:
        shutil.copytree(group, partial / group.name)
    whole = (partial / groups[0].name / "image_id/c/0").stat()
    chunk = partial / groups[1].name / "image_id/c/0"
    chunk.write_bytes(chunk.read_bytes()[:-9] + b"x" * 9)
    again.run(store, QUIET)
    assert content(store.path(made.ref)) == content(made.path)
    assert (store.path(made.ref) / groups[0].name / "image_id/c/0").stat().st_ino == whole.st_ino
    assert groups[1].name in caplog.text and store.open(made.ref).manifest.provenance["resumed"]


@pytest.mark.slow
def test_two_workers_change_no_byte(
    shared_store: Store, steps: dict[str, Stage], made: Artefact, tmp_path: Path
) -> None:
    store, again = Store(tmp_path), stage(steps)
    copy_artefacts(shared_store, store, again.recipe.inputs.values())
    again.run(store, replace(QUIET, dask="local:2", threads=1))
    assert store.open(made.ref).manifest.provenance["workers"] == 2
    assert content(store.path(made.ref)) == content(made.path)


def test_a_worker_that_does_not_see_the_store(steps: dict[str, Stage], tmp_path: Path) -> None:
    job = mask_tokens.Job(
        tar=tmp_path / "val-000000.tar", sha256="", group=tmp_path / "a.zarr", images=1, hide=False, checkpoint=tmp_path, weights=(),
        artefact=stage(steps).recipe.ref, config=CONFIG.tokens, teacher=CONFIG.teacher, benchmark=WORLD,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"a worker on .* does not find .*val-000000\.tar; pass --store"):
        mask_tokens._encode(job, QUIET, lambda *_: None)


def test_a_worker_takes_the_checkpoint_with_the_bytes_of_the_run(
    shared_store: Store, steps: dict[str, Stage], tmp_path: Path
) -> None:
    """From a remote where its own disk has others under that path, and not from an earlier run that it remembers."""
    trained, here, other = steps["v2c"].recipe.ref, Store(tmp_path / "here"), Store(tmp_path / "other")
    manifest, remote = shared_store.open(trained).manifest, Remote(f"file://{tmp_path}/remote")
    remote.require(make=True)
    transfer.push(shared_store, remote, [manifest], advance=abs)
    copy_artefacts(shared_store, other, [trained])
    tensors, meta = load_checkpoint(other.path(trained))
    save_checkpoint(other.path(trained), {name: tensor + 1 for name, tensor in tensors.items()}, meta)
    ours, theirs = (mask_tokens._hashes(store.path(trained)) for store in (shared_store, other))
    assert ours == tuple(manifest.files[name]["sha256"] for name in FILES) and ours[0] != theirs[0]

    def projector(store: Store, weights: tuple[str, ...]) -> dict[str, torch.Tensor]:
        runtime = replace(QUIET, remote=remote.url)
        return mask_tokens._load(CONFIG.teacher, store.path(trained), weights, runtime)[1].projector.state_dict()

    right = load_model(shared_store.path(trained)).projector.state_dict()
    for store, shift in ((here, 0), (other, 0), (other, 1)):
        found = projector(store, theirs if shift else ours)
        assert right and all(torch.equal(found[name], tensor + shift) for name, tensor in right.items())
    assert projector(here, ours).keys() == right.keys()
    with pytest.raises(UserError, match=f"{trained} has other bytes in file://"):
        projector(here, theirs)
    mask_tokens._load.cache_clear()


# ------------------------------------------------------------------------------------------------ the format


def arrays(**change: np.ndarray) -> dict[str, Any]:
    return {
        "image_id": np.array([4, 9, 11]), "offsets": np.array([0, 2, 2, 3]), "query": np.array([1, 5, 0]),
        "token": np.eye(3, 4, dtype=np.float16),
    } | change  # fmt: skip


def test_a_group_comes_back(tmp_path: Path) -> None:
    write_mask_tokens(tmp_path / "a.zarr", **arrays(), scale=22.5)
    group = read_mask_tokens(tmp_path / "a.zarr")
    assert [group.of(image)[0].tolist() for image in range(3)] == [[1, 5], [], [0]]
    assert np.array_equal(group.of(2)[1], np.eye(3, 4)[2:]) and float(group.scale[0]) == 22.5
    check_mask_tokens(tmp_path / "a.zarr")
    (tmp_path / "a.zarr/query/c/0").unlink()
    with pytest.raises(UserError, match="array query is missing or damaged"):
        check_mask_tokens(tmp_path / "a.zarr")
    write_mask_tokens(
        tmp_path / "none.zarr",
        image_id=np.zeros(0),
        offsets=np.zeros(1),
        query=np.zeros(0),
        token=np.zeros((0, 4)),
        scale=1.0,
    )
    assert len(read_mask_tokens(tmp_path / "none.zarr").image_id) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": np.array([4, 9])}, "do not fit together"),
        ({"token": np.zeros((2, 4))}, "do not fit together"),
        ({"token": np.zeros(3)}, "do not fit together"),
        ({"offsets": np.array([0, 2, 1, 3])}, "must rise from 0 to 3"),
        ({"offsets": np.array([0, 2, 2, 2])}, "must rise from 0 to 3"),
        ({"query": np.array([5, 1, 0])}, "the queries of an image must rise"),
        ({"query": np.array([-1, 1, 0])}, "the queries of an image must rise"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        write_mask_tokens(tmp_path / "a.zarr", **arrays(**change), scale=1.0)
    assert MaskTokenGroup(**arrays(), scale=np.ones(1)).of(0)[0].tolist() == [1, 5]


def test_kept_outputs_come_back(tmp_path: Path) -> None:
    """Images of two sizes; arrays that do not fit are refused."""
    rng = np.random.default_rng(0)
    masks = [rng.normal(size=(2, 3, 4)).astype(np.float32), rng.normal(size=(2, 5, 2)).astype(np.float32)]
    sizes = np.array([[(3, 4), (12, 16), (12, 15), (30, 40)], [(5, 2), (20, 8), (20, 7), (60, 20)]])
    given = {"image_id": np.array([7, 9]), "sizes": sizes, "masks": np.concatenate([m.ravel() for m in masks])}
    logits = {name: rng.normal(size=(2, 2, 6)).astype(np.float32) for name in ("inductive", "transductive")}
    files = write_kept_outputs(tmp_path / "a.zarr", **given, **logits)
    assert sorted(files) == sorted(path for path in (tmp_path / "a.zarr").rglob("*") if path.is_file())
    kept = read_kept_outputs(tmp_path / "a.zarr")
    for number, mask in enumerate(masks):
        assert np.array_equal(kept.masks_of(number), mask)
    assert np.array_equal(kept.transductive, logits["transductive"]) and np.array_equal(kept.sizes, sizes)
    for wrong in ({"masks": given["masks"][1:]}, {"image_id": np.array([7])}, {"sizes": sizes[:, :3]}):
        with pytest.raises(UserError, match="kept outputs do not fit together"):
            write_kept_outputs(tmp_path / "b.zarr", **{**given, **wrong}, **logits)
