"""What a run finds in a remote before it builds, and leaves there after it."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from flows.remote_commands import fetch, send
from flows.runs import Outcome
from pipeline.line import Stage
from pipeline.runtime import torchrun_rank
from storage import through, transfer
from storage.errors import UserError, counted
from storage.keys import Ref
from storage.remote import Remote, Remotes
from storage.store import Manifest, Store

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Elsewhere:
    """The remote of a run, None = there is none. `cache`: bytes through which the tars of shards are read, 0 = they are
    fetched. `have`: what of the line is complete there and not in the store."""

    store: Store
    remote: Remote | None = None
    push: bool = False
    cache: int = 0
    have: dict[Ref, Manifest] = field(default_factory=dict)
    unsent: dict[Ref, str] = field(default_factory=dict)

    @classmethod
    def look(cls, store: Store, stages: Sequence[Stage], *, remote: str, push: bool, cache: int = 0) -> Elsewhere:
        """One request for each stage that the store lacks. Raises UserError where the remote cannot be reached."""
        if cache and not remote:
            raise UserError("--cache is for what a remote has; name it with --remote")
        if not (remote or push):
            return cls(store=store)
        there = Remotes(store).open(remote)
        there.require(make=push)
        if not remote:
            return cls(store=store, remote=there, push=push)
        found, _ = transfer.missing(store, there, [stage.recipe.ref for stage in stages])
        return cls(
            store=store, remote=there, push=push, cache=cache, have={manifest.ref: manifest for manifest in found}
        )

    def needed(self, selected: Sequence[Stage], again: Sequence[Stage] = ()) -> list[Manifest]:
        """Of `have` what a run fetches: what its last stage makes, and what the stages that it builds read."""
        if not self.have:
            return []
        wanted = {selected[-1].recipe.ref} if selected[-1] not in again else set()
        for stage in selected:
            ref = stage.recipe.ref
            if stage in again or (self.store.state(ref) != "fresh" and ref not in self.have):
                wanted |= set(stage.recipe.inputs.values()) - {other.recipe.ref for other in again}
        return [manifest for ref, manifest in self.have.items() if ref in wanted]

    def fetch(self, manifests: Collection[Manifest]) -> None:
        """Bring these into the store. Raises UserError for one that is damaged there."""
        if self.remote and manifests:
            log.info("%s of %s from %s", counted(len(manifests), "artefact"), size_of(manifests), self.remote)
            left = [manifest for manifest in manifests if self.cache and manifest.kind == "shards"]
            for manifest in left:
                through.leave(self.store, self.remote, manifest, size=self.cache)
            due = [manifest for manifest in manifests if manifest not in left]
            fetch(self.store, self.remote, due, progress=not torchrun_rank())

    def outcome(self, stage: Stage, again: Sequence[Stage]) -> Outcome | None:
        """Of a stage that is not to be built, as the remote has it; None for any other."""
        manifest = self.have.get(stage.recipe.ref)
        if manifest is None or stage in again:
            return None
        where = "from" if self.store.state(manifest.ref) == "fresh" else "left in"
        return Outcome(
            stage=stage.name, ref=manifest.ref, built=False, seconds=0, note=f"{where} {self.remote}{_by(manifest)}"
        )

    def note(self, name: str) -> None:
        """With `push`, record the run there before anything is sent."""
        if self.remote and self.push:
            transfer.push_run(self.store, self.remote, name)

    def leave(self, ref: Ref) -> None:
        """With `push`, send what is complete here and not there. What is there with other bytes is logged and stays. A
        failure is logged, and raised by `finish`."""
        if not (self.remote and self.push) or self.store.state(ref) != "fresh":
            return
        try:
            found = transfer.compare(self.store, self.remote, [ref])
            if found.other:
                log.warning("%s is in %s with other bytes of the same key; left out", ref, self.remote)
            send(self.store, self.remote, found.here)
        except UserError as error:
            log.warning("%s was not sent: %s", ref, error)
            self.unsent[ref] = str(error)

    def finish(self) -> None:
        """Raises UserError where something was not sent."""
        if self.unsent:
            ref, reason = next(iter(self.unsent.items()))
            number = counted(len(self.unsent), "artefact")
            raise UserError(f"the run is complete here, but {number} did not reach {self.remote} ({ref}: {reason})")


def size_of(manifests: Collection[Manifest]) -> str:
    """Such as "1.3 GB"."""
    from flows.tables import size

    return size(sum(manifest.bytes for manifest in manifests))


def _by(manifest: Manifest) -> str:
    """Who built it, as far as its provenance has that."""
    user, host = manifest.provenance.get("user"), manifest.provenance.get("host")
    return f", built by {user} on {host}" if user and host else ""
