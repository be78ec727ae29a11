"""The Prefect flow `zs-seg`: one task a stage. The store decides what is built; Prefect starts, watches and records."""

from __future__ import annotations

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE

from flows import stages
from flows.stages import Request
from pipeline.line import STAGES, Step, line
from pipeline.runtime import Runtime
from storage.keys import Ref


def _build(step: Step, inputs: dict[str, Ref], request: Request, runtime: Runtime) -> Ref:
    """Build one stage from its cached inputs; a complete artefact is left as it is."""
    assert inputs == dict(step.recipe.inputs)
    outcome = stages.build(step, request.open_store(), runtime)
    get_run_logger().info(str(outcome))
    return outcome.ref


# Prefect's own cache does not look whether the artefact is still there: off. The store finds a complete one by its key.
TASKS = {stage: task(name=stage, task_run_name=stage, cache_policy=NO_CACHE)(_build) for stage in STAGES}


@flow(name="zs-seg", flow_run_name="{preset}")
def zs_seg(
    preset: str = "demo",
    from_stage: str = "",
    until_stage: str = "",
    store: str = "",
    coco: str = "",
    overrides: list[str] | None = None,
    device: str = "auto",
    devices: int = 1,
    dask: str = "local",
) -> str:
    """Images to report, stage by stage; only what is missing is built.

    Args:
        preset: The run's configuration, see flows/presets.py.
        from_stage: Begin there, from cached inputs; empty = the first stage.
        until_stage: End there; empty = the last stage, which makes the report in runs/<preset>/.
        store: Folder of the artefacts; empty = ZS_SEG_STORE of the worker, else ./artifacts.
        coco: Folder of real images in COCO's layout; empty = COCO_ROOT of the worker.
        overrides: Flags that change single fields, as on the command line, e.g. ["--v2c.lr", "2e-4"].
        device: Where to compute: auto, cpu, cuda, cuda:1, ...
        devices: GPUs (on a CPU: processes) of stage v2c.
        dask: Workers of cache-clip: local, local:N, none, tcp://HOST:PORT, or a scheduler file.

    Returns:
        The last artefact as "kind/key".
    """
    runtime = Runtime(device=device, devices=devices, dask=dask)
    request = Request(preset=preset, coco=coco, store=store, overrides=tuple(overrides or ()))
    steps, artefacts = line(stages.configure(request)), request.open_store()
    selected = stages.select(steps, first=from_stage, last=until_stage)
    stages.require_inputs(request, artefacts, steps, selected)
    built: dict[Ref, Ref] = {}  # what earlier tasks returned: Prefect draws its graph from these very objects
    for step in selected:
        inputs = {name: built.get(ref, ref) for name, ref in step.recipe.inputs.items()}
        built[step.recipe.ref] = TASKS[step.stage](step, inputs, request, runtime)
    if selected[-1] is steps[-1]:
        folder = stages.publish(preset, steps, artefacts)
        get_run_logger().info("report: %s", folder / "report.html")
    return str(selected[-1].recipe.ref)
