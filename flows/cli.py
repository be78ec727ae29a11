"""The command line `zs-seg`. It answers at once: torch and prefect are imported by the commands that need them.

Exit status 0; 2 with one line that says what is wrong and what mends it; 130 when interrupted; 1 with a traceback for a
bug of ours.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn

from flows import ablate, commands, history, new, remote_commands, store_commands, view
from flows.flags import flags_of
from flows.presets import PRESETS, preset
from models.errors import ModelError
from pipeline.line import STAGES
from pipeline.runtime import OUT_OF_MEMORY
from pipeline.scoring.config import EvaluateConfig
from storage.errors import UserError, did_you_mean

# those that take flags of the config tree
TREE_COMMANDS = ("plan", "run", "stage", "ablate")
# storage/names.py has the rule
ARTEFACT = "a key, the beginning of one, the name of a run, or RUN:STAGE"
CHECKPOINT = f"a checkpoint's folder, {ARTEFACT}; of a run the last checkpoint"
WORDS = "synonyms as sofa|couch; things, unless marked as grass:stuff"
REMOTE = "a remote by name (`zs-seg remote add`) or address"
BENCHES = ("segmenter", "evaluate", "cache", "train")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    _set_up_logging()
    # Read when torch is loaded: threads that wait in a spin take the time of whatever else runs on the machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        command_line = parser()
        _require_command(argv, command_line.commands)
        options, overrides = command_line.parse_known_args(argv)
        _require_known(overrides, options, command_line.commands[options.command])
        if options.command in TREE_COMMANDS and options.skip_bad:
            overrides.append("--shard.skip-bad")
        options.overrides = tuple(overrides)
        status = options.run(options)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("zs-seg: stopped; the same command goes on where this one was", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        message = _mistake(error)
        if not message or "--traceback" in argv:
            raise
        print(f"zs-seg: {' '.join(message.split())}", file=sys.stderr)
        return 2


def _presets() -> list[str]:
    """The presets' names, two that differ in "-regions" as one."""
    return [
        f"{name}{'[-regions]' * (f'{name}-regions' in PRESETS)}" for name in PRESETS if not name.endswith("-regions")
    ]


def _require_command(argv: Sequence[str], known: Collection[str]) -> None:
    """Raises UserError for a command that there is not."""
    if argv and not argv[0].startswith("-") and argv[0] not in known:
        raise UserError(f"command {argv[0]!r} is unknown{did_you_mean(argv[0], known)}; use one of {', '.join(known)}")


def _require_known(words: Sequence[str], options: argparse.Namespace, command: _Parser) -> None:
    """Can all the words that the command left over be flags of the config, whose names have a dot, and their values?

    Raises UserError for one that cannot, with the flag of the command or of the config that is closest to it.
    """
    tree = options.command in TREE_COMMANDS
    for word in words:
        name = word.partition("=")[0]
        if not tree or (name.startswith("--") and "." not in name):
            known = [name for option in command.options for name in option.option_strings]
            if tree:
                known += [name for flag in flags_of(preset(options.preset)) for name in flag.names]
            lists = f"`zs-seg {options.command} {'--help-all' if tree else '--help'}` lists the flags"
            raise UserError(f"{name!r} is unknown{did_you_mean(name, known)}; {lists}")


def _mistake(error: Exception) -> str:
    """The line for the user about an error that is theirs to mend; "" for one that is ours."""
    # where torch was not imported, its memory did not run out
    torch = sys.modules.get("torch")
    if torch and isinstance(error, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; mend that and run again"
    return str(error) if isinstance(error, UserError | ModelError) else ""


def _set_up_logging() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for name in ("flows", "models", "pipeline", "storage"):
        logging.getLogger(name).setLevel(logging.INFO)


class _Parser(argparse.ArgumentParser):
    """A parser that answers a mistake in one line, and knows its options and commands."""

    def __init__(self, **settings: Any) -> None:
        self.options: list[argparse.Action] = []
        self.commands: dict[str, _Parser] = {}
        super().__init__(**settings, allow_abbrev=False)

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action:
        self.options.append(super().add_argument(*names, **settings))
        return self.options[-1]

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"zs-seg: {message}; `{self.prog} --help` lists what there is\n")


class _TreeHelp(argparse.Action):
    """--help and --help-all of the commands that take flags of the config, with the values of the preset before it."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        from flows.help import everything, screen

        assert isinstance(parser, _Parser)
        page = everything if option_string == "--help-all" else screen
        print(page(parser, parser.options, preset(namespace.preset or next(iter(PRESETS)))), flush=True)
        parser.exit()


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        print(f"zs-seg {version('zs-seg')}")
        parser.exit()


def parser() -> _Parser:
    """The commands and their own flags; flags of the config tree are left over for `flows.flags.override`."""
    main_parser = _Parser(
        prog="zs-seg",
        description="Zero-shot panoptic and semantic segmentation, trained as a staged, cached pipeline.",
        epilog=f"Presets: {', '.join(_presets())}. Stages: {', '.join(STAGES)}.",
    )
    main_parser.add_argument("--version", nargs=0, action=_Version, help="show the version and exit")
    subparsers = main_parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str, usage: str | None = None) -> _Parser:
        command = subparsers.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            usage=usage,
            add_help=name not in TREE_COMMANDS,
        )
        if name in TREE_COMMANDS:
            command.add_argument("--preset", required=True, metavar="PRESET", help=f"one of {', '.join(_presets())}")
            command.add_argument(
                "--coco", default="", metavar="DIR", help="real images, in COCO's layout; default: COCO_ROOT"
            )
        command.add_argument(
            "--store", default="", metavar="DIR", help="artefacts; default: ZS_SEG_STORE, else ./artifacts"
        )
        command.set_defaults(run=run)
        main_parser.commands[name] = command
        return command

    _add_new_flags(add("new", new.new, "write a benchmark file for your own images and annotations, and what to run"))
    tree = "--preset PRESET [flags] [--config.field VALUE ...]"
    plan = add(
        "plan", commands.plan, "show what is cached, what a run would build, and what that takes", f"zs-seg plan {tree}"
    )
    _add_plan_flags(plan)
    run = add("run", commands.run, "build what is missing, stage by stage, and report", f"zs-seg run {tree}")
    _add_run_flags(run)
    stage = add("stage", commands.stage, "build one stage from its cached inputs", f"zs-seg stage STAGE {tree}")
    stage.add_argument("stage", metavar="STAGE", help=f"one of {', '.join(STAGES)}")
    ablation = add(
        "ablate",
        ablate.ablate,
        "run the paper's ablations over several seeds; tables beside the paper's",
        f"zs-seg ablate [TABLE ...] {tree}",
    )
    _add_ablate_flags(ablation)
    verify = _add_store_commands(add)
    _add_remote_commands(add)
    predict, page = _add_prediction_commands(add)
    evaluate = add("evaluate", commands.evaluate_checkpoint, "score a trained checkpoint on a benchmark's own files")
    _add_evaluate_flags(evaluate)
    sweep = add("sweep", commands.sweep, "a finished run's scores with the teacher at other alpha and beta")
    _add_sweep_flags(sweep)
    _add_pq_flags(add("pq", commands.panoptic_quality, "panoptic quality of any result in COCO's panoptic format"))
    _add_view_flags(add("view", view.view, "make pages of all validation images of a run, or of two side by side"))
    bench = add("bench", commands.bench, "time ours and a reference in turn, in one process")
    bench.add_argument("name", metavar="NAME", choices=BENCHES, help=f"one of {', '.join(BENCHES)}")
    bench.add_argument("--json", default="", metavar="FILE", help="also write the rows to this file")
    bench.add_argument("--full", action="store_true", help="every size, batch and mode; takes much longer")
    for command in (run, stage):
        command.add_argument(
            "--name",
            default="",
            metavar="NAME",
            help="name of the run; default: the preset's",
        )
    for command in (plan, run, stage):
        command.add_argument("--remote", default="", metavar="R", help="look there before building: name or address")
    for command in (run, stage):
        command.add_argument("--push", action="store_true", help="send what is complete to the remote")
        command.add_argument(
            "--cache", type=float, default=0.0, metavar="GB", help="read tars from the remote, keep so many GB of them"
        )
    for command in (plan, run, stage, ablation):
        command.add_argument(
            "--max-steps", type=int, default=0, metavar="N", help="at most N steps per training stage, for trials"
        )
        command.add_argument("--skip-bad", action="store_true", help="leave out images that cannot be used")
    for command in (run, stage, ablation, verify, predict, page, evaluate, sweep, bench):
        command.add_argument(
            "--device", default="auto", metavar="DEVICE", help="auto (default), cpu, cuda, cuda:1, ..."
        )
        own = "what serves the stage best (1 for small networks), or " if command in (run, stage) else ""
        command.add_argument(
            "--threads", type=int, default=0, metavar="N", help=f"CPU threads; default: {own}one per core"
        )
    for command in (run, stage):
        _add_training_flags(command)
    for name, command in main_parser.commands.items():
        command.add_argument("--traceback", action="store_true", help="for developers: show where an error came from")
        if name in TREE_COMMANDS:
            command.add_argument("-h", "--help", action=_TreeHelp, help="show the common flags and exit")
            command.add_argument("--help-all", action=_TreeHelp, help="show every flag, with its meaning, and exit")
    return main_parser


def _add_new_flags(command: _Parser) -> None:
    command.add_argument("name", metavar="NAME", help="of the benchmark: NAME.json is written, and names the run")
    command.add_argument(
        "--from",
        dest="source",
        required=True,
        metavar="PATH",
        help="folder of the data, in any of the layouts of pipeline/data/README.md, or an annotation file",
    )
    command.add_argument(
        "--unseen", default="", metavar="A,B,C", help="unseen classes by name; none: for zs-seg evaluate alone"
    )
    command.add_argument(
        "--unseen-from", default="", metavar="NAME", help="those of another benchmark, such as coco-panoptic-zps"
    )
    command.add_argument("--classes", default="", metavar="A,B,C", help="the only classes to use; default: all")
    command.add_argument(
        "--others",
        choices=("refuse", "ignore"),
        default="refuse",
        help="what becomes of other categories: refuse (default), or ignore, which makes their pixels unlabelled",
    )
    command.add_argument(
        "--protocol",
        choices=("image-filter", "pixel-ignore", "none"),
        help="how training hides unseen classes; default: image-filter, of label maps pixel-ignore",
    )
    command.add_argument(
        "--kind", default="", metavar="KIND", help="panoptic, instances or labels, where a folder has several"
    )
    command.add_argument("--names", default="", metavar="FILE", help="names of label maps' values, a line each: 7 car")
    command.add_argument(
        "--val-share",
        type=float,
        default=0.2,
        metavar="X",
        help="share of the images to validate on, where the folder has no validation images; default: 0.2",
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of that split; default: 0")
    command.add_argument(
        "--preset",
        default="",
        metavar="PRESET",
        help="of the command; default: a published one on a GPU, else coco-sample",
    )
    command.add_argument("--threads", type=int, default=0, metavar="N", help="threads that read; default: one per core")
    command.add_argument("--overwrite", action="store_true", help="replace NAME.json")


def _add_plan_flags(plan: _Parser) -> None:
    plan.add_argument(
        "--tflops",
        type=float,
        default=50.0,
        metavar="X",
        help="assumed speed of the teacher and of published networks, where none was measured; default: 50",
    )
    plan.add_argument(
        "--step-seconds",
        type=float,
        default=0.0,
        metavar="S",
        help="assumed seconds per step of v2c, in place of a measured one",
    )
    plan.add_argument(
        "--memory",
        action="store_true",
        help="also compute the GPU memory that v2c takes; needs no GPU, but some seconds",
    )
    plan.add_argument("--json", action="store_true", help="as JSON")


def _add_run_flags(run: _Parser) -> None:
    run.add_argument("--from", dest="first", default="", metavar="STAGE", help="first stage, built from cached inputs")
    run.add_argument("--until", dest="last", default="", metavar="STAGE", help="last stage")
    run.add_argument(
        "--force",
        action="append",
        default=[],
        metavar="STAGE",
        help="rebuild it and what depends on it; repeatable",
    )
    run.add_argument(
        "--track",
        default="",
        metavar="TRACKER",
        help="mlflow: send config, curves, scores and pictures there in the end",
    )


def _add_ablate_flags(command: _Parser) -> None:
    command.add_argument(
        "tables", nargs="*", metavar="TABLE", help=f"some of {', '.join(ablate.NAMES)}; default: all but sweep"
    )
    command.add_argument("--seeds", type=int, default=5, metavar="N", help="training seeds 0 to N - 1; default: 5")
    command.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, sharing the CPU's threads")
    command.add_argument("--plan", action="store_true", help="only show what is cached and what is to be built")


def _add_store_commands(add: Callable[..., _Parser]) -> _Parser:
    """The commands that look after a store; returns `verify`, which can compute, too."""
    listing = add("list", store_commands.list_artefacts, "list the complete artefacts, and what uses them")
    listing.add_argument("--kind", default="", metavar="KIND", help="only artefacts of this kind, such as checkpoint")
    listing.add_argument("--json", action="store_true", help="as JSON, with the keys of the users")
    show = add("show", store_commands.show_artefact, "show an artefact: its manifest, inputs and users")
    show.add_argument("key", metavar="KEY", help=f"{ARTEFACT}; of a run the last stage")
    show.add_argument("--json", action="store_true", help="as JSON")
    runs = add("runs", history.runs, "list the named runs: date, what they changed in their preset, scores")
    runs.add_argument(
        "--row", action="append", default=[], metavar="ROW",
        help="row of the reports to show, or all; may be repeated; default: inductive and transductive",
    )  # fmt: skip
    runs.add_argument(
        "--sort", default="date", metavar="FIELD", help="date (default), name, hPQ, or a row's score: inductive.uPQ"
    )
    shape = runs.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="as JSON, with the scores of all rows")
    shape.add_argument("--csv", action="store_true", help="as CSV, with the scores of all rows")
    runs.add_argument(
        "--tensorboard", default="", metavar="DIR", help="also make DIR/RUN/STAGE links to the trainings' event files"
    )
    diff = add(
        "diff", store_commands.diff, "show the settings in which two artefacts, or what they were made from, differ"
    )
    diff.add_argument("one", metavar="KEY", help=ARTEFACT)
    diff.add_argument("other", metavar="KEY", help="the same")
    gc = add("gc", store_commands.gc, "find, and with --delete remove, what no named run reaches")
    gc.add_argument("--delete", action="store_true", help="remove it; without this flag nothing changes")
    gc.add_argument("--json", action="store_true", help="as JSON")
    gc.add_argument(
        "--keep",
        type=int,
        default=1,
        metavar="N",
        help="number of last configurations of every run to keep; default: 1",
    )
    gc.add_argument("--forget", action="append", default=[], metavar="RUN", help="keep nothing for this run's sake")
    gc.add_argument(
        "--partial-age",
        type=float,
        default=7,
        metavar="DAYS",
        help="keep interrupted builds that no run needs for so long; default: 7",
    )
    verify = add("verify", store_commands.verify_artefacts, "compare artefacts, byte by byte, with their manifests")
    verify.add_argument("key", metavar="KEY", nargs="?", default="", help=f"{ARTEFACT}; of a run all; default: all")
    verify.add_argument(
        "--sample", type=int, default=0, metavar="N", help="read only N files, drawn at random; default: all"
    )
    verify.add_argument("--rows", type=int, default=0, metavar="N", help="encode N rows of tokens again; default: 0")
    verify.add_argument(
        "--seed", type=int, metavar="N", help="of the drawn files (default: a new one) and rows (default: 0)"
    )
    verify.add_argument(
        "--set-aside",
        action="store_true",
        help="rename damaged artefacts, so that the next run makes them anew, and nothing that was made of them",
    )
    _add_teacher_flag(verify, "with --rows")
    for command in (gc, verify):
        command.add_argument("--remote", default="", metavar="R", help=f"not the store, but {REMOTE}")
    return verify


def _add_remote_commands(add: Callable[..., _Parser]) -> None:
    remote = add("remote", remote_commands.remote, "add, list or remove an address of a store")
    remote.add_argument("action", metavar="ACTION", choices=("add", "list", "remove"), help="add, list or remove")
    remote.add_argument("name", metavar="NAME", nargs="?", default="", help="what to call it")
    remote.add_argument(
        "url",
        metavar="ADDRESS",
        nargs="?",
        default="",
        help="s3://, gs://, hf://, ssh:// or file://, without credentials",
    )
    push = add("push", remote_commands.push, "send a run, an artefact or all runs to a remote")
    pull = add("pull", remote_commands.pull, "fetch a run, an artefact or all runs from a remote")
    status = add("status", remote_commands.status, "compare the store with a remote")
    for command, flag, dest in ((push, "--to", "to"), (pull, "--from", "source"), (status, "--remote", "remote")):
        command.add_argument("key", metavar="RUN|KEY", nargs="?", default="", help=f"{ARTEFACT}; default: all runs")
        command.add_argument(flag, dest=dest, default="", metavar="R", help=f"{REMOTE}; default: the only one")
        command.add_argument("--jobs", type=int, default=8, metavar="N", help="files at a time; default: 8")
    for command in (push, pull):
        command.add_argument("--dry-run", action="store_true", help="only show what would go")
    status.add_argument("--json", action="store_true", help="as JSON")


def _add_prediction_commands(add: Callable[..., _Parser]) -> tuple[_Parser, _Parser]:
    """The commands for images of one's own; returns those that compute, `predict` and `app`."""
    predict = add("predict", commands.predict_images, "segment images and videos with a trained checkpoint")
    _add_predict_flags(predict)
    page = add("app", commands.app, "serve a page on this machine to drop an image and type words")
    _add_app_flags(page)
    _add_export_flags(
        add("export", commands.export, "write a checkpoint as an ONNX file, or as a folder that needs no store")
    )
    return predict, page


def _add_predict_flags(predict: _Parser) -> None:
    predict.add_argument("--checkpoint", required=True, metavar="KEY", help=CHECKPOINT)
    predict.add_argument(
        "--images",
        required=True,
        nargs="+",
        metavar="PATH",
        help="image and video files, folders of them, in depth, or - for an image on standard input",
    )
    predict.add_argument(
        "--out",
        default="",
        metavar="DIR",
        help="folder for index.html, overlay/, panoptic.json, panoptic/ and panoptic_rle.json",
    )
    predict.add_argument(
        "--json", default="", metavar="FILE", help="also write the segments to this file, - for standard output"
    )
    predict.add_argument("--names", default="", metavar="A,B,C", help=f"class names beyond the checkpoint's; {WORDS}")
    predict.add_argument("--stuff", default="", metavar="A,B,C", help="the same for classes that are stuff")
    predict.add_argument("--only", action="store_true", help="choose among --names and --stuff alone")
    predict.add_argument(
        "--min-score", type=float, default=0.0, metavar="X", help="leave out segments with a lower score; default: 0"
    )
    predict.add_argument(
        "--overlap-threshold",
        type=float,
        metavar="X",
        help="smallest share of its own mask that a segment wins, 0..1; default: the checkpoint's",
    )
    predict.add_argument(
        "--seen-offset",
        type=float,
        default=0.0,
        metavar="X",
        help="subtracted from the scores of seen classes where a class is chosen; default: 0",
    )
    _add_with_teacher_flags(predict)
    predict.add_argument(
        "--every", type=int, default=1, metavar="N", help="of a video, segment every N-th frame; default: 1"
    )
    predict.add_argument(
        "--skip-bad", action="store_true", help="leave out files that cannot be read, and list them in panoptic.json"
    )
    _add_teacher_flag(predict, "with --names and --with-teacher")


def _add_export_flags(command: _Parser) -> None:
    command.add_argument("checkpoint", metavar="KEY", help=CHECKPOINT)
    command.add_argument(
        "--onnx", default="", metavar="FILE", help="the network; text rows and classes go beside it, as .npy and .json"
    )
    command.add_argument("--folder", default="", metavar="DIR", help="weights, classes, text rows and a model card")
    command.add_argument("--names", default="", metavar="A,B,C", help=f"class names beyond the checkpoint's; {WORDS}")
    command.add_argument("--stuff", default="", metavar="A,B,C", help="the same for classes that are stuff")
    command.add_argument("--only", action="store_true", help="with the classes of --names and --stuff alone")
    _add_teacher_flag(command, "with --names")


def _add_app_flags(page: _Parser) -> None:
    page.add_argument("--checkpoint", default="demo", metavar="KEY", help=f"{CHECKPOINT}; default: demo")
    page.add_argument("--port", type=int, default=7860, metavar="N", help="0 takes a free one; default: 7860")
    page.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="default: 127.0.0.1, which this machine alone reaches"
    )
    _add_teacher_flag(page, "for words and for the teacher at prediction")


def _add_evaluate_flags(evaluate: _Parser) -> None:
    evaluate.add_argument("--checkpoint", required=True, metavar="KEY", help=CHECKPOINT)
    evaluate.add_argument(
        "--benchmark",
        required=True,
        metavar="NAME",
        help="coco-panoptic-zps, coco-stuff-zss, voc20, pc59, ade150, or a JSON file",
    )
    evaluate.add_argument("--data", required=True, metavar="DIR", help="folder of the data set")
    evaluate.add_argument("--split", default="val", metavar="NAME", help="split of the images; default: val")
    evaluate.add_argument(
        "--seen-offset",
        type=float,
        default=0.0,
        metavar="X",
        help="subtracted from the scores of seen classes; default: 0",
    )
    _add_with_teacher_flags(evaluate)
    evaluate.add_argument(
        "--match-names",
        action="store_true",
        help="take a benchmark with the checkpoint's classes in another order or with other ids, and go by their names",
    )
    evaluate.add_argument(
        "--json", default="", metavar="FILE", help="also write scores, classes and settings to this file"
    )
    evaluate.add_argument("--out", default="", metavar="DIR", help="folder for the predictions")
    _add_teacher_flag(evaluate, "for classes that the checkpoint does not have, and --with-teacher")


def _add_sweep_flags(sweep: _Parser) -> None:
    sweep.add_argument("run_name", metavar="RUN", help="a run, or the key of a report")
    for name, classes in (("alpha", "seen"), ("beta", "unseen")):
        sweep.add_argument(
            f"--{name}",
            type=float,
            nargs="+",
            default=[],
            metavar="X",
            help=f"the teacher's exponents for {classes} classes, each 0..1; default: the report's",
        )
    sweep.add_argument(
        "--images",
        type=int,
        default=0,
        metavar="N",
        help="the first N of the images that the report kept; default: all",
    )
    sweep.add_argument("--json", default="", metavar="FILE", help="also write the points to this file")


def _add_with_teacher_flags(command: _Parser) -> None:
    command.add_argument(
        "--with-teacher",
        action="store_true",
        help="multiply the class scores with those of the checkpoint's teacher for the masks that are found",
    )
    for name, classes in (("alpha", "seen"), ("beta", "unseen")):
        default = getattr(EvaluateConfig(), name)
        command.add_argument(
            f"--{name}",
            type=float,
            default=default,
            metavar="X",
            help=f"the teacher's exponent for {classes} classes, 0..1; 1 = the teacher alone; default: {default:g}",
        )
    command.add_argument(
        "--object-threshold",
        type=float,
        default=None,
        metavar="X",
        help="least score of a segment, 0..1; default: the checkpoint's own, which was chosen without the teacher",
    )


def _add_view_flags(command: _Parser) -> None:
    command.add_argument("runs", nargs="+", metavar="RUN", help="one run or two: names, or keys of reports")
    command.add_argument("--serve", action="store_true", help="also serve the pages on 127.0.0.1, until Ctrl-C")
    command.add_argument("--port", type=int, default=0, metavar="N", help="port of --serve; default: a free one")
    command.add_argument("--device", default="auto", metavar="DEVICE", help="auto (default), cpu, cuda, cuda:1, ...")
    command.add_argument(
        "--threads", type=int, default=0, metavar="N", help="CPU threads; default: as many as the report was made with"
    )


def _add_teacher_flag(command: _Parser, when: str) -> None:
    command.add_argument(
        "--teacher.pretrained", dest="teacher", default="", metavar="FILE", help=f"{when}: the teacher's weights"
    )


def _add_training_flags(command: _Parser) -> None:
    command.add_argument(
        "--devices",
        type=int,
        default=1,
        metavar="N",
        help="GPUs, or processes on a CPU, for stages v2c and queries; default: 1",
    )
    command.add_argument("--compile", action="store_true", help="pass the network of stage v2c through torch.compile")
    command.add_argument(
        "--checkpoint-every", type=int, default=200, metavar="N", help="steps between two saved states; default: 200"
    )
    command.add_argument(
        "--dask",
        default="local",
        metavar="WHERE",
        help="workers of cache-clip and mask-tokens: local (default), local:N, none, tcp://HOST:PORT, or a scheduler file",
    )


def _add_pq_flags(pq: _Parser) -> None:
    pq.add_argument("gt_json", metavar="GT.json", help="annotations of the ground truth, with its categories")
    pq.add_argument("gt_folder", metavar="GT_DIR", help="its PNGs")
    pq.add_argument("pred_json", metavar="PRED.json", help="annotations of the result")
    pq.add_argument("pred_folder", metavar="PRED_DIR", help="its PNGs")
    pq.add_argument("--unseen", default="", metavar="ID,ID,...", help="categories of uPQ; all others count in sPQ")
    pq.add_argument("--json", default="", metavar="FILE", help="also write scores and classes to this file")
    pq.add_argument("--csv", default="", metavar="FILE", help="also write the classes to this file")
    pq.add_argument(
        "--check-ground-truth",
        action="store_true",
        help="also compare the ground truth's PNGs with its JSON; takes twice as long",
    )


if __name__ == "__main__":
    sys.exit(main())
