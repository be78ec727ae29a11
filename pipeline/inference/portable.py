"""A checkpoint for use elsewhere: the network as an ONNX file, or all that prediction needs in one folder."""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from models.portable import portable
from pipeline.data.config import STRIDE
from pipeline.data.transforms import PIXEL_MEAN, PIXEL_STD
from pipeline.inference.model import Model, save_model
from pipeline.inference.teacher import TOKENS
from pipeline.teacher.config import TokensConfig
from storage.atomic import replacing, write_text
from storage.errors import UserError

if TYPE_CHECKING:
    from pipeline.inference.vocabulary import Vocabulary

OPSET = 18
MOST = 256  # times 32 pixels: the longest side of an exported network's image; the shortest is 2 times


class Portable(nn.Module):
    """The network from pixels to logits.

    image (1, 3, H, W) float32 RGB in 0..255, H and W multiples of 32 from 64 to 8192, and text rows (K, D)
    -> mask logits (1, Q, H/4, W/4) and class logits (1, Q, K).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.segmenter, self.projector = model.segmenter, model.projector
        self.register_buffer("mean", PIXEL_MEAN.clone())
        self.register_buffer("std", PIXEL_STD.clone())

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        result = self.segmenter((image - self.mean) / self.std, dense=False)
        features = result.features[-1]
        return result.masks[-1], self.projector.logits(self.projector(features), text)


def with_vocabulary(model: Model, vocabulary: Vocabulary) -> Model:
    """The model with these classes as its own."""
    meta = replace(model.meta, classes=vocabulary.classes)
    return replace(model, text=vocabulary.embedding.to(model.text.device), meta=meta)


def write_folder(folder: Path, model: Model, options: TokensConfig) -> None:
    """The model as a checkpoint's folder, which `zs_seg.load` and `--checkpoint` take: weights and text rows, classes,
    thresholds, and `options`, how its teacher encodes masks.

    Raises UserError where the folder is there already and not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--folder {folder} is there already and not empty; pass another, or remove it")
    save_model(folder, model)
    write_text(folder / TOKENS, json.dumps(asdict(options), indent=1) + "\n")


def require_onnx() -> None:
    """Raises UserError where the packages that write ONNX are not installed."""
    if missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]:
        raise UserError(
            f"ONNX files are written with {' and '.join(missing)}, not installed here; the extra `export` brings it: "
            "`make install-dev`, or `pip install --editable '.[export]'` in the folder of zs-seg"
        )


def write_onnx(path: Path, model: Model) -> None:
    """The network as an ONNX file, for images of any size and any number of classes, see `Portable`.

    Beside it, with the suffix .npy, the text rows (n, D) float32 of the model's classes, and with .json `classes`, with
    the numbers of their rows, of which the largest logit counts, `object_threshold`, `overlap_threshold` and `resize`,
    the short and the longest side in pixels to which the network's images were resized.

    Raises UserError where a package is missing.
    """
    require_onnx()
    # it reports every operation that it leaves as it is
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    rows, classes = _rows(model)
    height, width = (STRIDE * torch.export.Dim(name, min=2, max=MOST) for name in ("height", "width"))
    shapes: Any = {"image": {2: height, 3: width}, "text": {0: torch.export.Dim("classes", min=1)}}
    example = torch.zeros(1, 3, 4 * STRIDE, 6 * STRIDE), torch.cat([rows, rows])
    with portable(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(
            Portable(model).eval(),
            example,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=shapes,
            input_names=["image", "text"],
            output_names=["masks", "classes"],
            verbose=False,
        )
    meta = model.meta
    about = {
        "classes": classes,
        "object_threshold": meta.object_threshold,
        "overlap_threshold": meta.overlap_threshold,
        "resize": asdict(meta.resize),
        "templates": meta.templates,
        "teacher": meta.classes.teacher,
    }
    with replacing(path.with_suffix(".npy")) as temporary, temporary.open("wb") as file:
        np.save(file, rows.numpy())
    write_text(path.with_suffix(".json"), json.dumps(about, indent=1) + "\n")
    with replacing(path) as temporary:
        program.save(temporary, external_data=False)


def _rows(model: Model) -> tuple[Tensor, list[dict[str, Any]]]:
    """The text rows (n, D), each once, and the classes with the numbers of theirs."""
    known, rows, classes = model.meta.classes, [], []
    text = model.text.cpu() if model.text.ndim == 3 else model.text.cpu()[:, None]
    for id_, name, isthing, seen, own in zip(known.ids, known.names, known.isthing, known.seen, text, strict=True):
        # a class with fewer synonyms than another repeats its first row
        unlike = [row for i, row in enumerate(own) if i == 0 or not row.equal(own[0])]
        numbers = list(range(len(rows), len(rows) + len(unlike)))
        classes.append({"id": id_, "name": name, "isthing": isthing, "seen": seen, "rows": numbers})
        rows += unlike
    return torch.stack(rows), classes
