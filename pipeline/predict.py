"""`zs-seg predict`: images of one's own through a trained checkpoint, optionally with class names not trained on."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.images import SUFFIXES, check_header, read_image
from pipeline.inference.model import checkpoint_folder
from pipeline.runtime import Runtime
from storage.errors import UserError, counted
from storage.store import Store

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)


def run(
    *,
    checkpoint: str,
    images: Sequence[str],
    out: str,
    names: Sequence[str],
    skip_bad: bool,
    teacher_weights: str,
    store: Store,
    runtime: Runtime,
) -> Path:
    """Segment `images` (files, or folders of them) and write COCO panoptic and RLE predictions and overlays to `out`.

    Images are read as `read_image` does, upright as their orientation shows them. The headers of all are checked first.
    With `skip_bad` an image that cannot be read is left out; `skipped` in `panoptic.json` lists such files with the
    reason. Without, it ends the run, as any failure does; the JSON then holds what was done before, and `unfinished`
    lists what was not.

    `checkpoint` is a key or a run in the store, or a checkpoint's folder, which may lie anywhere and holds all that is
    needed.
    `names` are added to its classes as unseen things, and encoded by its own teacher; `teacher_weights` is the
    teacher's weights file where it was a local one.

    Returns the path of `<out>/panoptic.json`. Raises UserError where an input is missing, broken or does not fit.
    """
    # mistakes before the slow imports
    found, weights = find_images(images), checkpoint_folder(store, checkpoint)
    files = _Files(found, skip_bad=skip_bad)

    from models.folding import for_inference
    from pipeline.data.transforms import channels_first
    from pipeline.inference.export import ImagePrediction, PanopticWriter
    from pipeline.inference.forward import outputs
    from pipeline.inference.maps import classes_of, panoptic_map
    from pipeline.inference.model import load_model
    from pipeline.inference.vocabulary import extend
    from pipeline.report.overlay import labels_of, overlay

    folder = Path(out)
    try:
        (folder / "overlay").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written ({error.strerror}); choose another folder") from error
    device = runtime.torch_device()
    model = load_model(weights, device)
    vocabulary = extend(model, names, teacher_weights, runtime)
    known = vocabulary.classes
    classes = classes_of(vocabulary.embedding, known, device)
    named = dict(zip(known.ids, zip(known.names, known.seen, strict=True), strict=True))
    thresholds = model.meta.thresholds

    views = (((file, image), channels_first(image)) for file, image in files.readable())
    image_ids, writer = number(found), PanopticWriter(folder, rle=True)
    done = set[Path]()
    try:
        with runtime.bar(len(found) - len(files.bad), "predicting", "image") as bar:
            for (file, image), output in outputs(for_inference(model.segmenter), views, model.meta.resize, batch=1):
                logits = model.logits(output.features, classes.text)
                ids, segments = panoptic_map(output, logits, classes, thresholds)
                picture = overlay(image, ids, labels_of(segments, named))
                picture.save(folder / "overlay" / f"{file.stem}.png")
                writer.add(ImagePrediction(image_id=image_ids[file], file_name=file.name, ids=ids, segments=segments))
                done.add(file)
                bar.update()
    finally:
        index = writer.finish(vocabulary.categories, **files.report(done))
    files.require()
    if files.bad:
        log.warning("predict: %d of %d images left out; %s lists them", len(files.bad), len(found), index)
    return index


class _Files:
    """The image files `found`; `bad` are those that cannot be read, with the reason, at first by their headers.

    Raises UserError as `require`.
    """

    def __init__(self, found: Sequence[Path], *, skip_bad: bool) -> None:
        self.found, self.skip_bad = found, skip_bad
        self.bad: dict[Path, str] = {}
        for file in found:
            try:
                check_header(file)
            except UserError as error:
                self.bad[file] = str(error)
        self.require()

    def require(self) -> None:
        """Raises UserError if a file is bad and is not to be skipped, or if all are bad."""
        if not self.bad or (self.skip_bad and len(self.bad) < len(self.found)):
            return
        cure = "" if self.skip_bad else ", or pass --skip-bad"
        first = next(iter(self.bad.values()))
        raise UserError(f"{len(self.bad)} of {len(self.found)} images cannot be read: {first}{cure}")

    def readable(self) -> Iterator[tuple[Path, np.ndarray]]:
        """(file, image (H, W, 3) uint8 RGB) of all that can be read; ends at one that cannot and is not to be skipped.

        It does not raise there: who reads ahead has images before it still to be segmented.
        """
        for file in self.found:
            if file in self.bad:
                continue
            try:
                yield file, read_image(file)
            except UserError as error:
                self.bad[file] = str(error)
                if not self.skip_bad:
                    return

    def report(self, done: Collection[Path]) -> dict[str, Any]:
        """The fields of the JSON: `skipped` files with the reason, and the names of `unfinished` ones."""
        return {
            "skipped": [{"file_name": f.name, "reason": self.bad[f]} for f in self.found if f in self.bad],
            "unfinished": [f.name for f in self.found if f not in self.bad and f not in done],
        }


def find_images(paths: Sequence[str]) -> list[Path]:
    """Every image file that `paths` name, folders opened but not their subfolders, without hidden files in them.

    Warns of a folder's other files, such as HEIC photos.

    Raises UserError for a path that is not there, for a folder without images, and for two files of the same stem.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            shown = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
            inside = [file for file in shown if file.suffix.lower() in SUFFIXES]
            if others := [file.name for file in shown if file.suffix.lower() not in SUFFIXES]:
                log.warning("predict: %s: %s left out, such as %s", path, counted(len(others), "other file"), others[0])
            if not inside:
                raise UserError(f"folder {path} holds no image ({', '.join(SUFFIXES)}); pass another --images")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"image {path} not found; correct --images")
    stems: dict[str, Path] = {}
    for file in found:
        if file.stem in stems:
            raise UserError(f"{stems[file.stem]} and {file} would be written to one file; rename one of them")
        stems[file.stem] = file
    return found


def number(files: Sequence[Path]) -> dict[Path, int]:
    """COCO's image ids: the file names where all of them are numbers that differ, else 1, 2, ..."""
    named = [int(file.stem) for file in files if file.stem.isdecimal()]
    return dict(zip(files, named if len(set(named)) == len(files) else range(1, len(files) + 1), strict=True))
