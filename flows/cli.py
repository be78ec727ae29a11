"""The command line `zs-seg`. It answers at once: torch, prefect and tyro are imported by the commands that need them.

Exit status 0; 2 with one line that says what is wrong and what mends it; 130 when interrupted.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, NoReturn

from flows import stages
from flows.presets import PRESETS, preset
from flows.stages import Request, duration
from pipeline.line import STAGES, line
from pipeline.runtime import Runtime
from storage.keys import Recipe, Ref
from storage.store import Manifest, Store

TREE_COMMANDS = ("plan", "run", "stage")  # those that take flags of the config tree


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    _set_up_logging()
    try:
        options, overrides = parser().parse_known_args(argv)
        if overrides and options.command not in TREE_COMMANDS:
            raise ValueError(f"{overrides[0]!r} is unknown; `zs-seg {options.command} --help` lists the flags")
        if getattr(options, "skip_bad", False):
            overrides.append("--shard.skip-bad")
        options.overrides = tuple(overrides)
        status = options.run(options)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("zs-seg: stopped; the same command goes on where this one was", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        told = _mistake(error)
        if not told or "--traceback" in argv:
            raise
        print(f"zs-seg: {' '.join(told.split())}", file=sys.stderr)
        return 2


def _mistake(error: Exception) -> str:
    """What to tell the user about an error that is theirs to mend; "" for one that is ours."""
    torch = sys.modules.get("torch")  # where it was not imported, its memory did not run out
    if torch and isinstance(error, torch.OutOfMemoryError):
        return "the device has too little memory; lower --v2c.batch or --v2c.augment.size, or pass --device cpu"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; mend that and run again"
    return str(error) if isinstance(error, ValueError | OSError) else ""


def _set_up_logging() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for name in ("flows", "models", "pipeline", "storage"):
        logging.getLogger(name).setLevel(logging.INFO)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"zs-seg: {message}; `{self.prog} --help` lists what there is\n")


class _TreeHelp(argparse.Action):
    """--help of the commands that take overrides: theirs, then every flag of the config tree as the preset has it."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help="show this, and every flag")

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        parser.print_help()
        print(flush=True)
        name = getattr(namespace, "preset", None) or next(iter(PRESETS))
        stages.print_override_help(preset(name), prog=f"{parser.prog} --preset {name}")
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """The commands and their own flags; flags of the config tree are left over for `stages.override`."""
    main_parser = _Parser(
        prog="zs-seg",
        allow_abbrev=False,
        description="Zero-shot panoptic segmentation as a staged, cached pipeline.",
        epilog=f"Presets: {', '.join(PRESETS)}. Stages: {', '.join(STAGES)}.",
    )
    commands = main_parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        tree = name in TREE_COMMANDS
        command = commands.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False, add_help=not tree,
            usage=f"zs-seg {name}{' STAGE' * (name == 'stage')} --preset PRESET [options] [--config.field VALUE ...]" if tree else None,
        )  # fmt: skip
        if tree:
            command.add_argument("--preset", required=True, metavar="PRESET", help=f"one of {', '.join(PRESETS)}")
            command.add_argument("--coco", default="", metavar="DIR", help="folder in COCO's layout (or COCO_ROOT)")
            command.add_argument("--skip-bad", action="store_true", help="go on without images that cannot be used")
            command.add_argument("-h", "--help", action=_TreeHelp)
        command.add_argument("--store", default="", metavar="DIR", help="artefacts (or ZS_SEG_STORE; ./artifacts)")
        command.add_argument("--traceback", action="store_true", help="for developers: show where an error came from")
        command.set_defaults(run=run)
        return command

    def add_runtime(command: argparse.ArgumentParser) -> None:
        command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
        command.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads; 0 = all cores")

    add("plan", _plan, "show what is there and what a run would build")
    run = add("run", _run, "build what is missing, stage by stage, and report")
    run.add_argument("--from", dest="first", default="", metavar="STAGE", help="begin there, from cached inputs")
    run.add_argument("--until", dest="last", default="", metavar="STAGE", help="end there")
    run.add_argument(
        "--force",
        action="append",
        default=[],
        metavar="STAGE",
        help="build it and all that reads it again; may be repeated",
    )
    stage = add("stage", _stage, "build one stage from its cached inputs")
    stage.add_argument("stage", metavar="STAGE", help=f"one of {', '.join(STAGES)}")
    add("list", _list, "list the complete artefacts")
    show = add("show", _show, "show an artefact's manifest")
    show.add_argument("key", metavar="KEY", help="its key, or the beginning of it")
    verify = add("verify", _verify, "compare artefacts, byte by byte, with their manifests")
    verify.add_argument("key", metavar="KEY", nargs="?", default="", help="one key; default: all")
    predict = add("predict", _predict, "segment images with a trained checkpoint")
    predict.add_argument("--checkpoint", required=True, metavar="KEY", help="a checkpoint's key, or its folder")
    predict.add_argument("--images", required=True, nargs="+", metavar="PATH", help="image files, or folders of them")
    predict.add_argument("--out", required=True, metavar="DIR", help="gets panoptic.json, panoptic/ and overlay/")
    predict.add_argument("--names", default="", metavar="A,B,C", help="further class names to look for")
    predict.add_argument(
        "--teacher.pretrained", dest="teacher", default="", metavar="FILE", help="its weights, for --names"
    )
    for command in (run, stage, predict):
        add_runtime(command)
    return main_parser


def _request(options: argparse.Namespace) -> Request:
    return Request(preset=options.preset, coco=options.coco, store=options.store, overrides=options.overrides)


def _store(options: argparse.Namespace) -> Store:
    return Request(preset="", store=options.store).open_store()


def _runtime(options: argparse.Namespace) -> Runtime:
    return Runtime(device=options.device, threads=options.threads)


def _plan(options: argparse.Namespace) -> int:
    request = _request(options)
    steps, store = line(stages.configure(request)), request.open_store()
    rows = []
    for step in steps:
        ref, state = step.recipe.ref, store.state(step.recipe.ref)
        known = store.open(ref).manifest if state == "fresh" else _newest_alike(store, step.recipe)
        about = "" if state == "fresh" else "~"
        size, seconds = (about + _size(known.bytes), about + duration(known.provenance["seconds"])) if known else "--"
        rows.append((step.stage, str(ref), state, size, seconds))
    _print_table(("stage", "artefact", "state", "bytes", "time"), rows)
    missing = sum(row[2] != "fresh" for row in rows)
    print(
        f"\n{missing} of {len(rows)} stages to build in {store.root}"
        + "; ~ is what the last one like it took" * any("~" in row[3] for row in rows)
    )
    if any(row[3] == "-" for row in rows):
        print("- has no estimate: there is one as soon as a stage like it was built in this store")
    return 0


def _newest_alike(store: Store, recipe: Recipe) -> Manifest | None:
    """The manifest of the newest artefact that the same stage made."""
    alike = [ref for ref in store.refs() if ref.kind == recipe.kind]
    for ref in sorted(alike, key=lambda ref: store.path(ref).stat().st_mtime, reverse=True):
        try:
            manifest = store.open(ref).manifest
        except ValueError:  # damaged: no estimate from this one
            continue
        if manifest.stage == recipe.stage:
            return manifest
    return None


def _run(options: argparse.Namespace) -> int:
    return _walk(_request(options), _runtime(options), options.first, options.last, options.force)


def _stage(options: argparse.Namespace) -> int:
    return _walk(_request(options), _runtime(options), options.stage, options.stage, ())


def _walk(request: Request, runtime: Runtime, first: str, last: str, force: Sequence[str]) -> int:
    steps, store = line(stages.configure(request)), request.open_store()
    selected = stages.select(steps, first=first, last=last)
    again = stages.forced(selected, force)
    stages.require_inputs(request, store, steps, selected, again)
    stages.remove(store, again)
    for number, step in enumerate(steps, 1):
        if step in selected:
            print(f"[{number}/{len(steps)}] {stages.build(step, store, runtime)}", flush=True)
    if selected[-1] is steps[-1]:
        _print_report(request.preset, stages.publish(request.preset, steps, store))
    return 0


def _print_report(name: str, folder: Any) -> None:
    import json

    from rich.console import Console

    from pipeline.report import console_table

    Console().print(console_table(json.loads((folder / "report.json").read_text(encoding="utf-8"))))
    print(f"report of {name}: {folder / 'report.html'}")


def _list(options: argparse.Namespace) -> int:
    store = _store(options)
    rows = []
    for ref in store.refs():
        try:
            manifest = store.open(ref).manifest
        except ValueError:
            rows.append(("?", str(ref), "damaged", "see `zs-seg verify`"))
        else:
            rows.append((manifest.stage, str(ref), _size(manifest.bytes), _age(manifest)))
    if rows:
        _print_table(("stage", "artefact", "size", "age"), sorted(rows, key=lambda row: _place(row[0])))
    print(f"{len(rows)} artefacts in {store.root}")
    return 0


def _place(stage: str) -> int:
    return STAGES.index(stage) if stage in STAGES else len(STAGES)


def _show(options: argparse.Namespace) -> int:
    store = _store(options)
    artefact = store.open(store.find(options.key))
    manifest = artefact.manifest
    print(f"{manifest.ref}, made by stage {manifest.stage} (version {manifest.version})\n{artefact.path}")
    for title, content in (
        ("inputs", manifest.inputs), ("config", manifest.config), ("counts", manifest.counts), ("provenance", manifest.provenance),
    ):  # fmt: skip
        print(f"\n{title}")
        _print_tree(content, "  ")
    print(f"\nfiles: {len(manifest.files)}, {_size(manifest.bytes)}")
    shown = dict(list(manifest.files.items())[:20])
    for name, entry in shown.items():
        print(f"  {_size(entry['bytes']):>9}  {entry['sha256'][:16]}  {name}")
    if len(shown) < len(manifest.files):
        print(f"  and {len(manifest.files) - len(shown)} more in {artefact.path / 'manifest.json'}")
    return 0


def _print_tree(value: Any, indent: str) -> None:
    """Nested settings, one a line; a list of objects keeps one line each."""
    for name, item in value.items():
        if isinstance(item, dict) and item:
            print(f"{indent}{name}")
            _print_tree(item, indent + "  ")
        elif isinstance(item, list) and item and isinstance(item[0], dict):
            print(f"{indent}{name}: {len(item)}")
            for entry in item:
                print(f"{indent}  {', '.join(f'{key} {entry[key]}' for key in entry)}")
        else:
            print(f"{indent}{name}: {', '.join(map(str, item)) if isinstance(item, list) else item}")


def _verify(options: argparse.Namespace) -> int:
    store = _store(options)
    refs: list[Ref] = [store.find(options.key)] if options.key else store.refs()
    damaged = []
    for ref in refs:
        problems = store.verify(ref)
        print(f"{ref!s:<28} {'; '.join(problems) or 'intact'}", flush=True)
        if problems:
            damaged.append(ref)
    if damaged:
        named = ", ".join(map(str, damaged))
        raise ValueError(
            f"{len(damaged)} of {len(refs)} artefacts are damaged ({named}); rebuild with `zs-seg run --force STAGE`"
        )
    print(f"{len(refs)} artefacts in {store.root} are intact")
    return 0


def _predict(options: argparse.Namespace) -> int:
    from pipeline import predict

    index = predict.run(
        checkpoint=options.checkpoint,
        images=options.images,
        out=options.out,
        names=[name.strip() for name in options.names.split(",") if name.strip()],
        teacher_weights=options.teacher,
        store=_store(options),
        runtime=_runtime(options),
    )
    print(f"predictions: {index}, pictures: {index.parent / 'overlay'}")
    return 0


def _print_table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in (heads, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.5 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _age(manifest: Manifest) -> str:
    then = datetime.fromisoformat(manifest.provenance["created"])
    seconds = max(0.0, (datetime.now(then.tzinfo) - then).total_seconds())
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit}"
    return f"{seconds:.0f} s"
