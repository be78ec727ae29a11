"""`zs-seg predict`: images and videos of one's own through a trained checkpoint, optionally with class names not trained
on."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data import video
from pipeline.data.images import SUFFIXES, check_header, decode_image, read_image
from pipeline.inference.config import ALPHA, BETA
from pipeline.inference.model import checkpoint_folder
from pipeline.inference.words import Word
from pipeline.runtime import Runtime
from storage.errors import UserError, counted
from storage.store import Store

if TYPE_CHECKING:
    import numpy as np

    from pipeline.data.video import VideoWriter
    from pipeline.inference.predictor import Chooser, Prediction, Predictor

log = logging.getLogger(__name__)

STDIN = "-"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is chosen from, and how the map is made.

    `words` are chosen from beside the checkpoint's classes, or with `only` alone. Thresholds that are None are the
    checkpoint's own (`Predictor.chooser`). Of a video every `every`-th frame is segmented.
    """

    words: Sequence[Word] = ()
    only: bool = False
    object_threshold: float | None = None
    overlap_threshold: float | None = None
    seen_offset: float = 0.0
    min_score: float = 0.0
    with_teacher: bool = False
    alpha: float = ALPHA
    beta: float = BETA
    every: int = 1

    def __post_init__(self) -> None:
        if self.only and not self.words:
            raise UserError("--only chooses among --names and --stuff alone; give one of them")
        if self.every < 1:
            raise UserError(f"--every must be at least 1, not {self.every}")

    def chooser(self, predictor: Predictor) -> Chooser:
        options = {name: value for name, value in vars(self).items() if name not in ("words", "every")}
        return predictor.chooser(self.words, **options)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A file to predict. `name` is its path below the folder that was given, with /, or its own name; `data` is what was
    read from standard input in place of a file."""

    path: Path
    name: str
    data: bytes | None = None

    @property
    def stem(self) -> str:
        """`name` without its suffix: that of the files made of it."""
        return Path(self.name).with_suffix("").as_posix()

    @property
    def video(self) -> bool:
        return self.data is None and self.path.suffix.lower() in video.SUFFIXES


@dataclass(frozen=True, kw_only=True)
class View:
    """An image (H, W, 3) uint8 RGB of a source; `frame` is its number in a video, from 0."""

    source: Source
    image: np.ndarray
    frame: int | None = None

    @property
    def file_name(self) -> str:
        """A frame's is as if it lay in a folder of the video's name."""
        return self.source.name if self.frame is None else f"{self.source.stem}/{self.frame:06d}.png"

    @property
    def stem(self) -> str:
        return Path(self.file_name).with_suffix("").as_posix()


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """What `run` made: an entry for each image and frame, `folder` of the files where there was one, and checkpoint,
    classes, thresholds and files that were left out."""

    folder: Path | None
    about: dict[str, Any]
    entries: list[dict[str, Any]] = field(default_factory=list)

    @property
    def content(self) -> dict[str, Any]:
        """All of it as JSON."""
        return {**self.about, "images": self.entries}


def run(
    *,
    checkpoint: str,
    images: Sequence[str],
    out: str,
    skip_bad: bool,
    teacher_weights: str,
    store: Store,
    runtime: Runtime,
    settings: Settings = Settings(),
) -> Predicted:
    """Segment `images` (files, folders of them, or "-" for one on standard input) and write to `out` COCO panoptic and
    RLE predictions, overlays and a page of all of them; with `out` "" nothing is written.

    Images are read as `read_image` does, upright as their orientation shows them; of a video the frames are images, and
    its overlay is a video. The headers of all are checked first. With `skip_bad` an image that cannot be read is left
    out; `skipped` in `panoptic.json` lists such files with the reason. Without, it ends the run, as any failure does;
    the JSON then holds what was done before, and `unfinished` lists what was not.

    `checkpoint` is a key or a run in the store, or a checkpoint's folder, which may lie anywhere and holds all that is
    needed. Further names are encoded by its own teacher; `teacher_weights` is the teacher's weights file where it was a
    local one.

    Raises UserError where an input is missing, broken or does not fit.
    """
    # mistakes before the slow imports
    found, weights = find_sources(images), checkpoint_folder(store, checkpoint)
    files = _Files(found, skip_bad=skip_bad, every=settings.every)

    from pipeline.inference.predictor import Predictor, foreign

    folder = Path(out) if out else None
    if folder:
        try:
            (folder / "overlay").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {folder} cannot be written ({error.strerror}); choose another folder") from error
    predictor = Predictor.load(weights, store, runtime, teacher_weights)
    chooser = settings.chooser(predictor)
    result = Predicted(
        folder=folder, about={"checkpoint": str(weights), "stage": predictor.model.meta.stage, **_about(chooser)}
    )
    image_ids, warned = number(found), False
    writer = _Writer(folder, files, chooser) if folder else None
    try:
        with runtime.bar(files.total, "predicting", "image") as bar:
            for view in files.readable():
                if not warned and (reason := foreign(predictor.model, view.image)):
                    log.warning("%s: %s", view.source.name, reason)
                    warned = True
                start = time.perf_counter()
                prediction = predictor.name(predictor.look(view.image), chooser)
                seconds = time.perf_counter() - start
                entry = _entry(view, image_ids.get(view.source, len(result.entries) + 1), prediction, seconds)
                if writer:
                    writer.add(view, prediction, entry)
                result.entries.append(entry)
                if view.frame is None:
                    files.done.add(view.source)
                bar.update()
    finally:
        result.about.update(files.report())
        if writer:
            writer.finish(result)
    files.require()
    if files.bad:
        where = f"; {folder / 'panoptic.json'} lists them" if folder else ""
        log.warning("predict: %d of %d images left out%s", len(files.bad), len(found), where)
    return result


def _about(chooser: Chooser) -> dict[str, Any]:
    known, thresholds = chooser.vocabulary.classes, chooser.thresholds
    columns = zip(known.ids, known.names, known.isthing, known.seen, strict=True)
    return {
        "thresholds": {**vars(thresholds), "min_score": chooser.min_score},
        "teacher": dict(zip(("alpha", "beta"), chooser.exponents, strict=True)) if chooser.exponents else None,
        "classes": [{"id": i, "name": name, "isthing": thing, "seen": seen} for i, name, thing, seen in columns],
    }


def _entry(view: View, image_id: int, found: Prediction, seconds: float) -> dict[str, Any]:
    height, width = found.ids.shape
    of_video = {} if view.frame is None else {"video": view.source.name, "frame": view.frame}
    return {
        "id": image_id,
        "file_name": view.file_name,
        **of_video,
        "width": width,
        "height": height,
        "ms": round(1000 * seconds, 1),
        "segments": [segment.plain() for segment in found.segments],
    }


class _Writer:
    """The files of the predictions in `folder`: COCO's formats, overlays, which are a PNG for each image and a video for
    each video, and a page of all."""

    def __init__(self, folder: Path, files: _Files, chooser: Chooser) -> None:
        from pipeline.inference.export import PanopticWriter

        self.folder, self.files, self.chooser = folder, files, chooser
        self._panoptic = PanopticWriter(folder, rle=True)
        self._source: Source | None = None
        self._video: VideoWriter | None = None
        self._names: dict[str, None] = {}

    def add(self, view: View, found: Prediction, entry: dict[str, Any]) -> None:
        """Writes its files; `entry` gets the path of its `picture` below the folder."""
        from pipeline.inference.export import ImagePrediction
        from pipeline.report.overlay import labels_of, overlay

        if view.frame is None:
            path = self._path(f"{view.stem}.png")
            overlay(view.image, found.ids, labels_of(found.segments, found.named)).save(path)
        else:
            path = self._add_frame(view, found)
        entry["picture"] = path.relative_to(self.folder).as_posix()
        self._panoptic.add(
            ImagePrediction(
                image_id=entry["id"],
                file_name=view.file_name,
                ids=found.ids,
                segments=found.segments,
                png=f"{view.stem}.png",
            )
        )

    def _add_frame(self, view: View, found: Prediction) -> Path:
        """Appends it to its video; a class keeps the colour that it had in a frame before."""
        import numpy as np

        from pipeline.report.overlay import colours_of, labels_of, overlay

        path = self._path(f"{view.source.stem}.mp4")
        if self._source != view.source:
            self._close()
            rate = self.files.videos[view.source].rate / self.files.every
            self._source, self._video = view.source, video.VideoWriter(path, rate)
        self._names |= dict.fromkeys(segment.name for segment in found.segments)
        picture = overlay(
            view.image, found.ids, labels_of(found.segments, found.named), colours=colours_of(self._names)
        )
        assert self._video
        self._video.add(np.asarray(picture))
        return path

    def _path(self, name: str) -> Path:
        path = self.folder / "overlay" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _close(self) -> None:
        if self._video:
            self._video.close()
        self._source, self._video, self._names = None, None, {}

    def finish(self, result: Predicted) -> None:
        from pipeline.report.gallery import gallery
        from storage.atomic import write_text

        self._close()
        report = {name: result.about[name] for name in ("skipped", "unfinished")}
        self._panoptic.finish(self.chooser.vocabulary.categories, **report)
        write_text(self.folder / "index.html", gallery(result.content))


class _Files:
    """The files `found`; `bad` are those that cannot be read, with the reason, at first by their headers.

    Raises UserError as `require`.
    """

    def __init__(self, found: Sequence[Source], *, skip_bad: bool, every: int) -> None:
        self.found, self.skip_bad, self.every = found, skip_bad, every
        self.bad: dict[Source, str] = {}
        self.videos: dict[Source, video.VideoFile] = {}
        self.done: set[Source] = set()
        for source in found:
            try:
                if source.video:
                    self.videos[source] = video.check_video(source.path)
                elif source.data is None:
                    check_header(source.path)
                else:
                    decode_image(source.data, source.name)
            except UserError as error:
                if source.video:
                    video.require_video()
                self.bad[source] = str(error)
        self.require()

    @property
    def total(self) -> int | None:
        """Images and frames that can be read; None where a video does not state its frames."""
        frames = [-(-video.frames // self.every) for video in self.videos.values()]
        return None if 0 in frames else len(self.found) - len(self.bad) - len(frames) + sum(frames)

    def require(self) -> None:
        """Raises UserError if a file is bad and is not to be skipped, or if all are bad."""
        if not self.bad or (self.skip_bad and len(self.bad) < len(self.found)):
            return
        cure = "" if self.skip_bad else ", or pass --skip-bad"
        first = next(iter(self.bad.values()))
        raise UserError(f"{len(self.bad)} of {len(self.found)} images cannot be read: {first}{cure}")

    def readable(self) -> Iterator[View]:
        """All that can be read; ends at a file that cannot and is not to be skipped."""
        for source in self.found:
            if source in self.bad:
                continue
            try:
                if source.video:
                    for frame, image in video.read_frames(source.path, every=self.every):
                        yield View(source=source, image=image, frame=frame)
                    self.done.add(source)
                elif source.data is None:
                    yield View(source=source, image=read_image(source.path))
                else:
                    yield View(source=source, image=decode_image(source.data, source.name))
            except UserError as error:
                self.bad[source] = str(error)
                if not self.skip_bad:
                    return

    def report(self) -> dict[str, Any]:
        """The fields of the JSON: `skipped` files with the reason, and the names of `unfinished` ones."""
        return {
            "skipped": [{"file_name": f.name, "reason": self.bad[f]} for f in self.found if f in self.bad],
            "unfinished": [f.name for f in self.found if f not in self.bad and f not in self.done],
        }


def find_sources(paths: Sequence[str]) -> list[Source]:
    """Every image and video file that `paths` name, folders in depth, without hidden files and folders in them; "-" is
    one image on standard input.

    Warns of a folder's other files, such as HEIC photos.

    Raises UserError for a path that is not there, for a folder without images, and for two files whose results would
    have one name.
    """
    found: list[Source] = []
    for given in paths:
        path = Path(given)
        if given == STDIN:
            found.append(_standard_input())
        elif path.is_dir():
            found += _in_folder(path)
        elif path.is_file():
            found.append(Source(path=path, name=path.name))
        else:
            raise UserError(f"image {path} not found; correct --images")
    stems: dict[str, Source] = {}
    for source in found:
        if source.stem in stems:
            raise UserError(
                f"{stems[source.stem].path} and {source.path} would be written to one file; rename one of them"
            )
        stems[source.stem] = source
    return found


def _standard_input() -> Source:
    if sys.stdin.isatty():
        raise UserError("--images - reads an image from standard input, which is a terminal; send a file into it")
    return Source(path=Path(STDIN), name="stdin", data=sys.stdin.buffer.read())


def _in_folder(folder: Path) -> list[Source]:
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    shown = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    inside = [name for name in shown if name.suffix.lower() in (*SUFFIXES, *video.SUFFIXES)]
    if others := [name.as_posix() for name in shown if name not in set(inside)]:
        log.warning("predict: %s: %s left out, such as %s", folder, counted(len(others), "other file"), others[0])
    if not inside:
        raise UserError(f"folder {folder} holds no image ({', '.join(SUFFIXES)}); pass another --images")
    return [Source(path=folder / name, name=name.as_posix()) for name in inside]


def number(sources: Sequence[Source]) -> dict[Source, int]:
    """COCO's image ids: the file names where all of them are numbers that differ, else 1, 2, ...; {} where there are
    videos, whose frames are counted as they come."""
    if any(source.video for source in sources):
        return {}
    named = [int(Path(source.name).stem) for source in sources if Path(source.name).stem.isdecimal()]
    return dict(zip(sources, named if len(set(named)) == len(sources) else range(1, len(sources) + 1), strict=True))
