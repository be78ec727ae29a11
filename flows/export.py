"""`zs-seg export`: a checkpoint as an ONNX file, or as a folder that needs no store."""

from __future__ import annotations

import argparse
from pathlib import Path

from flows.request import open_runtime, open_store
from pipeline.inference.model import checkpoint_folder
from pipeline.inference.words import read_words
from storage.atomic import write_text
from storage.errors import UserError


def export(options: argparse.Namespace) -> int:
    """Raises UserError for no target, one that cannot be written, and as `predict` for names."""
    if not options.onnx and not options.folder:
        raise UserError("nothing is asked for; pass --onnx FILE, --folder DIR, or both")
    store = open_store(options)
    source = checkpoint_folder(store, options.checkpoint)

    from pipeline.inference.model import load_model
    from pipeline.inference.portable import require_onnx, with_vocabulary, write_folder, write_onnx
    from pipeline.inference.teacher import cached_options
    from pipeline.inference.vocabulary import Lexicon
    from pipeline.report.card import card

    if options.onnx:
        require_onnx()
        if not Path(options.onnx).parent.is_dir():
            raise UserError(f"--onnx {options.onnx}: folder {Path(options.onnx).parent} not found; make it first")
    model = load_model(source)
    words = read_words(options.names.split(",")) + read_words(options.stuff.split(","), isthing=False)
    vocabulary = Lexicon(model, options.teacher, open_runtime(options)).vocabulary(words, only=options.only)
    model = with_vocabulary(model, vocabulary)
    if options.folder:
        folder = Path(options.folder)
        write_folder(folder, model, cached_options(source, store))
        write_text(folder / "README.md", card(source, model.meta, store))
        print(f"folder: {folder}, for `zs_seg.load` and --checkpoint; its README.md has lineage and scores")
    if options.onnx:
        file = Path(options.onnx)
        write_onnx(file, model)
        print(f"network: {file}, text rows: {file.with_suffix('.npy')}, classes: {file.with_suffix('.json')}")
    return 0
