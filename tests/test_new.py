"""Own data: from each layout to a finished toy run with two commands, exporters' quirks, and what is warned of or
refused."""

from __future__ import annotations

import copy
import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from own_data import (
    CLASSES,
    LAYOUTS,
    TRAIN,
    UNSEEN,
    VAL,
    Scene,
    both_in_one_folder,
    coco_instances,
    coco_panoptic,
    instances_json,
    lists_of_names,
    one_json,
    panoptic_json,
    plain_folder,
    plain_maps,
    save,
    split_folders,
    split_folders_of_both,
    write,
)
from PIL import Image
from sharding import QUIET, samples

from flows.cli import main
from flows.presets import preset
from pipeline import shard as shard_stage
from pipeline.data.benchmarks import Benchmark, choose, load_benchmark
from pipeline.data.coco import coco_source
from pipeline.data.config import ShardConfig
from pipeline.data.label_maps import label_source
from pipeline.line import Stage
from storage.shards import Sample, decode_ids
from storage.store import Store

# The second command of a test: the one that `new` prints, with fewer steps and smaller views.
TOY = (
    "--max-steps", "2", "--device", "cpu", "--threads", "1", "--dask", "none", "--v2c.batch", "2", "--v2c.points", "64",
    "--v2c.bank", "4", "--v2c.calibration-images", "2", "--v2c.augment.size", "64", "--v2c.resize.short", "64",
    "--v2c.resize.longest", "96", "--g2s.hidden", "32", "--evaluate.pictures", "1",
)  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def new(capsys: pytest.CaptureFixture[str], *words: str, name: str = "mine", refused: bool = False) -> str:
    """What `zs-seg new` prints: its output, or its one line of refusal."""
    capsys.readouterr()
    status = main(("new", name, "--preset", "coco-sample", "--threads", "1", *words))
    printed = capsys.readouterr()
    if refused:
        assert status == 2 and not Path(f"{name}.json").exists(), printed
        (line,) = [line for line in printed.err.splitlines() if line.startswith("zs-seg: ")]
        return line
    assert status == 0, printed.err
    return printed.out


def command(output: str) -> list[str]:
    """The words behind `zs-seg` of the command that `new` ends with."""
    last = output.strip().splitlines()[-1]
    assert last.startswith("run: zs-seg ")
    return shlex.split(last)[2:]


def shards_of(root: Path, name: str = "mine.json") -> dict[str, list[Sample]]:
    """The samples of both splits, as stage shard makes them of a benchmark file."""
    return shards(root, load_benchmark(name))


def shards(root: Path, benchmark: Benchmark) -> dict[str, list[Sample]]:
    store = Store(root.parent / "store")
    source = label_source(root, benchmark) if benchmark.files else coco_source(root, benchmark.annotations)
    ref = Stage.of(shard_stage, ShardConfig(), source=source, benchmark=benchmark).run(store, QUIET)
    return {split: samples(store.path(ref), split) for split in ("train", "val")}


def classes_of(sample: Sample, benchmark: Benchmark) -> np.ndarray:
    """(H, W) category of each pixel, 0 = unlabelled."""
    ids = decode_ids(sample)
    found = np.zeros(ids.shape, int)
    for segment in sample.segments:
        found[ids == segment.id] = segment.category_id
        assert (ids == segment.id).sum() == segment.area > 0
    assert set(np.unique(ids)) - {0} == {segment.id for segment in sample.segments}
    return found


# ---------------------------------------------------------------------------------------- two commands, seven layouts


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_from_a_layout_to_a_report_with_two_commands(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, layout: str
) -> None:
    make, unseen = LAYOUTS[layout]
    output = new(capsys, "--from", str(make(tmp_path / "data")), "--unseen", unseen, "--store", str(tmp_path / "store"))
    assert main((*command(output), *TOY)) == 0
    report = json.loads((tmp_path / "runs" / "mine" / "report.json").read_text())
    assert report["settings"]["images"] == (6 if "seed" not in layout else report["settings"]["images"]) > 0
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()
    # and the same file serves to evaluate
    words = (
        "--checkpoint",
        "mine",
        "--benchmark",
        "mine.json",
        "--data",
        "data",
        "--store",
        "store",
        "--device",
        "cpu",
    )
    assert main(("evaluate", *words, "--json", "scores.json")) == 0
    scores = json.loads(Path("scores.json").read_text())["scores"]
    wanted = {"sIoU", "uIoU"} if load_benchmark("mine.json").files else {"sPQ", "uPQ"}
    assert wanted <= scores.keys() and all(scores[name] is not None for name in wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_shards_of_a_layout_hold_its_pixels(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, layout: str
) -> None:
    make, unseen = LAYOUTS[layout]
    root = make(tmp_path / "data")
    new(capsys, "--from", str(root), "--unseen", unseen)
    benchmark, found = load_benchmark("mine.json"), shards_of(root)
    held = benchmark.files.holdout if benchmark.files else benchmark.annotations and benchmark.annotations.holdout
    if held:
        named = {split: {s.name for s in (*TRAIN, *VAL) if held.holds(name_of(s, benchmark), split)} for split in found}
    else:
        named = {"train": {scene.name for scene in TRAIN}, "val": {scene.name for scene in VAL}}
    assert {split: len(some) for split, some in found.items()} == {split: len(some) for split, some in named.items()}
    meant = {"coco_stuff": {1: 0, 2: 1, 3: 2, 4: 180}, "plain_folder": {i: 10 * i for i in CLASSES},
             "voc": {1: 7, 2: 12, 3: 15, 4: 0}, "ade": {1: 13, 2: 21, 3: 5, 4: 3}}.get(make.__name__)  # fmt: skip
    instances = benchmark.annotations and benchmark.annotations.kind == "instances"
    scene_of = {scene.name: scene for scene in (*TRAIN, *VAL)}
    for split, some in found.items():
        expected = []
        for name in named[split]:
            values = drawn(scene_of[name]) if instances else [scene_of[name].values.astype(int)]
            expected += [np.array([-1, *(meant[i] for i in CLASSES)])[one] if meant else one for one in values]
        for sample in some:
            values = classes_of(sample, benchmark)
            if make.__name__ == "coco_stuff":  # where 0 is a class
                values = np.where(decode_ids(sample) == 0, -1, values)
            nothing = -1 if make.__name__ == "coco_stuff" else 0
            assert any(np.array_equal(np.maximum(one, nothing), values) for one in expected), sample.image_id


@pytest.mark.parametrize("make", [split_folders, split_folders_of_both, lists_of_names, both_in_one_folder])
def test_plain_label_maps_lie_as_people_lay_them(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    """The same scenes, and names in files of every form, give the same shards."""
    new(capsys, "--from", str(plain_maps(tmp_path / "plain")), "--unseen", UNSEEN, name="plain")
    new(capsys, "--from", str(make(tmp_path / "data")), "--unseen", UNSEEN)
    expected, found = shards_of(tmp_path / "plain", "plain.json"), shards_of(tmp_path / "data")
    if make is both_in_one_folder:  # split by a seed
        expected, found = (
            {"": sorted(some["train"] + some["val"], key=lambda s: s.image)} for some in (expected, found)
        )
    assert found == expected


def test_a_folder_with_several_kinds(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    root = coco_panoptic(tmp_path / "data")
    for split, made in (("train", TRAIN), ("val", VAL)):
        write(root / "annotations" / f"instances_{split}2017.json", instances_json(made, 1))
        write(root / "annotations" / f"captions_{split}2017.json", "no JSON, and not read")
    output = new(capsys, "--from", str(root), "--unseen", UNSEEN)
    assert "COCO panoptic (" in output and "also found: instances annotations, taken with --kind instances" in output
    output = new(capsys, "--from", str(root), "--unseen", UNSEEN, "--kind", "instances", name="instances")
    assert "COCO instances (annotations/instances_train2017.json, annotations/instances_val2017.json)" in output
    one = str(root / "annotations" / "instances_val2017.json")
    output = new(capsys, "--from", one, "--unseen", UNSEEN, "--val-share", "0.5", name="one")
    assert "val is 50% of the images, drawn by name with seed 0" in output
    assert sum(map(len, shards_of(root, "one.json").values())) == len(VAL)


def test_a_benchmark_to_evaluate_on_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    root = plain_maps(tmp_path / "data")
    output = new(capsys, "--from", str(root), "--unseen", "none")
    benchmark = load_benchmark("mine.json")
    assert benchmark.unseen_ids == () and benchmark.protocol == "none"
    assert command(output) == ["evaluate", "--checkpoint", "KEY", "--benchmark", "mine.json", "--data", str(root)]


def drawn(scene: Scene) -> list[np.ndarray]:
    """The map of a scene's instances, the smaller on top of the larger, without and with its ground."""
    ways = []
    for ground in (False, True):
        values = np.where((scene.values == 4) & ground, 4, 0)
        boxes = list(enumerate(scene.boxes))
        for _, (value, top, left, bottom, right) in sorted(
            boxes, key=lambda b: (-(b[1][3] - b[1][1]) * (b[1][4] - b[1][2]), -b[0])
        ):
            values[top:bottom, left:right] = value
        ways.append(values)
    return ways


def name_of(scene: Scene, benchmark: Benchmark) -> str:
    """What a holdout draws by: file_name, or what `*` stands for."""
    return scene.name if benchmark.files else f"{scene.name}.jpg"


# --------------------------------------------------------------------------------------------------- exporters' quirks


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def floats(data: dict[str, Any]) -> None:
    for image in data["images"]:
        image.update(id=float(image["id"]), height=float(image["height"]), width=float(image["width"]))
    for one in data["annotations"]:
        one.update(id=float(one["id"]), image_id=str(one["image_id"]), category_id=float(one["category_id"]))
    for category in data["categories"]:
        category.update(id=float(category["id"]))


def without_iscrowd(data: dict[str, Any]) -> None:
    for one in data["annotations"]:
        del one["iscrowd"]


def repeated_ids(data: dict[str, Any]) -> None:
    for one in data["annotations"]:
        one["id"] = 1


def degenerate(data: dict[str, Any]) -> None:
    """A line of two points beside each outline: it has no area."""
    for one in data["annotations"]:
        if isinstance(one["segmentation"], list):
            one["segmentation"].append([1, 1, 9, 9])


def flat(data: dict[str, Any]) -> None:
    """Polygons that are in no list of their own."""
    for one in data["annotations"]:
        if isinstance(one["segmentation"], list):
            (one["segmentation"],) = one["segmentation"]


def compressed(data: dict[str, Any]) -> None:
    from pycocotools import mask as coco_mask

    for one in data["annotations"]:
        if isinstance(found := one["segmentation"], dict):
            values = np.repeat(np.arange(len(found["counts"])) % 2, found["counts"]).astype(np.uint8)
            mask = values.reshape(found["size"], order="F")
            counts = coco_mask.encode(mask)["counts"]
            assert isinstance(counts, bytes)
            one["segmentation"] = {"size": found["size"], "counts": counts.decode()}


@pytest.mark.parametrize("quirk", [floats, without_iscrowd, repeated_ids, degenerate, flat, compressed])
def test_how_an_exporter_writes_makes_no_difference(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, quirk: Callable[[dict[str, Any]], None]
) -> None:
    plain, other = coco_instances(tmp_path / "plain"), coco_instances(tmp_path / "other")
    for split in ("train", "valid"):
        edit(other / split / "_annotations.coco.json", quirk)
    new(capsys, "--from", str(plain), "--unseen", UNSEEN, name="plain")
    output = new(capsys, "--from", str(other), "--unseen", UNSEEN, name="other")
    assert shards_of(other, "other.json") == shards_of(plain, "plain.json")
    assert ("annotation ids stand more than once" in output) == (quirk is repeated_ids)


def test_boxes_without_a_mask_are_counted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    root = coco_instances(tmp_path / "data")

    def empty(data: dict[str, Any]) -> None:
        data["annotations"][0]["segmentation"] = []
        data["annotations"][1].pop("segmentation")
        data["annotations"][1]["bbox"] = [1, 2, 3, 4]

    edit(root / "train" / "_annotations.coco.json", empty)
    output = new(capsys, "--from", str(root), "--unseen", UNSEEN)
    assert "warning: 2 of 57 annotations have no mask (a box alone)" in output
    store, benchmark = Store(tmp_path / "store"), load_benchmark("mine.json")
    source = coco_source(root, benchmark.annotations)
    made = store.open(Stage.of(shard_stage, ShardConfig(), source=source, benchmark=benchmark).run(store, QUIET))
    hidden = made.manifest.counts["train"]["without_pixels"]
    assert hidden >= 2
    for split in ("train", "valid"):
        edit(
            root / split / "_annotations.coco.json", lambda d: [one.update(segmentation=[]) for one in d["annotations"]]
        )
    line = new(capsys, "--from", str(root), "--unseen", UNSEEN, name="boxes", refused=True)
    assert "none of 57 annotations has a mask, all are boxes; export polygons" in line


def test_orientation_names_and_folders(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """EXIF turned images, subfolders in file_name, and names in another Unicode form than on the disk."""
    root, made = tmp_path / "data", [*TRAIN, *VAL]
    names = {scene.name: f"caf\u00e9/{scene.name} \u96ea.jpg" for scene in made}
    write(root / "annotations.json", instances_json(made, 1, lambda scene: names[scene.name]))
    for scene in made:
        exif = Image.Exif()
        exif[274] = 6
        turned = scene.image.transpose(Image.Transpose.ROTATE_90)
        save(root / "images" / f"cafe\u0301/{scene.name} \u96ea.jpg", turned, exif=exif)
    new(capsys, "--from", str(root), "--unseen", UNSEEN)
    found = shards_of(root)
    assert sum(map(len, found.values())) == len(made)
    for sample in (sample for some in found.values() for sample in some):
        scene = made[sample.image_id - 1]
        assert (sample.height, sample.width) == (scene.height, scene.width)


@pytest.mark.parametrize("path", ["/data/upload/1/{}", "C:\\images\\{}", "../../media/{}"])
def test_file_names_that_lead_elsewhere_count_by_their_last_part(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, path: str
) -> None:
    root = one_json(tmp_path / "data")
    new(capsys, "--from", str(root), "--unseen", UNSEEN, name="plain")
    expected = shards_of(root, "plain.json")
    edit(root / "annotations/instances_default.json", lambda d: [
        image.update(file_name=path.format(image["file_name"])) for image in d["images"]
    ])  # fmt: skip
    new(capsys, "--from", str(root), "--unseen", UNSEEN)
    assert load_benchmark("mine.json").annotations.bare  # pyright: ignore[reportOptionalMemberAccess]
    assert shards_of(root) == expected


def test_panoptic_pngs_in_bgr(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plain, other = coco_panoptic(tmp_path / "plain"), coco_panoptic(tmp_path / "other")
    for split, made in (("train", TRAIN), ("val", VAL)):
        panoptic_json(other / "annotations" / f"panoptic_{split}2017", made, 1, bgr=True)
    new(capsys, "--from", str(plain), "--unseen", UNSEEN, name="plain")
    output = new(capsys, "--from", str(other), "--unseen", UNSEEN, name="other")
    assert "the panoptic PNGs hold ids as B + 256 G + 65536 R, and are read so" in output
    assert shards_of(other, "other.json") == shards_of(plain, "plain.json")
    with pytest.raises(ValueError, match=r"is not in the order RGB \(set bgr of the benchmark's annotations to true\)"):
        shards_of(other, "plain.json")


# ----------------------------------------------------------------------------------------------- classes and the split


def test_classes_are_named_as_people_name_them() -> None:
    benchmark = load_benchmark("coco-panoptic-zps")
    chosen = choose(benchmark, unseen=("person,Car", "sky"))
    assert [chosen.names[chosen.index[i]] for i in chosen.unseen_ids] == ["person", "car", "sky-other-merged"]
    assert chosen.name == "coco-panoptic-zps (unseen person, car, sky-other-merged)"
    assert choose(benchmark) == benchmark
    few = choose(benchmark, classes=("tree", "person"), unseen=("tree",), others="ignore")
    assert few.names == ["person", "tree-merged"] and few.unseen_ids == (184,) and few.others == "ignore"
    with pytest.raises(ValueError, match=r"--data.unseen: no class is called 'persn' \(did you mean 'person'\?\)"):
        choose(benchmark, unseen=("persn",))
    with pytest.raises(ValueError, match="--data.classes: no class is called 'zzz'"):
        choose(benchmark, classes=("zzz",))


@pytest.mark.parametrize("others", ["refuse", "ignore"])
def test_some_of_the_classes(capsys: pytest.CaptureFixture[str], tmp_path: Path, others: str) -> None:
    """Pixels of the others are unlabelled, of annotations and of label maps; or the images are refused, with the cure."""
    for root in (coco_panoptic(tmp_path / "a"), coco_instances(tmp_path / "b"), plain_maps(tmp_path / "c")):
        words = ("--from", str(root), "--classes", "blue star,green ring,red circle", "--unseen", UNSEEN)
        if others == "refuse":
            line = new(capsys, *words, refused=True)
            assert "images show" in line and "that are no class (4); pass --others ignore" in line
            continue
        new(capsys, *words, "--others", "ignore")
        benchmark = load_benchmark("mine.json")
        for some in shards_of(root).values():
            for sample in some:
                assert set(np.unique(classes_of(sample, benchmark))) <= {0, 1, 2, 3}
                assert sample.segments
        Path("mine.json").unlink()


def test_a_class_that_few_images_show_leaves_the_others_out(tmp_path: Path) -> None:
    """Images without any of the chosen classes are not used, and counted; without `others` the line has the cure."""
    root, benchmark = coco_panoptic(tmp_path / "data"), None
    write(tmp_path / "all.json", {
        "categories": [{"id": i, "name": name, "isthing": int(i != 4)} for i, name in CLASSES.items()],
        "unseen_ids": [3], "protocol": "none",
    })  # fmt: skip
    benchmark = choose(load_benchmark("all.json"), classes=("green ring",), unseen=("green ring",))
    with pytest.raises(ValueError, match=r"which benchmark all .* does not know; .*--data.others ignore, or pass"):
        shards(root, benchmark)
    store = Store(tmp_path / "store")
    benchmark = choose(benchmark, others="ignore")
    made = store.open(
        Stage.of(shard_stage, ShardConfig(), source=coco_source(root), benchmark=benchmark).run(store, QUIET)
    )
    counts = made.manifest.counts
    assert (counts["train"]["images"], counts["train"]["blank"], counts["val"]["images"]) == (7, 7, 3)


def test_plan_and_run_take_the_choices_as_flags(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    root = coco_panoptic(tmp_path / "data")
    new(capsys, "--from", str(root), "--unseen", UNSEEN)
    flags = ("--preset", "coco-sample", "--coco", str(root), "--data.benchmark", "mine.json", "--store", "store")
    assert main(("plan", *flags, "--data.unseen", "blue star")) == 0
    assert "14 training images, of which the protocol leaves 0" in capsys.readouterr().out
    some = ("--data.classes", "red circle,green ring", "--data.unseen", "green ring")
    assert main(("plan", *flags, *some)) == 0
    assert "0 training images" in capsys.readouterr().out
    cure = "which benchmark mine (classes red circle, green ring; unseen green ring) does not know; add it to the benchmark"
    assert any(
        "14 of 14 train images cannot be used, the first 1 has category 2" in m and cure in m for m in caplog.messages
    )
    assert main(("run", *flags, *some, "--until", "shard")) == 2
    assert "or make it unlabelled with --data.others ignore, or pass --skip-bad" in capsys.readouterr().err
    assert main(("plan", *flags, *some, "--data.others", "ignore")) == 0
    assert "14 training images, of which the protocol leaves 7 with 7 instances" in capsys.readouterr().out
    assert main(("plan", *flags, "--data.unseen", "gren ring")) == 2
    assert "no class is called 'gren ring' (did you mean 'green ring'?)" in capsys.readouterr().err


def test_the_split_by_a_seed_moves_no_other_image(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    root = plain_folder(tmp_path / "data")
    new(capsys, "--from", str(root), "--unseen", UNSEEN, "--val-share", "0.4")
    holdout = load_benchmark("mine.json").files.holdout  # pyright: ignore[reportOptionalMemberAccess]
    assert holdout
    names = [f"image {i}" for i in range(2000)]
    val = {name for name in names if holdout.holds(name, "val")}
    assert 0.36 < len(val) / 2000 < 0.44
    assert all(holdout.holds(name, "train") != (name in val) for name in names)
    assert {name for name in names if replace(holdout, seed=1).holds(name, "val")} != val
    before = shards_of(root)
    save(root / "photos" / "another.jpg", TRAIN[0].image)
    shutil.copy(root / "labels" / f"{TRAIN[0].name}.png", root / "labels" / "another.png")
    after = shards_of(root)
    assert sum(map(len, after.values())) == sum(map(len, before.values())) + 1
    for split in before:
        images = {sample.image for sample in after[split]}
        assert {sample.image for sample in before[split]} <= images


def test_unseen_from_another_benchmark(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    root = coco_panoptic(tmp_path / "data")
    for split in ("train", "val"):
        edit(root / f"annotations/panoptic_{split}2017.json", lambda d: d["categories"][2].update(name="giraffe"))
    output = new(capsys, "--from", str(root), "--unseen-from", "coco-panoptic-zps")
    assert "1 of the 14 unseen classes of coco-panoptic-zps are here, not cow" in output
    assert load_benchmark("mine.json").unseen_ids == (3,)


# ------------------------------------------------------------------------------------- what is warned of, and refused


def drop_images(root: Path) -> None:
    for scene in TRAIN[:5]:
        (root / "train" / f"{scene.name}.jpg").unlink()


def crop(root: Path) -> None:
    path = root / "train" / f"{TRAIN[0].name}.jpg"
    Image.open(path).crop((0, 0, 30, 30)).save(path)


def copy_train_to_val(root: Path) -> None:
    shutil.copy(root / "train" / f"{TRAIN[0].name}.jpg", root / "valid" / f"{VAL[0].name}.jpg")
    data = json.loads((root / "train" / "_annotations.coco.json").read_text())["images"][0]

    def resize(content: dict[str, Any]) -> None:
        content["images"][0].update(height=data["height"], width=data["width"])
        content["annotations"] = [
            one for one in content["annotations"] if one["image_id"] != 0 or isinstance(one["segmentation"], list)
        ]

    edit(root / "valid" / "_annotations.coco.json", resize)


def category(number: int, **change: Any) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        for split in ("train", "valid"):
            edit(root / split / "_annotations.coco.json", lambda d: d["categories"][number].update(change))

    return apply


def add_category(**fields: Any) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        for split in ("train", "valid"):
            edit(root / split / "_annotations.coco.json", lambda d: d["categories"].append(fields))

    return apply


def never_in_val(root: Path) -> None:
    edit(
        root / "valid" / "_annotations.coco.json",
        lambda d: d.update(annotations=[one for one in d["annotations"] if one["category_id"] != 3]),
    )


WARNED: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing files": (drop_images, f"5 of 14 train images lack their file ({TRAIN[0].name}.jpg, {TRAIN[1].name}.jpg, "
        f"{TRAIN[2].name}.jpg and 2 more"),
    "another size": (crop, f"1 of 14 train images have another size than their annotation ({TRAIN[0].name}.jpg;"),
    "the same content": (copy_train_to_val, f"1 val image have the bytes of a train image ({VAL[0].name}.jpg)"),
    "no word": (category(0, name="class_1"), "class 'class_1' has a name without a word for what it shows"),
    "77 tokens": (category(0, name="red circle " + "very " * 90 + "red"), "the text encoder takes"),
    "never shown": (add_category(id=9, name="zebra"), "1 class is shown by no image; leave them out with --classes: zebra"),
    "unseen never scored": (never_in_val, "1 class is unseen, but shown by no val image, and cannot be scored"),
    "id 0": (add_category(id=0, name="shapes-3xy"), "category 0, 'shapes-3xy', looks like an exporter's name of the whole set"),
    "no annotation": (lambda root: edit(root / "train" / "_annotations.coco.json", lambda d: d.update(
        annotations=[one for one in d["annotations"] if one["image_id"]])), "1 train image have no annotation"),
}  # fmt: skip


@pytest.mark.parametrize("case", WARNED)
def test_what_is_warned_of(capsys: pytest.CaptureFixture[str], tmp_path: Path, case: str) -> None:
    harm, expected = WARNED[case]
    root = coco_instances(tmp_path / "data")
    assert "warning" not in new(capsys, "--from", str(root), "--unseen", UNSEEN, name="sound")
    harm(root)
    output = new(capsys, "--from", str(root), "--unseen", UNSEEN)
    warned = [line for line in output.splitlines() if line.startswith("warning: ")]
    assert any(expected in line for line in warned), output
    assert ("--skip-bad" in command(output)) == (case in ("missing files", "another size"))


def one_image_twice(root: Path) -> None:
    edit(root / "train" / "_annotations.coco.json", lambda d: d["images"].append(copy.deepcopy(d["images"][0])))


def another_meaning(root: Path) -> None:
    edit(root / "valid" / "_annotations.coco.json", lambda d: d["categories"][0].update(name="blue fog"))


REFUSED: dict[str, tuple[Callable[[Path], None], tuple[str, ...], str]] = {
    "no unseen class": (lambda root: None, (), "no class is unseen; choose with --unseen A,B, such as 'grey dots'"),
    "a name that is none": (lambda root: None, ("--unseen", "gren ring"), "no class is called 'gren ring' (did you mean 'green ring'?)"),
    "the filter empties it": (lambda root: None, ("--unseen", "red circle"),
        "image-filter leaves none of 14; pass --protocol pixel-ignore, which leaves 14, or choose other --unseen"),
    "an image twice": (one_image_twice, ("--unseen", UNSEEN), "image 0 is listed twice in images; correct it"),
    "an id with two names": (another_meaning, ("--unseen", UNSEEN), "category 1 is 'red circle' in train/_annotations.coco.json and 'blue fog'"),
    "one class to the teacher": (category(0, name="Blue  star"), ("--unseen", UNSEEN), "are one to the teacher"),
    "nothing there": (lambda root: shutil.rmtree(root / "train"), ("--kind", "labels"), "was found for --kind labels"),
    "no such folder": (shutil.rmtree, (), "not found; pass the folder of the data"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_one_line_with_its_cure(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, case: str
) -> None:
    harm, words, expected = REFUSED[case]
    root = coco_instances(tmp_path / "data")
    harm(root)
    assert expected in new(capsys, "--from", str(root), *words, refused=True)


def test_train_and_val_of_the_same_images(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """In annotations and in label maps; a label-map benchmark that trained and validated on the same images is one."""
    root = coco_instances(tmp_path / "data")
    shutil.copytree(root / "train", root / "images")
    for split in ("train", "valid"):
        shutil.copy(root / "images" / "_annotations.coco.json", root / f"{split}.json")
        shutil.rmtree(root / split)
    (root / "images" / "_annotations.coco.json").unlink()
    assert "14 images of val are train images, too" in new(
        capsys, "--from", str(root), "--unseen", UNSEEN, refused=True
    )
    plain_folder(tmp_path / "maps")
    facts = {
        "task": "semantic", "protocol": "pixel-ignore", "images": "photos/*.jpg", "labels": "labels/*.png",
        "ignored": [255], "unseen_ids": [30], "splits": {"train": "a", "val": "b"},
        "categories": [{"id": 10 * i, "name": name} for i, name in CLASSES.items()],
    }  # fmt: skip
    write(tmp_path / "same.json", facts)
    with pytest.raises(ValueError, match=r'train and val are the same 20 images, .*"holdout": \{"share": 0.2\}$'):
        shards_of(tmp_path / "maps", "same.json")
    del facts["splits"]
    write(tmp_path / "same.json", facts | {"holdout": {"share": 0.2}})
    assert sum(map(len, shards_of(tmp_path / "maps", "same.json").values())) == 20


def test_label_maps_without_names_are_refused_with_their_values(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    root = plain_folder(tmp_path / "data")
    (root / "names.txt").unlink()
    line = new(capsys, "--from", str(root), "--unseen", "x", refused=True)
    assert "no names for their values 10 (20), 20 (" in line and "pass --names FILE" in line
    write(tmp_path / "names.json", {"10": "red circle", "20": "blue star", "30": UNSEEN, "40": "grey dots"})
    new(capsys, "--from", str(root), "--unseen", UNSEEN, "--names", "names.json")
    assert load_benchmark("mine.json").names == list(CLASSES.values())


def test_names_count_from_1_where_the_maps_do(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    root = plain_maps(tmp_path / "data")
    write(root / "classes.txt", "\n".join(CLASSES.values()))
    output = new(capsys, "--from", str(root), "--unseen", UNSEEN)
    assert "the names count from 1, as the label maps go up to 4; 0 is unlabelled" in output
    benchmark = load_benchmark("mine.json")
    assert benchmark.index == {1: 0, 2: 1, 3: 2, 4: 3} and benchmark.files and benchmark.files.ignored == (0,)


def test_an_existing_file_is_not_overwritten(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    root = coco_instances(tmp_path / "data")
    new(capsys, "--from", str(root), "--unseen", UNSEEN)
    assert main(("new", "mine", "--from", str(root), "--unseen", UNSEEN)) == 2
    assert "mine.json is there already; pass another NAME, or --overwrite" in capsys.readouterr().err
    new(capsys, "--from", str(root), "--unseen", "blue star", "--overwrite", "--protocol", "none")
    assert load_benchmark("mine.json").unseen_ids == (2,)


def test_a_published_recipe_gets_the_steps_of_the_images_at_hand(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from flows.new import LEAST_STEPS, _steps

    root = plain_maps(tmp_path / "data")
    main(("new", "mine", "--from", str(root), "--unseen", UNSEEN, "--preset", "coco-zss-r50"))
    words = command(capsys.readouterr().out)
    assert words[words.index("--v2c.steps") + 1] == str(LEAST_STEPS["v2c"])
    assert _steps("coco-zps-r50", 8000) == ["--v2c.steps", "24000", "--g2s.steps", "6000"]
    assert _steps("coco-zps-r50", 100_000) == _steps("coco-sample", 10) == []
    assert preset("coco-zps-r50").v2c.batch == 16
