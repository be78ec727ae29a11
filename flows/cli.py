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
from typing import Any

from flows import ablate, commands, new, view
from flows.command_flags import (
    Parser,
    add_ablate_flags,
    add_evaluate_flags,
    add_new_flags,
    add_plan_flags,
    add_pq_flags,
    add_prediction_commands,
    add_remote_commands,
    add_run_flags,
    add_store_commands,
    add_sweep_flags,
    add_training_flags,
    add_view_flags,
)
from flows.flags import flags_of
from flows.presets import PRESETS, preset
from models.errors import ModelError
from pipeline.line import STAGES
from pipeline.runtime import OUT_OF_MEMORY
from storage.errors import UserError, did_you_mean

# those that take flags of the config tree
TREE_COMMANDS = ("plan", "run", "stage", "ablate")
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


def _require_known(words: Sequence[str], options: argparse.Namespace, command: Parser) -> None:
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


class _TreeHelp(argparse.Action):
    """--help and --help-all of the commands that take flags of the config, with the values of the preset before it."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        from flows.help import everything, screen

        assert isinstance(parser, Parser)
        page = everything if option_string == "--help-all" else screen
        print(page(parser, parser.options, preset(namespace.preset or next(iter(PRESETS)))), flush=True)
        parser.exit()


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        print(f"zs-seg {version('zs-seg')}")
        parser.exit()


def parser() -> Parser:
    """The commands and their own flags; flags of the config tree are left over for `flows.flags.override`."""
    main_parser = Parser(
        prog="zs-seg",
        description="Zero-shot panoptic and semantic segmentation, trained as a staged, cached pipeline.",
        epilog=f"Presets: {', '.join(_presets())}. Stages: {', '.join(STAGES)}.",
    )
    main_parser.add_argument("--version", nargs=0, action=_Version, help="show the version and exit")
    subparsers = main_parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str, usage: str | None = None) -> Parser:
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

    add_new_flags(add("new", new.new, "write a benchmark file for your own images and annotations, and what to run"))
    tree = "--preset PRESET [flags] [--config.field VALUE ...]"
    plan = add(
        "plan", commands.plan, "show what is cached, what a run would build, and what that takes", f"zs-seg plan {tree}"
    )
    add_plan_flags(plan)
    run = add("run", commands.run, "build what is missing, stage by stage, and report", f"zs-seg run {tree}")
    add_run_flags(run)
    stage = add("stage", commands.stage, "build one stage from its cached inputs", f"zs-seg stage STAGE {tree}")
    stage.add_argument("stage", metavar="STAGE", help=f"one of {', '.join(STAGES)}")
    ablation = add(
        "ablate",
        ablate.ablate,
        "run the paper's ablations over several seeds; tables beside the paper's",
        f"zs-seg ablate [TABLE ...] {tree}",
    )
    add_ablate_flags(ablation)
    verify = add_store_commands(add)
    add_remote_commands(add)
    predict, page = add_prediction_commands(add)
    evaluate = add("evaluate", commands.evaluate_checkpoint, "score a trained checkpoint on a benchmark's own files")
    add_evaluate_flags(evaluate)
    sweep = add("sweep", commands.sweep, "a finished run's scores with the teacher at other alpha and beta")
    add_sweep_flags(sweep)
    add_pq_flags(add("pq", commands.panoptic_quality, "panoptic quality of any result in COCO's panoptic format"))
    add_view_flags(add("view", view.view, "make pages of all validation images of a run, or of two side by side"))
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
        add_training_flags(command)
    for name, command in main_parser.commands.items():
        command.add_argument("--traceback", action="store_true", help="for developers: show where an error came from")
        if name in TREE_COMMANDS:
            command.add_argument("-h", "--help", action=_TreeHelp, help="show the common flags and exit")
            command.add_argument("--help-all", action=_TreeHelp, help="show every flag, with its meaning, and exit")
    return main_parser


if __name__ == "__main__":
    sys.exit(main())
