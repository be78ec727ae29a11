"""`zs-seg new`: a benchmark file for one's own data: what there is, what is unseen, what to mend, what to run."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flows.presets import COCO_TRAIN, GPU_PRESETS, epochs, preset
from flows.request import Request, configure
from flows.tables import print_table, size
from pipeline.data import survey
from pipeline.data.benchmarks import Benchmark, CocoFiles, Holdout, LabelFiles, Protocol, load_benchmark
from pipeline.data.layouts import Layout, counted_from_one, recognise
from pipeline.data.names import clean, listed, positions
from pipeline.line import line
from pipeline.planning.counts import count
from pipeline.planning.estimates import Estimator
from pipeline.runtime import Runtime, duration
from storage.atomic import write_text
from storage.errors import UserError, counted
from storage.lineage import Lineage

# A training of few images still takes its steps: fewer than these leave a network as it began.
LEAST_STEPS = {"v2c": 2000, "g2s": 500}
# Names that tell the text encoder nothing: "class_3", "12", "x".
_NO_WORD = re.compile(r"(class|label|category|cat|object|obj|id|type)?[\s_-]*\d+|class|label|object|.", re.IGNORECASE)


def new(options: argparse.Namespace) -> int:
    file = Path(options.name if options.name.endswith(".json") else f"{options.name}.json")
    if file.exists() and not options.overwrite:
        raise UserError(f"{file} is there already; pass another NAME, or --overwrite")
    if not file.parent.is_dir():
        raise UserError(f"folder {file.parent} not found; make it first")
    if options.unseen and options.unseen_from:
        raise UserError("--unseen and --unseen-from both choose the unseen classes; pass one of them")
    names = Path(options.names) if options.names else None
    holdout = Holdout(share=options.val_share, seed=options.seed)
    layout = recognise(Path(options.source), kind=options.kind, names=names, holdout=holdout)
    runtime = Runtime(threads=options.threads)
    if layout.kind == "labels":
        layout = _with_values(layout, runtime)
    benchmark, notes = _benchmark(layout, file.stem, options)
    found = _look(layout, benchmark, runtime)
    print(f"{layout.title}, in {layout.root}")
    for note in (*layout.notes, *notes):
        print(f"  {note}")
    print()
    _print_classes(benchmark, found)
    survey.require(found, benchmark, layout.root)
    if not benchmark.unseen_ids and options.unseen != "none":
        raise UserError(
            f"{file} is not written: no class is unseen; choose with --unseen A,B, {_suggestion(found, benchmark)}"
        )
    _print_protocols(benchmark, found)
    chosen = options.preset or _preset(benchmark)
    lines = survey.warnings(found, benchmark, layout.root) + _about_names(benchmark, chosen)
    if layout.counting and 0 in benchmark.index:
        name = benchmark.names[benchmark.index[0]]
        lines.append(
            f"value 0 is class {name!r}; where it marks unlabelled pixels, call it background in the names file"
        )
    for text in lines:
        print(f"warning: {text}")
    write_text(file, _json(benchmark, layout))
    print(f"written: {file}")
    if benchmark.unseen_ids:
        skip = ["--skip-bad"] if any(not look.fits for looks in found.looks.values() for look in looks) else []
        _print_command(file, layout, benchmark, found, chosen, skip, options.store)
    else:
        words = ["zs-seg", "evaluate", "--checkpoint", "KEY", "--benchmark", str(file), "--data", str(layout.root)]
        print(f"run: {shlex.join(words)}")
    return 0


def _with_values(layout: Layout, runtime: Runtime) -> Layout:
    """The layout with classes of its names and of the values of its label maps.

    Raises UserError, with the values, where there are no names.
    """
    assert isinstance(layout.files, LabelFiles)
    blank = Benchmark(
        name="values", categories=layout.categories or load_benchmark("voc20").categories[:1], unseen_ids=(),
        protocol="none", files=replace(layout.files, ignored=()),
    )  # fmt: skip
    values = _look(layout, blank, runtime).values()
    if not layout.categories:
        some = ", ".join(f"{value} ({n:,})" for value, n in sorted(values.items())[:20])
        raise UserError(
            f"{layout.root}: the label maps have no names for their values {some} (value, images); write one a line, "
            "such as: 7 car, in names.txt beside them, or pass --names FILE; what is no class is called background"
        )
    layout = counted_from_one(layout, values)
    assert isinstance(layout.files, LabelFiles)
    ids = {category.id for category in layout.categories}
    free = [value for value in (0, 255) if value in values and value not in ids and value not in layout.files.ignored]
    if not free:
        return layout
    files = replace(layout.files, ignored=tuple(sorted((*layout.files.ignored, *free))))
    note = f"value {' and '.join(map(str, free))} has no name, and is unlabelled"
    return replace(layout, files=files, notes=(*layout.notes, note))


def _look(layout: Layout, benchmark: Benchmark, runtime: Runtime) -> survey.Survey:
    return survey.survey(layout.root, benchmark, layout.splits, runtime)


def _benchmark(layout: Layout, name: str, options: argparse.Namespace) -> tuple[Benchmark, list[str]]:
    """The benchmark that the flags choose of the layout, and lines on how."""
    notes = []
    files = layout.files
    categories = layout.categories
    if options.classes:
        kept = positions(listed([options.classes]), [c.name for c in categories], "--classes")
        categories = tuple(categories[i] for i in kept)
    names = [category.name for category in categories]
    unseen: Sequence[int] = ()
    if options.unseen_from:
        unseen, note = _unseen_of(options.unseen_from, names)
        notes.append(note)
    elif options.unseen != "none":
        unseen = positions(listed([options.unseen]), names, "--unseen")
    protocol: Protocol = options.protocol or ("pixel-ignore" if layout.kind == "labels" else "image-filter")
    benchmark = Benchmark(
        name=name,
        categories=categories,
        unseen_ids=tuple(categories[i].id for i in unseen),
        protocol=protocol if unseen else "none",
        files=files if isinstance(files, LabelFiles) else None,
        annotations=files if isinstance(files, CocoFiles) else None,
        others=options.others,
    )
    if isinstance(files, CocoFiles) and files.kind == "panoptic" and survey.bgr(layout.root, benchmark):
        benchmark = replace(benchmark, annotations=replace(files, bgr=True))
        notes.append("the panoptic PNGs hold ids as B + 256 G + 65536 R, and are read so")
    if files.holdout:
        notes.append(f"val is {files.holdout.share:.0%} of the images, drawn by name with seed {files.holdout.seed}")
    if "test" in layout.splits:
        notes.append("the test split is for `zs-seg evaluate --split test`")
    return benchmark, notes


def _unseen_of(other: str, names: list[str]) -> tuple[list[int], str]:
    """The positions of the classes that benchmark `other` has unseen, by name; and a line on those that are not here."""
    theirs = load_benchmark(other)
    wanted = [name for name, seen in zip(theirs.names, theirs.seen, strict=True) if not seen]
    here: list[int] = []
    missing: list[str] = []
    for name in wanted:
        try:
            here += positions([name, clean(name)][name not in names :][:1], names, "--unseen-from")
        except UserError:
            missing.append(name)
    if not here:
        raise UserError(
            f"--unseen-from {other}: none of its unseen classes is here ({', '.join(wanted)}); use --unseen"
        )
    note = f"{len(here)} of the {len(wanted)} unseen classes of {other} are here"
    return sorted(set(here)), note + (f", not {', '.join(missing)}" if missing else "")


def _suggestion(found: survey.Survey, benchmark: Benchmark) -> str:
    """Classes that cost the image filter least and are shown in val."""
    train, val = (Counter(v for look in found.looks[s] for v in look.shows) for s in ("train", "val"))
    shown = sorted((train[c.id], c.name) for c in benchmark.categories if val[c.id])
    few = ",".join(name for _, name in shown[: max(len(shown) // 5, 1)][:3])
    return f"such as {shlex.quote(few)}, which few train images show; or pass --unseen none to evaluate on it alone"


def _print_classes(benchmark: Benchmark, found: survey.Survey) -> None:
    unit = "pixels" if benchmark.files else "segments"
    rows, hidden = [], 0
    totals = {split: sum(sum(look.shows.values()) for look in looks) for split, looks in found.looks.items()}
    for category, seen in zip(benchmark.categories, benchmark.seen, strict=True):
        if seen and not any(category.id in look.shows for looks in found.looks.values() for look in looks):
            hidden += 1
            continue
        row = [str(category.id), category.name, "" if seen else "unseen"]
        for split, looks in found.looks.items():
            number = sum(look.shows.get(category.id, 0) for look in looks)
            share = f"{100 * number / totals[split]:.2f} %" if totals[split] else "0 %"
            row += [
                f"{sum(category.id in look.shows for look in looks):,}",
                share if benchmark.files else f"{number:,}",
            ]
        rows.append(tuple(row))
    header = ("id", "class", "", *(text for split in found.looks for text in (f"{split} images", unit)))
    print_table(header, rows)
    parts = [f"{len(looks):,} {split}" for split, looks in found.looks.items()]
    number = len(rows) + hidden
    print(
        f"\n{number} class{'es' * (number != 1)}{f' ({hidden} without an image)' * (hidden > 0)}, {len(benchmark.unseen_ids)} unseen; images: {', '.join(parts)}"
    )
    if strange := survey.others(found, benchmark):
        print(f"{len(strange)} other {'values' if benchmark.files else 'categories'}: {benchmark.others}")


def _print_protocols(benchmark: Benchmark, found: survey.Survey) -> None:
    counts = survey.left(found.looks["train"], benchmark)
    parts = [f"{name} leaves {n:,}{' (chosen)' * (name == benchmark.protocol)}" for name, n in counts.items()]
    print(f"of {counted(len(found.looks['train']), 'train image')} {', '.join(parts)}")


def _about_names(benchmark: Benchmark, chosen: str) -> list[str]:
    """Warnings of class names, as the preset's teacher reads them. Raises UserError for two that are one to it."""
    from pipeline.teacher.prompts import Prompts, brief

    config = preset(chosen)
    lines = [
        f"class {brief(name)} has a name without a word for what it shows, which is all that an unseen class is found by; "
        "write one in the benchmark file"
        for name in benchmark.names
        if _NO_WORD.fullmatch(name.partition(",")[0].strip())
    ]
    tokenizer = config.teacher.load_tokenizer()
    prompts = Prompts(tokenizer=tokenizer, templates=config.text.templates, clean_names=config.text.clean_names)
    prompts.classes(benchmark.names)
    lines += [
        f"the text encoder takes {prompts.length} tokens, and the end of {brief(name)} is cut off; shorten it"
        for name in prompts.cut(benchmark.names)
    ]
    return lines


def _preset(benchmark: Benchmark) -> str:
    """A published recipe where there is a GPU, else the smoke test."""
    import torch

    if not torch.cuda.is_available():
        return "coco-sample"
    return "coco-zss-r50" if benchmark.files else "coco-zps-r50"


def _json(benchmark: Benchmark, layout: Layout) -> str:
    """The benchmark as a file that `load_benchmark` reads."""
    unseen = set(benchmark.unseen_ids)
    content: dict[str, Any] = {
        "benchmark": f"{benchmark.name}: {layout.title}, by zs-seg new",
        "task": benchmark.task,
        "protocol": benchmark.protocol,
        "others": benchmark.others,
    }
    files, at = benchmark.files, benchmark.annotations
    if files:
        content |= {
            "splits": dict(files.splits), "roots": files.roots, "images": files.images, "labels": files.labels,
            "ignored": files.ignored,
        }  # fmt: skip
        content |= {"lists": files.lists} if files.lists else {}
    elif at:
        splits = {
            split: {"json": one.json, "images": one.images, **({"pngs": one.pngs} if one.pngs else {})}
            for split, one in at.splits.items()
        }
        ways = {name: True for name in ("bare", "bgr") if getattr(at, name)}
        content["annotations"] = {"kind": at.kind, "splits": splits, **ways}
    if holdout := (files.holdout if files else at.holdout if at else None):
        content["holdout"] = {"share": holdout.share, "seed": holdout.seed}
    content["categories"] = [
        {"id": c.id, "name": c.name, **({} if files else {"isthing": int(c.isthing)})} for c in benchmark.categories
    ]
    content["unseen_ids"] = list(benchmark.unseen_ids)
    content["unseen_names"] = [c.name for c in benchmark.categories if c.id in unseen]
    # one line a class
    lists = ("categories",)
    lines = [
        f" {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" if name not in lists else
        f" {json.dumps(name)}: [\n  " + ",\n  ".join(json.dumps(one, ensure_ascii=False) for one in value) + "\n ]"
        for name, value in content.items()
    ]  # fmt: skip
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _print_command(
    file: Path, layout: Layout, benchmark: Benchmark, found: survey.Survey, chosen: str, skip: list[str], store: str
) -> None:
    """What the run would take, and its command."""
    images = survey.left(found.looks["train"], benchmark)[benchmark.protocol]
    flags = ["--data.benchmark", str(file), *_steps(chosen, images)]
    request = Request(preset=chosen, coco=str(layout.root), store=store, name=file.stem, overrides=tuple(flags))
    config, opened = configure(request), request.open_store()
    stages = line(config)
    estimator = Estimator(config, stages, Lineage(opened), count(config, stages, opened))
    guesses = [estimator.estimate(stage) for stage in stages]
    known = [guess.seconds for guess in guesses if guess.seconds is not None]
    unknown = [stage.name for stage, guess in zip(stages, guesses, strict=True) if guess.seconds is None]
    bytes_ = sum(guess.bytes or 0 for guess in guesses)
    without = f", without {', '.join(unknown)}" if unknown else ""
    print(
        f"estimated with preset {chosen}: {size(bytes_)}, {duration(sum(known))}{without}; `zs-seg plan` has each stage"
    )
    if chosen == "coco-sample":
        print("coco-sample is a trial of all stages with a small stand-in for CLIP: its scores mean nothing")
    print(f"run: {request.command('run')}{' --skip-bad' if skip else ''}")


def _steps(chosen: str, images: int) -> list[str]:
    """Flags for a published recipe's epochs over the images at hand: 48 or 12 of stage 1, 12 of stage 2."""
    if chosen not in GPU_PRESETS or images >= COCO_TRAIN // 4:
        return []
    config = preset(chosen)
    stage_1 = 12 if "maskformer" in chosen else 48
    steps = {"v2c": epochs(stage_1, images=images, batch=config.v2c.batch), "g2s": epochs(12, images=images, batch=16)}
    return [word for stage, n in steps.items() for word in (f"--{stage}.steps", str(max(n, LEAST_STEPS[stage])))]
