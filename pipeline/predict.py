"""`zs-seg predict`: images of one's own through a trained checkpoint, optionally with class names not trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.data.samples import read_image
from pipeline.inference.model import checkpoint_folder
from pipeline.runtime import Runtime
from storage.errors import UserError
from storage.store import Store

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


def run(
    *,
    checkpoint: str,
    images: Sequence[str],
    out: str,
    names: Sequence[str],
    teacher_weights: str,
    store: Store,
    runtime: Runtime,
) -> Path:
    """Segment `images` (files, or folders of them) and write COCO panoptic and RLE predictions and overlays to `out`.

    `checkpoint` is a key in the store or a checkpoint's folder, which may lie anywhere: it holds all that is needed.
    `names` are added to its classes as unseen things, and encoded by its own teacher; `teacher_weights` is the
    teacher's weights file where it was a local one.

    Returns the path of `<out>/panoptic.json`. Raises UserError where an input is missing, broken or does not fit.
    """
    files, weights = find_images(images), checkpoint_folder(store, checkpoint)  # mistakes before the slow imports

    from models.folding import for_inference
    from pipeline.data.transforms import channels_first
    from pipeline.inference.export import ImagePrediction, write_coco_panoptic
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

    def predictions() -> Iterator[ImagePrediction]:
        views = ((file, channels_first(read_image(file))) for file in files)
        with runtime.bar(len(files), "predicting", "image") as bar:
            for file, output in outputs(for_inference(model.segmenter), views, model.meta.resize, batch=1):
                logits = model.logits(output.features, classes.text)
                ids, segments = panoptic_map(output, logits, classes, thresholds)
                picture = overlay(read_image(file), ids, labels_of(segments, named))
                picture.save(folder / "overlay" / f"{file.stem}.png")
                yield ImagePrediction(image_id=image_ids[file], file_name=file.name, ids=ids, segments=segments)
                bar.update()

    image_ids = number(files)
    return write_coco_panoptic(folder, predictions(), categories=vocabulary.categories, rle=True)


def find_images(paths: Sequence[str]) -> list[Path]:
    """Every image file that `paths` name, folders opened but not their subfolders.

    Raises UserError for a path that is not there, for a folder without images, and for two files of the same stem.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
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
