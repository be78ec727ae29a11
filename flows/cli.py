"""The command line `zs-seg`. It answers at once: torch, prefect and tyro are imported by the commands that need them.

Exit status 0; 2 with one line that says what is wrong and what mends it; 130 when interrupted.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from flows import ablate, commands, store_commands
from flows.presets import PRESETS, preset
from flows.request import print_override_help
from models.errors import ModelError
from pipeline.line import STAGES
from storage.errors import UserError

TREE_COMMANDS = ("plan", "run", "stage", "ablate")  # those that take flags of the config tree
BENCHES = ("segmenter", "evaluate", "cache", "train")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    _set_up_logging()
    try:
        options, overrides = parser().parse_known_args(argv)
        if overrides and options.command not in TREE_COMMANDS:
            raise UserError(f"{overrides[0]!r} is unknown; `zs-seg {options.command} --help` lists the flags")
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
        message = _mistake(error)
        if not message or "--traceback" in argv:
            raise
        print(f"zs-seg: {' '.join(message.split())}", file=sys.stderr)
        return 2


def _mistake(error: Exception) -> str:
    """What to tell the user about an error that is theirs to mend; "" for one that is ours."""
    torch = sys.modules.get("torch")  # where it was not imported, its memory did not run out
    if torch and isinstance(error, torch.OutOfMemoryError):
        return "the device has too little memory; lower --v2c.batch or --v2c.augment.size, or pass --device cpu"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; mend that and run again"
    return str(error) if isinstance(error, UserError | ModelError) else ""


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
        print_override_help(preset(name), prog=f"{parser.prog} --preset {name}")
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """The commands and their own flags; flags of the config tree are left over for `override`."""
    main_parser = _Parser(
        prog="zs-seg",
        allow_abbrev=False,
        description="Zero-shot panoptic segmentation as a staged, cached pipeline.",
        epilog=f"Presets: {', '.join(PRESETS)}. Stages: {', '.join(STAGES)}.",
    )
    subparsers = main_parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        tree = name in TREE_COMMANDS
        command = subparsers.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False, add_help=not tree,
            usage=f"zs-seg {name}{' STAGE' * (name == 'stage')} --preset PRESET [options] [--config.field VALUE ...]" if tree else None,
        )  # fmt: skip
        if tree:
            command.add_argument("--preset", required=True, metavar="PRESET", help=f"one of {', '.join(PRESETS)}")
            command.add_argument("--coco", default="", metavar="DIR", help="folder in COCO's layout (or COCO_ROOT)")
            command.add_argument(
                "--max-steps",
                type=int,
                default=0,
                metavar="N",
                help="at most N steps of every training stage, for trials",
            )
            command.add_argument("--skip-bad", action="store_true", help="go on without images that cannot be used")
            command.add_argument("-h", "--help", action=_TreeHelp)
        command.add_argument("--store", default="", metavar="DIR", help="artefacts (or ZS_SEG_STORE; ./artifacts)")
        command.add_argument("--traceback", action="store_true", help="for developers: show where an error came from")
        command.set_defaults(run=run)
        return command

    plan = add("plan", commands.plan, "show what is there, what a run would build, and what that takes")
    plan.add_argument(
        "--tflops",
        type=float,
        default=50.0,
        metavar="X",
        help="assumed speed of the teacher where none was measured; 50",
    )
    plan.add_argument(
        "--step-seconds",
        type=float,
        default=0.0,
        metavar="S",
        help="seconds of a step of v2c, instead of a measured one",
    )
    run = add("run", commands.run, "build what is missing, stage by stage, and report")
    run.add_argument("--from", dest="first", default="", metavar="STAGE", help="begin there, from cached inputs")
    run.add_argument("--until", dest="last", default="", metavar="STAGE", help="end there")
    run.add_argument(
        "--force",
        action="append",
        default=[],
        metavar="STAGE",
        help="build it and all that reads it again; may be repeated",
    )
    stage = add("stage", commands.stage, "build one stage from its cached inputs")
    stage.add_argument("stage", metavar="STAGE", help=f"one of {', '.join(STAGES)}")
    ablation = add("ablate", ablate.ablate, "the paper's ablations over several seeds, as tables beside the paper's")
    _add_ablate_flags(ablation)
    verify = _add_store_commands(add)
    predict = add("predict", commands.predict_images, "segment images with a trained checkpoint")
    predict.add_argument("--checkpoint", required=True, metavar="KEY", help="a checkpoint's key, or its folder")
    predict.add_argument("--images", required=True, nargs="+", metavar="PATH", help="image files, or folders of them")
    predict.add_argument(
        "--out", required=True, metavar="DIR", help="gets panoptic.json, panoptic/, panoptic_rle.json, overlay/"
    )
    predict.add_argument("--names", default="", metavar="A,B,C", help="further class names to look for")
    predict.add_argument(
        "--teacher.pretrained", dest="teacher", default="", metavar="FILE", help="its weights, for --names"
    )
    evaluate = add("evaluate", commands.evaluate_checkpoint, "score a trained checkpoint on a benchmark's own files")
    _add_evaluate_flags(evaluate)
    _add_pq_flags(add("pq", commands.panoptic_quality, "panoptic quality of any result in COCO's panoptic format"))
    bench = add("bench", commands.bench, "measure ours against a reference, in turn, in one process")
    bench.add_argument("name", metavar="NAME", choices=BENCHES, help=f"one of {', '.join(BENCHES)}")
    bench.add_argument("--json", default="", metavar="FILE", help="write the rows there as well")
    bench.add_argument("--full", action="store_true", help="every size, batch and mode; much longer")
    for command in (run, stage, ablation, verify, predict, evaluate, bench):
        _add_runtime_flags(command)
    for command in (run, stage):
        _add_training_flags(command)
        command.add_argument(
            "--name", default="", metavar="NAME", help="of this run: `gc` keeps what it reaches; default: the preset's"
        )
    return main_parser


def _add_ablate_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "tables", nargs="*", metavar="TABLE", help=f"some of {', '.join(ablate.NAMES)}; default: all but sweep"
    )
    command.add_argument("--seeds", type=int, default=3, metavar="N", help="training seeds 0 to N - 1; default 3")
    command.add_argument("--jobs", type=int, default=1, metavar="N", help="so many at once, sharing the CPU's threads")
    command.add_argument("--plan", action="store_true", help="only say what there is and what is to be built")


def _add_store_commands(add: Callable[..., argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """The commands that look after a store; returns `verify`, which can compute, too."""
    listing = add("list", store_commands.list_artefacts, "list the complete artefacts, and what uses them")
    listing.add_argument("--kind", default="", metavar="KIND", help="only those, such as checkpoint")
    listing.add_argument("--json", action="store_true", help="as JSON, with the keys of the users")
    show = add("show", store_commands.show_artefact, "show an artefact: its manifest, inputs and users")
    show.add_argument("key", metavar="KEY", help="its key, or the beginning of it")
    diff = add(
        "diff", store_commands.diff, "show in which settings two artefacts, with all they were made from, differ"
    )
    diff.add_argument("one", metavar="KEY", help="a key, the beginning of one, or the name of a run")
    diff.add_argument("other", metavar="KEY", help="the same")
    gc = add("gc", store_commands.gc, "find, and with --delete remove, what no named run reaches")
    gc.add_argument("--delete", action="store_true", help="remove it; without this nothing changes")
    gc.add_argument("--keep", type=int, default=1, metavar="N", help="last configurations of every run to keep; 1")
    gc.add_argument("--forget", action="append", default=[], metavar="RUN", help="a run that counts no more")
    gc.add_argument(
        "--partial-age",
        type=float,
        default=7,
        metavar="DAYS",
        help="for which a cut-off build stays; 7 (if no run needs it)",
    )
    verify = add("verify", store_commands.verify_artefacts, "compare artefacts, byte by byte, with their manifests")
    verify.add_argument("key", metavar="KEY", nargs="?", default="", help="one key; default: all")
    verify.add_argument(
        "--sample", type=int, default=0, metavar="N", help="read only N files, drawn at random; 0 = all"
    )
    verify.add_argument("--rows", type=int, default=0, metavar="N", help="encode N rows of tokens again; default 0")
    verify.add_argument(
        "--seed", type=int, metavar="N", help="decides which files (default: drawn anew) and rows (default: 0)"
    )
    verify.add_argument(
        "--teacher.pretrained", dest="teacher", default="", metavar="FILE", help="its weights, for --rows"
    )
    return verify


def _add_evaluate_flags(evaluate: argparse.ArgumentParser) -> None:
    evaluate.add_argument("--checkpoint", required=True, metavar="KEY", help="a checkpoint's key, or its folder")
    evaluate.add_argument(
        "--benchmark",
        required=True,
        metavar="NAME",
        help="coco-panoptic-zps, coco-stuff-zss, voc20, pc59, ade150, or a JSON file",
    )
    evaluate.add_argument("--data", required=True, metavar="DIR", help="the data set's folder")
    evaluate.add_argument("--split", default="val", metavar="NAME", help="which images; default val")
    evaluate.add_argument(
        "--seen-offset", type=float, default=0.0, metavar="X", help="taken off the seen classes' scores; default 0"
    )
    evaluate.add_argument("--json", default="", metavar="FILE", help="write scores, classes and settings there as well")
    evaluate.add_argument("--out", default="", metavar="DIR", help="gets the predictions")
    evaluate.add_argument(
        "--teacher.pretrained",
        dest="teacher",
        default="",
        metavar="FILE",
        help="its weights, for names new to the checkpoint",
    )


def _add_training_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--devices", type=int, default=1, metavar="N", help="GPUs (on a CPU: processes) of stage v2c")
    command.add_argument("--compile", action="store_true", help="torch.compile the network of stage v2c")
    command.add_argument(
        "--checkpoint-every", type=int, default=200, metavar="N", help="training steps between two saved states"
    )
    command.add_argument(
        "--dask",
        default="local",
        metavar="WHERE",
        help="workers of cache-clip: local (default), local:N, none, tcp://HOST:PORT, or a scheduler file",
    )


def _add_runtime_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    command.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads; 0 = all cores")


def _add_pq_flags(pq: argparse.ArgumentParser) -> None:
    pq.add_argument("gt_json", metavar="GT.json", help="annotations of the ground truth, with its categories")
    pq.add_argument("gt_folder", metavar="GT_DIR", help="its PNGs")
    pq.add_argument("pred_json", metavar="PRED.json", help="annotations of the result")
    pq.add_argument("pred_folder", metavar="PRED_DIR", help="its PNGs")
    pq.add_argument("--unseen", default="", metavar="ID,ID,...", help="categories of uPQ; all others count in sPQ")
    pq.add_argument("--json", default="", metavar="FILE", help="write scores and classes there as well")
    pq.add_argument("--csv", default="", metavar="FILE", help="write the classes there as well")
    pq.add_argument(
        "--check-ground-truth", action="store_true", help="compare its PNGs with its JSON too; takes twice as long"
    )


if __name__ == "__main__":
    sys.exit(main())
