"""`zs-seg runs`: the named runs of a store with what they changed and what they scored, and their TensorBoard folders."""

from __future__ import annotations

import argparse
import csv
import json
import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.request import Request, configure, open_store
from flows.tables import print_table
from pipeline.scoring.records import HEADLINE
from storage.differences import ABSENT, Difference, leaves
from storage.errors import UserError, counted, did_you_mean
from storage.keys import canonical
from storage.lineage import Lineage, Node
from storage.runs import RunRecord, Runs
from storage.store import Store

if TYPE_CHECKING:
    from pipeline.line import Config

SHOWN = "inductive", "transductive"
Scores = dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A named run's last line. `changed` is None where this version cannot read its command; `scores` are the headline
    in percent by row of the report, empty without a report. `built` of `stages` are complete."""

    record: RunRecord
    changed: list[Difference] | None
    scores: Scores
    built: int

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        changed = self.changed and {
            one.field: [None if value is ABSENT else value for value in (one.before, one.after)] for one in self.changed
        }
        return {
            "name": self.record.name,
            "date": self.record.date,
            "user": self.record.user,
            "command": self.record.command,
            "stages": len(self.record.refs),
            "built": self.built,
            "changed": changed if self.changed is None else changed or {},
            "report": str(self.record.refs["evaluate"]) if "evaluate" in self.record.refs else None,
            "scores": self.scores,
        }

    def cells(self, rows: Sequence[str]) -> tuple[str, ...]:
        """Its row of the table, with the scores of `rows` of the report."""
        scores = [self.scores.get(row) for row in rows]
        numbers = ("  ".join(f"{value:4.1f}" for value in one.values()) if one else "-" for one in scores)
        changed = "?" if self.changed is None else ", ".join(f"{one.field} {one.values[1]}" for one in self.changed)
        built = "" if self.built == len(self.record.refs) else f"{self.built} of {len(self.record.refs)} stages"
        return (
            self.record.name,
            self.record.date[:16].replace("T", " "),
            *numbers,
            ", ".join(filter(None, (built, changed))),
        )


def runs(options: argparse.Namespace) -> int:
    """The table, JSON or CSV of all runs; with --tensorboard also a folder of links."""
    store = open_store(options)
    found = _sorted(all_runs(store), options.sort)
    if options.tensorboard:
        count = link_tensorboard(Path(options.tensorboard), store, found)
        print(
            f"{counted(count, 'training')} linked; tensorboard --logdir {shlex.quote(options.tensorboard)}",
            file=sys.stderr,
        )
    if options.json:
        print(json.dumps([run.plain() for run in found], indent=1))
    elif options.csv:
        _write_csv(found)
    elif found:
        rows = _rows(found, options.row)
        heads = (f"{row} {'/'.join(_headline(found))}" for row in rows)
        print_table(("run", "date", *heads, "changed"), [run.cells(rows) for run in found])
    else:
        print(f"no run is recorded in {store.root}")
    return 0


def all_runs(store: Store) -> list[Run]:
    """Every name's last line, the latest last."""
    lineage = Lineage(store)
    records = sorted((Runs(store).lines(name)[-1] for name in Runs(store).names()), key=lambda one: one.date)
    return [describe(record, lineage) for record in records]


def describe(record: RunRecord, lineage: Lineage) -> Run:
    nodes = {stage: node for stage, ref in record.refs.items() if (node := lineage.node(ref))}
    return Run(record=record, changed=changed(record), scores=scores_of(nodes.get("evaluate")), built=len(nodes))


def scores_of(report: Node | None) -> Scores:
    """The headline of every row of a report, in percent, as its manifest counts it."""
    counts = report.counts if report else {}
    headlines = [set(names) for names in HEADLINE.values()]
    return {row: dict(part) for row, part in counts.items() if isinstance(part, dict) and part.keys() in headlines}


def changed(record: RunRecord) -> list[Difference] | None:
    """The fields of the configuration in which a run differs from its preset, as this version has it; None where its
    command cannot be read any more."""
    try:
        request = Request.parse(record.command)
        own, preset = (flat_fields(configure(one)) for one in (request, replace(request, overrides=(), max_steps=0)))
    except UserError:
        return None
    return [
        Difference(
            stage=name.partition(".")[0], field=name, before=preset.get(name, ABSENT), after=own.get(name, ABSENT)
        )
        for name in dict.fromkeys((*own, *preset))
        if own.get(name, ABSENT) != preset.get(name, ABSENT)
    ]


def flat_fields(config: Config) -> dict[str, Any]:
    """The configuration's fields by their dotted names."""
    return {".".join(path): value for path, value in leaves(json.loads(canonical(config)))}


def _headline(found: Sequence[Run]) -> list[str]:
    """The names of the scores, such as sPQ, uPQ, hPQ; of runs on both kinds of benchmark without the last letters."""
    names = list(dict.fromkeys(tuple(part) for run in found for part in run.scores.values()))
    return list(names[0]) if len(names) == 1 else ["s", "u", "h"]


def _rows(found: Sequence[Run], asked: Sequence[str]) -> list[str]:
    """The rows of the reports to show. Raises UserError for one that no report has."""
    known = list(dict.fromkeys(row for run in found for row in run.scores))
    for row in asked:
        if row not in (*known, "all"):
            raise UserError(f"no report has a row {row!r}{did_you_mean(row, known)}; there are {', '.join(known)}")
    return known if "all" in asked else list(asked or SHOWN)


def _sorted(found: list[Run], field: str) -> list[Run]:
    """By name, by date, or by a score, such as inductive.uPQ, or hPQ of the transductive row, the best last;
    runs without it come first. Raises UserError for an unknown field."""
    if field in ("date", ""):
        return found
    if field == "name":
        return sorted(found, key=lambda run: run.record.name)
    row, dot, score = field.rpartition(".")
    row = row if dot else SHOWN[-1]
    known = dict.fromkeys(f"{r}.{s}" for run in found for r, part in run.scores.items() for s in part)
    if found and f"{row}.{score}" not in known:
        close = did_you_mean(field, known)
        raise UserError(f"--sort {field!r} is none of date, name, and a score such as {SHOWN[-1]}.hPQ{close}")
    return sorted(found, key=lambda run: run.scores.get(row, {}).get(score, -1.0))


def _write_csv(found: Sequence[Run]) -> None:
    """A row a run on standard output; scores in columns such as transductive.hPQ."""
    columns = list(
        dict.fromkeys(f"{row}.{score}" for run in found for row, part in run.scores.items() for score in part)
    )
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["name", "date", "built", "stages", "changed", *columns])
    for run in found:
        fields = "?" if run.changed is None else "; ".join(map(str, run.changed))
        flat = {f"{row}.{score}": value for row, part in run.scores.items() for score, value in part.items()}
        about = [run.record.name, run.record.date, run.built, len(run.record.refs), fields]
        table.writerow([*about, *(flat.get(column, "") for column in columns)])


def link_tensorboard(folder: Path, store: Store, found: Sequence[Run]) -> int:
    """Make `folder`/RUN/STAGE a link to the event files of each training, and remove older links; returns their number.

    Raises UserError where something else lies there.
    """
    from pipeline.training.curves import TENSORBOARD

    wanted = {
        folder / run.record.name / stage: events.resolve()
        for run in found
        for stage, ref in run.record.refs.items()
        if (events := store.path(ref) / TENSORBOARD).is_dir()
    }
    present = [
        path for run in folder.glob("*") for path in (run.iterdir() if run.is_dir() and not run.is_symlink() else [run])
    ]
    if strange := [path for path in present if not path.is_symlink()]:
        raise UserError(f"{strange[0]} is no link of `zs-seg runs --tensorboard`; name another folder")
    for path in present:
        path.unlink()
    for path, events in wanted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        os.symlink(events, path, target_is_directory=True)
    for run in folder.glob("*"):
        if not any(run.iterdir()):
            run.rmdir()
    return len(wanted)


def print_scores(names: tuple[str, str], both: tuple[Mapping[str, Node], Mapping[str, Node]]) -> None:
    """The scores of two lines side by side, row by row of their reports; nothing where either has none."""
    one, other = (scores_of(line.get("evaluate")) for line in both)
    shared = [row for row in one if row in other and one[row].keys() == other[row].keys()]
    if not shared:
        return
    heads = "/".join(one[shared[0]])

    def cell(values: Iterable[float], form: str) -> str:
        return "  ".join(format(value, form) for value in values)

    rows = [
        (
            row,
            *(cell(part[row].values(), "4.1f") for part in (one, other)),
            cell((other[row][score] - value for score, value in one[row].items()), "+5.1f"),
        )
        for row in shared
    ]
    print()
    print_table((f"percent, {heads}", *names, "change"), rows)
