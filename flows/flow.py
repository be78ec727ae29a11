"""The Prefect flow `zs-seg`: one task a stage, each in a process of its own. The store decides what is built; Prefect
starts, watches and records."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import quote

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed
from pydantic import Field

from flows import artifacts, child, runs
from flows.elsewhere import Elsewhere
from flows.presets import PRESETS
from flows.request import Request, configure
from pipeline.line import STAGES, Stage, line
from pipeline.runtime import Runtime
from pipeline.scoring.records import read_report
from storage.keys import Ref
from storage.store import Store

if TYPE_CHECKING:
    Preset = StageName = str
else:  # lists to choose from in the form that starts a run
    Preset, StageName = Literal[tuple(PRESETS)], Literal[STAGES]
RETRY_DELAY = 5  # seconds, for a GPU to become free again


def _build(
    stage: Stage, inputs: Mapping[str, str | State[str]], request: Request, flags: list[str], there: str
) -> str | State[str]:
    """Build one stage from its cached inputs, in a process of its own; a complete artefact is left as it is, and the
    task ends as "Cached". `there`: of one that a remote has, what became of it, else "". Returns its "kind/key"."""
    assert inputs == {name: str(ref) for name, ref in stage.recipe.inputs.items()}
    ref, store, logger = stage.recipe.ref, request.open_store(), get_run_logger()
    if there:
        logger.info("%s", there)
        return Completed(name="Cached", message=there, data=str(ref))
    if store.state(ref) == "fresh":
        logger.info("%s", runs.build(stage, store, Runtime()))
        return Completed(
            name="Cached", message=f"{ref} is complete in {store.root}; nothing was computed", data=str(ref)
        )
    words = [*request.arguments("stage", stage.name), *flags]
    child.run(f"{stage.name} ({ref})", words, lambda text: logger.info("%s  %s", ref.key, text))
    return str(ref)


def _may_help(_task: Any, _run: Any, state: Any) -> bool:
    """Another try mends a process that died, not a mistake of the user's."""
    return isinstance(state.data, child.Died)


# Prefect's own cache is off: it does not check that the artefact still exists. The store finds a complete one by its
# key.
TASKS = {
    stage: task(
        name=stage,
        task_run_name=stage,
        cache_policy=NO_CACHE,
        retry_delay_seconds=RETRY_DELAY,
        retry_condition_fn=_may_help,
    )(_build)
    for stage in STAGES
}


@flow(name="zs-seg", flow_run_name="{preset} until {until_stage}")
def zs_seg(
    preset: Preset = "demo",
    until_stage: StageName = "evaluate",
    from_stage: StageName | None = None,
    overrides: list[str] | None = None,
    coco: str = "",
    store: str = "",
    device: str = "auto",
    devices: Annotated[int, Field(ge=1)] = 1,
    dask: str = "",
    remote: str = "",
    push: bool = False,
    cache: Annotated[float, Field(ge=0)] = 0,
    checkpoint_every: Annotated[int, Field(ge=1)] = 200,
    retries: Annotated[int, Field(ge=0)] = 2,
) -> str:
    """Images to report, stage by stage; only what is missing is built.

    Args:
        preset: The run's configuration, see flows/presets.py.
        until_stage: The last stage to build; with evaluate the report goes to the folder runs/PRESET of the worker.
        from_stage: Begin there, and fail at once if an earlier stage is not complete; empty = build what is missing.
        overrides: Flags that change single fields of the preset, as on the command line, e.g. ["--v2c.lr", "2e-4"].
        coco: Folder of real images in COCO's layout; empty = COCO_ROOT of the worker.
        store: Folder of the artefacts; empty = ZS_SEG_STORE of the worker, else ./artifacts.
        device: Where to compute, such as auto, cpu, cuda or cuda:1.
        devices: How many GPUs (on a CPU, processes) train stage v2c together and share the tars of stage queries.
        dask: Workers of cache-clip, one of local, local:N, none, tcp://HOST:PORT or a scheduler's file; empty =
            ZS_SEG_DASK of the worker, else local.
        remote: Where to look for an artefact before it is built, a remote of the store by name, or an address such as
            s3://bucket/folder; empty = nowhere.
        push: Send what is complete to the remote, stage by stage, and note the run there.
        cache: Read the tars of stage shard from the remote, through a cache of so many GB in the store; 0 = fetch them.
        checkpoint_every: Training steps between two saved states.
        retries: How often a stage whose process died (a fault in CUDA, a lack of memory) goes on from its last state.

    Returns:
        The last artefact as "kind/key".
    """
    request = Request(preset=preset, coco=coco, store=store, overrides=tuple(overrides or ()))
    flags = [
        "--device", device, "--devices", str(devices), "--dask", dask or os.environ.get("ZS_SEG_DASK") or "local",
        "--checkpoint-every", str(checkpoint_every), *(("--remote", remote) if remote else ()),
    ]  # fmt: skip
    config, artefacts = configure(request), request.open_store()
    stages = line(config)
    selected = runs.select(stages, first=from_stage or "", last=until_stage)
    runs.require_shares(config, selected, devices)
    elsewhere = Elsewhere.look(artefacts, stages, remote=remote, push=push, cache=int(cache * 1e9))
    runs.require_inputs(request, artefacts, stages, selected, elsewhere=elsewhere.have)
    # What earlier tasks returned: Prefect draws its graph from these very objects. A Ref would not do, as two of one kind
    # share the string of their kind.
    built: dict[Ref, str | State[str]] = {}
    with runs.noted(request, stages, artefacts):
        elsewhere.note(request.run_name)
        elsewhere.fetch(elsewhere.needed(selected))
        for stage in selected:
            inputs = {name: built.get(ref, str(ref)) for name, ref in stage.recipe.inputs.items()}
            outcome = elsewhere.outcome(stage, ())
            there = f"{outcome.ref}: {outcome.note}" if outcome else ""
            build = TASKS[stage.name].with_options(retries=retries)
            built[stage.recipe.ref] = build(stage, inputs, request, flags, there)
            elsewhere.leave(stage.recipe.ref)
    done = {stage.name: "cached" if isinstance(built[stage.recipe.ref], State) else "built" for stage in selected}
    get_run_logger().info("%s", artifacts.summary(done))
    _show_stages(preset, runs.lineage(stages, artefacts, elsewhere.have), artefacts, done)
    if selected[-1] is stages[-1]:
        _show_report(preset, runs.publish(preset, stages, artefacts, elsewhere=elsewhere.have))
    elsewhere.finish()
    return str(selected[-1].recipe.ref)


def _show_stages(preset: str, lineage: Mapping[str, Mapping[str, Any]], store: Store, done: dict[str, str]) -> None:
    rows = [
        {"stage": stage, "this run": done.get(stage, "-"), "artefact": made["ref"], "seconds": made["seconds"]}
        for stage, made in lineage.items()
    ]
    create_table_artifact(rows, key=f"{preset}-stages", description=f"What {preset} has in {store.root}")


def _show_report(preset: str, folder: Path) -> None:
    page = (folder / "report.html").absolute()
    report = read_report(folder / "report.json")
    marks = "; ".join((report.benchmark, *report.marks))
    create_table_artifact(artifacts.score_rows(report), key=f"{preset}-scores", description=marks)
    # browsers open no file that a page of a server links to
    served = os.environ.get("ZS_SEG_REPORTS")
    link = f"{served}/{quote(folder.name)}/{page.name}" if served else page.as_uri()
    where = "Served as long as `make serve` runs" if served else "A file on the worker's machine"
    create_link_artifact(link, f"Report of {preset}", key=f"{preset}-report", description=f"{where}: {page}")
    if shown := artifacts.preview(folder):
        create_markdown_artifact(shown, key=f"{preset}-pictures", description=marks)
    get_run_logger().info("report: %s", link)
