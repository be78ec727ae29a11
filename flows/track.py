"""The hook that sends a finished run to a tracker: its configuration, training curves, scores and pictures. MLflow's
own settings say where to (MLFLOW_TRACKING_URI); without them it is the folder ./mlruns, which needs no server."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.history import flat_fields, scores_of
from pipeline.line import Config
from storage.errors import UserError
from storage.keys import Ref
from storage.lineage import Lineage
from storage.store import Store

TRACKERS = ("mlflow",)
PICTURES = ("report.html", "report.json", "per_class.csv", "preview.jpg")
LONG = 500  # characters of a value that every server of MLflow's takes
TAG = "zs-seg.report"
TRAINED = ("v2c", "g2s", "cpa")
log = logging.getLogger(__name__)


def require(tracker: str) -> None:
    """Raises UserError, before anything is built, for an unknown tracker or one that is not installed."""
    if tracker not in TRACKERS:
        raise UserError(f"tracker {tracker!r} is unknown; use one of {', '.join(TRACKERS)}")
    try:
        importlib.import_module(tracker)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed; the extra `track` brings it: `pip install --editable '.[track]'` in the folder of zs-seg"
        ) from error


def track(name: str, config: Config, refs: Mapping[str, Ref], store: Store, folder: Path) -> None:
    """Send a run to MLflow, unless it has a run of this name and report already.

    Args:
        name: of the run; the experiment is the preset's.
        config: all fields become parameters, values of more than `LONG` characters cut off.
        refs: stage -> artefact; become tags. Curves are metrics such as v2c.total by step, scores such as
            transductive.hPQ in percent.
        store: holds the artefacts; of a training that is not there a warning is logged.
        folder: the published report.
    """
    mlflow: Any = importlib.import_module("mlflow")
    from pipeline.training.curves import read_curves

    if not os.environ.get("MLFLOW_TRACKING_URI"):
        # MLflow asks for this word where it keeps runs in plain files
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        mlflow.set_tracking_uri(Path("mlruns").absolute().as_uri())
    experiment = mlflow.set_experiment(config.preset)
    report, client = refs["evaluate"], mlflow.MlflowClient()
    known = client.search_runs(
        [experiment.experiment_id], f"tags.`{TAG}` = '{report}' and attributes.run_name = '{name}'"
    )
    if known:
        log.info("tracker: run %s of %s is there already", known[0].info.run_id, name)
        return
    nodes = Lineage(store)
    scores = {f"{row}.{s}": value for row, part in scores_of(nodes.node(report)).items() for s, value in part.items()}
    with mlflow.start_run(
        run_name=name, tags={TAG: str(report), **{f"zs-seg.{stage}": str(ref) for stage, ref in refs.items()}}
    ) as run:
        fields = {field: str(value)[:LONG] for field, value in flat_fields(config).items()}
        for start in range(0, len(fields), 100):  # as many as a server takes at a time
            mlflow.log_params(dict(list(fields.items())[start : start + 100]))
        for stage, ref in refs.items():
            if stage in TRAINED and store.state(ref) != "fresh":
                log.warning("tracker: no curves of %s, as %s is not in this store", stage, ref)
            elif stage in TRAINED:
                points = [
                    mlflow.entities.Metric(f"{stage}.{key}", value, 0, int(row["step"]))
                    for row in read_curves(store.path(ref))
                    for key, value in row.items()
                    if key != "step"
                ]
                for start in range(0, len(points), 1000):
                    client.log_batch(run.info.run_id, metrics=points[start : start + 1000])
        mlflow.log_metrics(scores)
        for file in PICTURES:
            if (folder / file).exists():
                mlflow.log_artifact(str(folder / file))
        log.info("tracker: run %s of %s in %s", run.info.run_id, name, mlflow.get_tracking_uri())
