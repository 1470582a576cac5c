"""A resource changes its role on this node, while the daemon goes on.

```
 promote   freeze ─▶ superblock: primary, new generation ─▶ serve writers; apply, or go back, behind
 hand over drain ─▶ all of it durable at the heir ─▶ freeze ─▶ superblock: secondary ─▶ follow
```
The table of what follows what is `cluster.promotion`. Exports of the old role answer with errors
from the moment of the freeze, so nobody reads an image or writes to a journal that is not theirs.
Deliberately not here: whom to promote, and telling the others (`promotion_calls`); what a member
does that hears of a higher token (`replica_return`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from geomirror.cluster.promotion import (
    DIVERGED,
    DRAINING,
    PRIMARY,
    SECONDARY,
    SUPERSEDED,
    next_state,
)
from geomirror.errors import (
    GeomirrorError,
    NotPrimaryError,
    RefusedError,
    WaitTimeoutError,
)
from geomirror.limits import MIB
from geomirror.node.primary_export import HeldWriters
from geomirror.node.resource_definition import ResourceDefinition
from geomirror.node.role_steps import RoleSteps
from geomirror.volume.superblock import GenerationRecord
from geomirror.wan_protocol.primary import Primary
from geomirror.wan_protocol.role_change import demotion, lacking, promotion
from geomirror.wan_protocol.secondary import CONSISTENT, Secondary
from geomirror.wan_protocol.sync_policy import parse_policy
from geomirror.wan_protocol.verify_schedule import parse_schedule

POLL_S = 0.02
"""How often a change of role looks at positions that no event announces."""
DRAIN_S_MAX = 10.0
"""Writers are held back no longer for a switchover; then it is given up and they go on."""


class ReplicaRoles(RoleSteps):
    """The part of `ReplicaService` that changes sides."""

    definition: ResourceDefinition
    stage: str
    _held: HeldWriters
    _links_up: set[str]
    _remembering: asyncio.Task[None] | None = None
    on_outranked: Callable[[], None]
    """Called when there is a tail and a higher token; the node may let it come back."""

    def _begin(self) -> None:
        """Serve in the role that the superblock has."""
        raise NotImplementedError

    def _enter(self, event: str) -> None:
        self.stage = next_state(self.stage, event)

    def _others(self) -> list[str]:
        return self.definition.peers_of(self._node.name)

    @property
    def primary_token(self) -> int | None:
        """Fencing token of the generation that may be written here; None at anybody else."""
        superblock = self._engine.superblock
        is_writer = superblock.role == "primary" and not superblock.superseded_by
        return superblock.chain[-1].token if is_writer else None

    def set_definition(self, definition: ResourceDefinition, *, is_forced: bool = False) -> None:
        """Take over changed members and settings; see `InSyncSet.set_policy` for `is_forced`.

        Who is the primary does not follow from it, but from the generation chain.
        """
        core, now_ns = self._core, self._runner.now_ns()
        self.definition = definition
        self.verifies.schedule = parse_schedule(definition.settings)
        if self.stage in (DIVERGED, SUPERSEDED):
            self.on_outranked()  # The settings may let it come back by itself now.
        if isinstance(core, Secondary):
            core.members = self._others()
        elif definition.primary == self._node.name:
            wanted = set(definition.secondaries)
            for name in [n for n in core.senders if n not in wanted]:
                core.remove_peer(name)
            for name in sorted(wanted - set(core.senders)):
                core.add_peer(name)
                if name in self._links_up:
                    core.link_up(name, now_ns)
            policy = parse_policy(definition.settings, definition.secondaries)
            core.set_policy(policy, now_ns, is_forced=is_forced)
        self._runner.drive()

    # Secondary to primary.

    async def promote(
        self, reason: str, install: Callable[[GenerationRecord], ResourceDefinition]
    ) -> GenerationRecord:
        """Become the primary at the durable epoch; writers are served when this returns.

        Also of a member that was outranked: its history goes on with a token above the other one.

        :param reason: `promoted` after a hand over, `forced` otherwise.
        :param install: makes the definition of the new generation durable and returns it.
        :raises RefusedError: this copy cannot be promoted; nothing changed.
        :raises IntegrityError: undo of the state that a resync holds is damaged; nothing changed.
        :raises StorageError: the superblock has the role that counts; open the resource again.
        """
        self._check_promotable()
        engine = self._engine
        if engine.held is not None and not engine.has_all_of_resync:
            # Before anything stops: what turns out to be damaged must not be half restored.
            await self._call(engine.check_held)
            self._check_promotable()  # A moment has passed.
        self._enter("promote")
        try:
            # What a copy is in the middle of is gone on with behind the writers.
            await self._stop_core(is_urgent=isinstance(self._core, Secondary))
            identity = self._node.entropy.token_bytes(16)
            wall_ns, here = self._node.clock.wall_ns(), self._node.name
            steps = promotion(engine, identity, reason, here, wall_ns, self._others())
            generation = await self._take(steps)
            self.definition = install(generation)
        except GeomirrorError:
            self._enter("failed")
            if self.stage == SECONDARY and engine.superblock.superseded_by:
                self._enter("higher_token")
            raise
        self._enter("committed")
        self._begin()
        fields = {"epoch": generation.parent_epoch, "token": generation.token, "reason": reason}
        self._runner.tell("promoted", fields)
        return generation

    def _check_promotable(self) -> None:
        """:raises RefusedError, FencedError: this copy cannot be promoted now."""
        core, engine, name = self._core, self._engine, self.definition.name
        if self.stage not in (SECONDARY, DIVERGED, SUPERSEDED) or self._remembering is not None:
            raise RefusedError(f'"{name}" is {self.stage} at {self._node.name}, not Secondary')
        if core.fenced is not None and self.stage != SUPERSEDED:
            raise core.fenced
        data_state = engine.superblock.data_state
        is_whole = data_state == CONSISTENT or engine.has_all_of_resync or engine.can_return
        if not is_whole:
            engine.check_return()
            raise RefusedError(
                f'the copy of "{name}" at {self._node.name} is {data_state}: no image of any '
                "moment",
                hint=f"geomirror status {name}",
            )

    # Primary to secondary.

    async def hand_over(self, heirs: list[str], timeout_s: float) -> dict[str, Any]:
        """Stop accepting writes once every heir has everything, and become a secondary.

        Writers go on until the heirs have nearly caught up; they wait while the rest is sent.

        :returns: the position that the heirs have.
        :raises WaitTimeoutError: some heir does not catch up; writers go on as before.
        """
        core, engine = self._core, self._engine
        if not isinstance(core, Primary) or self.stage != PRIMARY:
            name = self.definition.name
            raise NotPrimaryError(f'"{name}" is {self.stage} at {self._node.name}, not Primary')
        if core.fenced is not None:
            raise core.fenced
        if engine.is_returning:
            # It would be nobody's for as long as that takes.
            raise RefusedError(
                f'"{self.definition.name}" is still going back to epoch {engine.applied_epoch} at '
                f"{self._node.name}, {engine.bytes_to_return // MIB} MiB are left",
                hint=f"geomirror status {self.definition.name} shows it; try again then",
            )
        self._enter("drain")
        is_drained = False
        try:
            core.seal_now(self._runner.now_ns())
            self._runner.drive()
            await self._reached(core, heirs, core.target_epoch, timeout_s)
            core.drain(self._runner.now_ns())
            self._runner.drive()
            await self._reached(core, heirs, core.target_epoch, DRAIN_S_MAX)
            is_drained = True
        finally:
            if not is_drained and self.stage == DRAINING:
                self._enter("cancelled")
                core.undrain(self._runner.now_ns())
                self._runner.drive()
        position = {
            "generation": engine.generation.hex(),
            "epoch": engine.sealed_epoch,
            "chain_hash": engine.sealed_hash.hex(),
        }
        await self._demote(core)
        return position

    async def _reached(self, core: Primary, heirs: list[str], epoch: int, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while core.engine.sealed_epoch < epoch or lacking(core, heirs, epoch):
                    if core.fenced is not None:
                        raise core.fenced
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise WaitTimeoutError(
                f'"{self.definition.name}" stays at {self._node.name}: '
                f"{', '.join(lacking(core, heirs, epoch))} has not epoch {epoch} durable after "
                f"{timeout_s:g} s",
                hint=f"nothing was lost; see geomirror status {self.definition.name}",
            ) from None

    async def _demote(self, core: Primary) -> None:
        """Become a secondary; everything is sealed. Writers are told from here on."""
        name, here = self.definition.name, self._node.name
        error = NotPrimaryError(
            f'"{name}" is a secondary at {here} now', hint=f"geomirror status {name}"
        )
        core.retire(error)
        self._runner.drive()
        self._held.fail(error)
        await self._stop_core()
        await self._take(demotion(self._engine, self._others()))
        self._enter("demoted")
        self._begin()
        self._runner.tell("demoted", {"epoch": self._engine.sealed_epoch})
