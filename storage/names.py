"""What a user may write for an artefact or a run.

The rule: the beginning of a key, or of "kind/key", is the one complete artefact that it fits. The name of a run is its
last line of stages; where one artefact is wanted, that of the line's last stage (of `kind`, if one is asked for), so
the report, or the checkpoint of stage 3. NAME:STAGE is the artefact of another stage. A name that is also the beginning
of a key is refused.
"""

from __future__ import annotations

from storage.errors import UserError, did_you_mean
from storage.keys import Ref
from storage.runs import RunRecord, Runs
from storage.store import Store


def named(store: Store, text: str) -> Ref | RunRecord:
    """The complete artefact, or the run, that `text` is for.

    Raises UserError for none, for several, and for a run's stage that is not complete.
    """
    runs, (name, colon, stage) = Runs(store), text.partition(":")
    if name not in (names := runs.names()):
        _require_some(store, text, names)
        return store.find(text)
    run = runs.lines(name)[-1]
    if colon:
        return artefact_of(store, run, stage)
    if keys := [ref for ref in store.refs() if ref.key.startswith(name)]:
        choices = ", ".join(map(str, keys[:4]))
        last = list(run.refs)[-1]
        raise UserError(f"{name!r} is a run and the beginning of {choices}; write {name}:{last}, or kind/key")
    return run


def find(store: Store, text: str, *, kind: str = "") -> Ref:
    """The one complete artefact that `text` is for; of a run the last stage's, or the last of that kind.

    Raises UserError as `named`, and where the run has none of that kind.
    """
    found = named(store, text)
    if isinstance(found, Ref):
        return found
    stages = [stage for stage, ref in found.refs.items() if kind in ("", ref.kind)]
    if not stages:
        raise UserError(f"run {found.name} has no {kind}; its stages are {', '.join(found.refs)}")
    return artefact_of(store, found, stages[-1])


def artefact_of(store: Store, run: RunRecord, stage: str) -> Ref:
    """The complete artefact of one of the run's stages. Raises UserError where there is none."""
    if stage not in run.refs:
        close = did_you_mean(stage, run.refs)
        raise UserError(f"run {run.name} has no stage {stage!r}{close}; its stages are {', '.join(run.refs)}")
    ref = run.refs[stage]
    if (state := store.state(ref)) != "fresh":
        there = [f"{run.name}:{name}" for name, other in run.refs.items() if store.state(other) == "fresh"]
        instead = f", or write {', '.join(there)}" if there else ""
        raise UserError(f"{stage} of run {run.name} ({ref}) is {state} in {store.root}; run it{instead}")
    return ref


def _require_some(store: Store, text: str, names: list[str]) -> None:
    """Raises UserError, with the name of a run that is close, where `text` begins no key."""
    if not any(one.startswith(text) for ref in store.refs() for one in (ref.key, str(ref))):
        close = did_you_mean(text.partition(":")[0], names)
        raise UserError(f"no artefact and no run {text!r} in {store.root}{close}; `zs-seg list` shows what is there")
