"""The flags of each command of `zs-seg` beyond those of the config tree, and the parser that they are added to."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from flows import ablate, commands, history, remote_commands, store_commands
from pipeline.scoring.config import EvaluateConfig

# storage/names.py has the rule
ARTEFACT = "a key, the beginning of one, the name of a run, or RUN:STAGE"
CHECKPOINT = f"a checkpoint's folder, {ARTEFACT}; of a run the last checkpoint"
WORDS = "synonyms as sofa|couch; things, unless marked as grass:stuff"
REMOTE = "a remote by name (`zs-seg remote add`) or address"


class Parser(argparse.ArgumentParser):
    """A parser that answers a mistake in one line, and knows its options and commands."""

    def __init__(self, **settings: Any) -> None:
        self.options: list[argparse.Action] = []
        self.commands: dict[str, Parser] = {}
        super().__init__(**settings, allow_abbrev=False)

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action:
        self.options.append(super().add_argument(*names, **settings))
        return self.options[-1]

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"zs-seg: {message}; `{self.prog} --help` lists what there is\n")


def add_new_flags(command: Parser) -> None:
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


def add_plan_flags(plan: Parser) -> None:
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


def add_run_flags(run: Parser) -> None:
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


def add_ablate_flags(command: Parser) -> None:
    command.add_argument(
        "tables", nargs="*", metavar="TABLE", help=f"some of {', '.join(ablate.NAMES)}; default: all but sweep"
    )
    command.add_argument("--seeds", type=int, default=5, metavar="N", help="training seeds 0 to N - 1; default: 5")
    command.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, sharing the CPU's threads")
    command.add_argument("--plan", action="store_true", help="only show what is cached and what is to be built")


def add_store_commands(add: Callable[..., Parser]) -> Parser:
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
    add_teacher_flag(verify, "with --rows")
    for command in (gc, verify):
        command.add_argument("--remote", default="", metavar="R", help=f"not the store, but {REMOTE}")
    return verify


def add_remote_commands(add: Callable[..., Parser]) -> None:
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


def add_prediction_commands(add: Callable[..., Parser]) -> tuple[Parser, Parser]:
    """The commands for images of one's own; returns those that compute, `predict` and `app`."""
    predict = add("predict", commands.predict_images, "segment images and videos with a trained checkpoint")
    add_predict_flags(predict)
    page = add("app", commands.app, "serve a page on this machine to drop an image and type words")
    add_app_flags(page)
    add_export_flags(
        add("export", commands.export, "write a checkpoint as an ONNX file, or as a folder that needs no store")
    )
    return predict, page


def add_predict_flags(predict: Parser) -> None:
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
    add_with_teacher_flags(predict)
    predict.add_argument(
        "--every", type=int, default=1, metavar="N", help="of a video, segment every N-th frame; default: 1"
    )
    predict.add_argument(
        "--skip-bad", action="store_true", help="leave out files that cannot be read, and list them in panoptic.json"
    )
    add_teacher_flag(predict, "with --names and --with-teacher")


def add_export_flags(command: Parser) -> None:
    command.add_argument("checkpoint", metavar="KEY", help=CHECKPOINT)
    command.add_argument(
        "--onnx", default="", metavar="FILE", help="the network; text rows and classes go beside it, as .npy and .json"
    )
    command.add_argument("--folder", default="", metavar="DIR", help="weights, classes, text rows and a model card")
    command.add_argument("--names", default="", metavar="A,B,C", help=f"class names beyond the checkpoint's; {WORDS}")
    command.add_argument("--stuff", default="", metavar="A,B,C", help="the same for classes that are stuff")
    command.add_argument("--only", action="store_true", help="with the classes of --names and --stuff alone")
    add_teacher_flag(command, "with --names")


def add_app_flags(page: Parser) -> None:
    page.add_argument("--checkpoint", default="demo", metavar="KEY", help=f"{CHECKPOINT}; default: demo")
    page.add_argument("--port", type=int, default=7860, metavar="N", help="0 takes a free one; default: 7860")
    page.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="default: 127.0.0.1, which this machine alone reaches"
    )
    add_teacher_flag(page, "for words and for the teacher at prediction")


def add_evaluate_flags(evaluate: Parser) -> None:
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
    add_with_teacher_flags(evaluate)
    evaluate.add_argument(
        "--match-names",
        action="store_true",
        help="take a benchmark with the checkpoint's classes in another order or with other ids, and go by their names",
    )
    evaluate.add_argument(
        "--json", default="", metavar="FILE", help="also write scores, classes and settings to this file"
    )
    evaluate.add_argument("--out", default="", metavar="DIR", help="folder for the predictions")
    add_teacher_flag(evaluate, "for classes that the checkpoint does not have, and --with-teacher")


def add_sweep_flags(sweep: Parser) -> None:
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


def add_with_teacher_flags(command: Parser) -> None:
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


def add_view_flags(command: Parser) -> None:
    command.add_argument("runs", nargs="+", metavar="RUN", help="one run or two: names, or keys of reports")
    command.add_argument("--serve", action="store_true", help="also serve the pages on 127.0.0.1, until Ctrl-C")
    command.add_argument("--port", type=int, default=0, metavar="N", help="port of --serve; default: a free one")
    command.add_argument("--device", default="auto", metavar="DEVICE", help="auto (default), cpu, cuda, cuda:1, ...")
    command.add_argument(
        "--threads", type=int, default=0, metavar="N", help="CPU threads; default: as many as the report was made with"
    )


def add_teacher_flag(command: Parser, when: str) -> None:
    command.add_argument(
        "--teacher.pretrained", dest="teacher", default="", metavar="FILE", help=f"{when}: the teacher's weights"
    )


def add_training_flags(command: Parser) -> None:
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


def add_pq_flags(pq: Parser) -> None:
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
