"""Images of one's own through a trained checkpoint, optionally with further class names that it has never heard of."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.runtime import Runtime
from storage.store import Store

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from pipeline.metrics import PredictedSegment

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")  # of PIL's others some start programs


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
    """Segment `images` (files, or folders of them) and write COCO panoptic and RLE predictions and an overlay each into `out`.

    `checkpoint` is a key in the store or a checkpoint's folder, which may lie anywhere: it holds all that is needed.
    `names` are added to its classes as unseen things, and encoded by its own teacher; `teacher_weights` is the
    teacher's weights file where it was a local one.

    Returns the path of `<out>/panoptic.json`. Raises ValueError where an input is missing, broken or does not fit.
    """
    files, weights = find_images(images), checkpoint_folder(store, checkpoint)  # mistakes before the slow imports

    import torch

    from models.folding import for_inference
    from pipeline.export import ImagePrediction, write_coco_panoptic
    from pipeline.inference import classes_of, outputs, panoptic_map
    from pipeline.model import load_model
    from pipeline.views import ResizeConfig
    from pipeline.vocabulary import extend

    folder = Path(out)
    try:
        (folder / "overlay").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be written ({error.strerror}); choose another folder") from error
    device = runtime.torch_device()
    model = load_model(weights, device)
    vocabulary = extend(model, names, teacher_weights, runtime)
    classes = classes_of(vocabulary.embedding, vocabulary.facts, device)
    name_of = {category.id: category.name for category in vocabulary.categories}
    thresholds = {name: model.facts[name] for name in ("object_threshold", "overlap_threshold")}

    def predictions() -> Iterator[ImagePrediction]:
        views = ((file, torch.from_numpy(read_image(file)).permute(2, 0, 1)) for file in files)
        with runtime.bar(len(files), "predicting", "image") as bar:
            for file, output in outputs(
                for_inference(model.segmenter), views, ResizeConfig(**model.facts["resize"]), batch=1
            ):
                logits = model.logits(output.features, classes.text)
                ids, segments = panoptic_map(output, logits, classes, **thresholds)
                overlay(read_image(file), ids, segments, name_of).save(folder / "overlay" / f"{file.stem}.png")
                yield ImagePrediction(image_id=image_ids[file], file_name=file.name, ids=ids, segments=segments)
                bar.update()

    image_ids = number(files)
    return write_coco_panoptic(folder, predictions(), categories=vocabulary.categories, rle=True)


def checkpoint_folder(store: Store, checkpoint: str) -> Path:
    """The folder of a v2c or cpa checkpoint: `checkpoint` itself, or that of a key in the store.

    Raises ValueError where there is none.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        ref = store.find(checkpoint)
        store.require_intact(ref)
        folder = store.path(ref)
    try:
        stage = json.loads((folder / "meta.json").read_bytes()).get("stage")
    except (OSError, ValueError, AttributeError):
        stage = None
    if stage not in ("v2c", "cpa"):
        raise ValueError(
            f"{folder} is no checkpoint of v2c or cpa; pass another --checkpoint, `zs-seg list` shows them"
        )
    return folder


def find_images(paths: Sequence[str]) -> list[Path]:
    """Every image file that `paths` name, folders opened but not their subfolders.

    Raises ValueError for a path that is not there, for a folder without images, and for two files of the same stem.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
            if not inside:
                raise ValueError(f"folder {path} holds no image ({', '.join(SUFFIXES)}); pass another --images")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise ValueError(f"image {path} not found; correct --images")
    stems: dict[str, Path] = {}
    for file in found:
        if file.stem in stems:
            raise ValueError(f"{stems[file.stem]} and {file} would be written to one file; rename one of them")
        stems[file.stem] = file
    return found


def number(files: Sequence[Path]) -> dict[Path, int]:
    """COCO's image ids: what the file names say where all of them are numbers, else 1, 2, ..."""
    named = [int(file.stem) for file in files if file.stem.isdecimal()]
    return dict(zip(files, named if len(set(named)) == len(files) else range(1, len(files) + 1), strict=True))


def read_image(path: Path) -> np.ndarray:
    """(H, W, 3) uint8. Raises ValueError, naming the file, for one that is no image or is damaged."""
    import numpy as np
    from PIL import Image

    from storage.shards import refuse_bomb

    try:
        with Image.open(path, formats=FORMATS) as image:
            refuse_bomb(image)
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} cannot be read as an image ({reason}); replace it or leave it out") from error


def overlay(
    image: np.ndarray, ids: np.ndarray, segments: Sequence[PredictedSegment], name_of: dict[int, str]
) -> Image.Image:
    """The image with its segments in colour, one colour a class, their borders white and their names on them."""
    import numpy as np
    from PIL import Image, ImageColor, ImageDraw, ImageFont
    from scipy import ndimage

    from pipeline.pictures import PALETTE

    painted = image.astype(np.float32)
    for segment in segments:
        colour = ImageColor.getrgb(PALETTE[segment.category_id % len(PALETTE)])
        mask = ids == segment.id
        painted[mask] = 0.45 * painted[mask] + 0.55 * np.array(colour)
    painted[(ndimage.maximum_filter(ids, 3) != ndimage.minimum_filter(ids, 3)) & (ids > 0)] = 255
    scale = max(1, round(640 / max(image.shape[:2])))  # names need room on small images
    picture = Image.fromarray(painted.astype(np.uint8))
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(max(12, max(picture.size) // 30))
    for segment in segments:
        depth = np.asarray(ndimage.distance_transform_edt(np.pad(ids == segment.id, 1)))[1:-1, 1:-1]
        y, x = np.unravel_index(int(depth.argmax()), depth.shape)
        draw.text(
            ((int(x) + 0.5) * scale, (int(y) + 0.5) * scale),
            f"{name_of[segment.category_id]} {segment.score:.2f}",
            fill="white", stroke_fill="black", stroke_width=2, anchor="mm", font=font,
        )  # fmt: skip
    return picture
