"""Nothing that is read can run code, lie outside its folder, or blow up the memory; and nothing listens beyond this
machine.
"""

from __future__ import annotations

import ast
import io
import os
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from coco_factory import make_coco

from models.backbone_weights import read_weights
from pipeline.data.benchmarks import load_benchmark
from pipeline.data.coco import read_split
from pipeline.data.folder import DataFolder
from pipeline.data.images import read_image
from pipeline.data.label_maps import find_split, read_labels
from pipeline.data.samples import panoptic_sample
from pipeline.runtime import Runtime
from pipeline.scoring.pq import evaluate
from pipeline.teacher.cluster import Progress, run_tasks
from pipeline.teacher.config import TextConfig
from pipeline.text import import_rows
from storage.shards import Shards, read_shard, write_index

ROOT = Path(__file__).parents[1]
RUNS_CODE = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "yaml"}
SIDE = 60_000


def calls(tree: ast.AST) -> list[tuple[str, dict[str, str]]]:
    """Every call as ("torch.load", {"weights_only": "True"})."""
    return [
        (ast.unparse(node.func), {k.arg or "**": ast.unparse(k.value) for k in node.keywords})
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    ]


def test_nothing_unpickles_or_evaluates() -> None:
    """What Dask's processes of one run say to each other is pickled, as Dask does it. No file is."""
    files = [file for layer in ("flows", "pipeline", "models", "storage") for file in (ROOT / layer).rglob("*.py")]
    assert len(files) > 60
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        modules |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not {module.partition(".")[0] for module in modules} & RUNS_CODE, file
        for name, keywords in calls(tree):
            assert name not in ("eval", "exec", "torch.jit.load", "torch.package.PackageImporter"), file
            if name in ("torch.load", "load_state_dict") or name.endswith("read_pickle"):
                assert keywords.get("weights_only") == "True", f"{file}: {name}"
            if name in ("np.load", "numpy.load"):
                assert keywords.get("allow_pickle") == "False", f"{file}: {name}"


class Payload:
    """Whoever unpickles it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.mark,)


def test_files_of_others_that_hold_code_are_refused(tmp_path: Path) -> None:
    mark = tmp_path / "was here"
    torch.save({"conv1.weight": Payload(mark)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights\.pth: not readable"):
        read_weights("resnet18", tmp_path / "weights.pth")
    np.save(tmp_path / "rows.npy", np.array([Payload(mark)], object))
    with pytest.raises(ValueError, match=r"rows\.npy cannot be read"):
        import_rows(TextConfig(embeddings=str(tmp_path / "rows.npy"), names="x"), load_benchmark("voc20"), dim=8)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists()  # it would have


# ---------------------------------------------------------------------------------------------------------------------
# Paths


def tar_of(path: Path, **fields: Any) -> None:
    """A tar with one member of these fields, between two good ones."""
    with tarfile.open(path, "w") as tar:
        for name in ("000000000001.jpg", None, "000000000001.png"):
            info = tarfile.TarInfo(name or "000000000001.json")
            info.size = 3
            for field, value in fields.items() if name is None else ():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(b"xyz"))


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "../000000000001.json"}, {"name": "/etc/passwd"}, {"name": "a/000000000001.json"}, {"name": "000000000001.json/../x"},
        *({"type": kind, "linkname": "/etc/passwd", "size": 0} for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE)),
        {"type": tarfile.CHRTYPE, "size": 0}, {"type": tarfile.FIFOTYPE, "size": 0}, {"type": tarfile.DIRTYPE, "size": 0},
    ],
)  # fmt: skip
def test_a_tars_members_are_samples_and_nothing_else(tmp_path: Path, fields: dict[str, Any]) -> None:
    tar_of(tmp_path / "a.tar", **fields)
    with pytest.raises(ValueError, match=r"a\.tar is damaged: .*--set-aside") as caught:
        list(read_shard(tmp_path / "a.tar"))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


@pytest.mark.parametrize("name", ["../train-000000.tar", "/tmp/train-000000.tar", "a/train-000000.tar", "", 3, "train-000000.tar\n"])  # fmt: skip
def test_an_index_names_tars_of_its_folder(tmp_path: Path, name: object) -> None:
    write_index(tmp_path, {"train": [{"tar": name, "samples": 3, "segments": 9}], "val": []})
    with pytest.raises(ValueError, match=r"index\.json is missing or damaged"):
        Shards(tmp_path)


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "a/../../b", "a\\b"])
def test_a_list_names_images_below_its_folder(tmp_path: Path, name: str) -> None:
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for file in ("JPEGImages/a.jpg", "SegmentationClass/a.png", "ImageSets/Segmentation/val.txt"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(f"a\n{name}\n")
    files = load_benchmark("voc20").files
    assert files
    with pytest.raises(ValueError, match=r"val\.txt names .*, which is no name of an image below the folder") as caught:
        find_split(files, tmp_path, "val", complete=False)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Image bombs: a small file whose header promises 3.6 billion pixels


def png_bomb(path: Path) -> None:
    data = path.read_bytes()
    header = data[12:16] + struct.pack(">II", SIDE, SIDE) + data[24:29]
    path.write_bytes(data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:])


def jpeg_bomb(path: Path) -> None:
    data = bytearray(path.read_bytes())
    at = next(i for i in range(len(data)) if data[i : i + 2] in (b"\xff\xc0", b"\xff\xc2"))  # the frame's header
    data[at + 5 : at + 9] = struct.pack(">HH", SIDE, SIDE)
    path.write_bytes(data)


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    return make_coco(tmp_path / "coco", train=2, val=1)


@pytest.mark.parametrize("bomb", [png_bomb, jpeg_bomb])
@pytest.mark.parametrize("told_in_json", [False, True])
def test_image_bombs_are_refused_before_they_go_off(
    coco: Path, bomb: Callable[[Path], None], told_in_json: bool
) -> None:
    benchmark = load_benchmark("coco-panoptic-zps")
    entry = read_split(coco, "train2017", benchmark)[0]
    if told_in_json:
        entry = replace(entry, height=SIDE, width=SIDE)
    path = coco / (entry.png if bomb is png_bomb else entry.image)
    bomb(path)
    before = psutil.Process().memory_info().rss
    found = panoptic_sample(DataFolder(coco), entry)
    assert isinstance(found, str)
    with pytest.raises(ValueError, match=f"{path} has more than 89478485 pixels"):
        read_image(path)
    if bomb is png_bomb:
        truth = coco / "annotations" / "panoptic_train2017.json"
        with pytest.raises(ValueError, match=f"{path} has 60000 x 60000 pixels, more than 89478485") as caught:
            evaluate(truth, path.parent, truth, path.parent, unseen=[])
        assert "\n" not in str(caught.value)
        with pytest.raises(ValueError, match=f"{path} has more than 89478485 pixels"):
            read_labels(path, load_benchmark("voc20"))
    assert psutil.Process().memory_info().rss - before < 200e6


def test_an_image_of_another_kind_under_an_images_name(tmp_path: Path) -> None:
    """PIL would start Ghostscript for this one."""
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match=r"a\.jpg is no JPEG"):
        read_image(tmp_path / "a.jpg")


# ---------------------------------------------------------------------------------------------------------------------
# Sockets


def listening(process: psutil.Process) -> set[str]:
    tree = [process, *process.children(recursive=True)]
    found = [c for p in tree for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN and c.laddr]
    return {c.laddr.ip for c in found}


def _heard(pid: int, runtime: Runtime, progress: Progress) -> list[str]:
    return sorted(listening(psutil.Process(pid)))


@pytest.mark.slow
def test_dask_and_its_dashboard_listen_on_this_machine_only() -> None:
    runtime = Runtime(progress=False, threads=1, dask="local:1")
    (heard,), _ = run_tasks(_heard, [os.getpid()], runtime, progress=lambda *_: None)
    assert set(heard) == {"127.0.0.1"}
