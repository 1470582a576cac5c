"""A resource changes its role on this node, while the daemon goes on.

```
 promote   freeze ─▶ apply what is durable ─▶ superblock: primary, new generation ─▶ serve writers
 hand over drain ─▶ all of it durable at the heir ─▶ freeze ─▶ superblock: secondary ─▶ follow
 superseded (a higher token was heard) ─▶ superblock says so ─▶ no tail: follow; a tail: wait
```
The table of what follows what is `cluster.promotion`. Exports of the old role answer with errors
from the moment of the freeze, so nobody reads an image or writes to a journal that is not theirs.
Deliberately not here: whom to promote, and telling the others (`promotion_calls`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from geomirror.cluster.history import ANCESTOR, DIVERGED, Comparison, compare, history
from geomirror.cluster.promotion import DRAINING, PRIMARY, SECONDARY, SUPERSEDED, next_state
from geomirror.errors import (
    GeomirrorError,
    NotPrimaryError,
    RefusedError,
    WaitTimeoutError,
)
from geomirror.node.context import NodeContext
from geomirror.node.primary_export import HeldWriters
from geomirror.node.replica_runner import ReplicaRunner
from geomirror.node.resource_definition import ResourceDefinition
from geomirror.node.secondary_export import ReaderPins
from geomirror.volume.engine import Engine
from geomirror.volume.superblock import GenerationRecord
from geomirror.wan_protocol.messages import GenerationEntry
from geomirror.wan_protocol.primary import Primary
from geomirror.wan_protocol.secondary import CONSISTENT, Secondary
from geomirror.wan_protocol.sender import FOLD, STREAM
from geomirror.wan_protocol.session import chain_entries, my_history
from geomirror.wan_protocol.sync_policy import parse_policy

POLL_S = 0.02
"""How often a change of role looks at positions that no event announces."""
DRAIN_S_MAX = 10.0
"""Writers are held back no longer for a switchover; then it is given up and they go on."""


class ReplicaRoles:
    """The part of `ReplicaService` that changes sides."""

    definition: ResourceDefinition
    stage: str
    _node: NodeContext
    _engine: Engine
    _core: Primary | Secondary
    _runner: ReplicaRunner
    _held: HeldWriters
    _pins: ReaderPins | None
    _is_changing: bool = False
    """Nothing is exported: a role ends."""
    _links_up: set[str]
    _remembering: asyncio.Task[None] | None = None

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

        :param reason: `promoted` after a hand over, `forced` otherwise.
        :param install: makes the definition of the new generation durable and returns it.
        :raises RefusedError: this copy cannot be promoted; nothing changed.
        :raises StorageError: the superblock has the role that counts; open the resource again.
        """
        core, engine, name = self._core, self._engine, self.definition.name
        if not isinstance(core, Secondary) or self.stage != SECONDARY:
            raise RefusedError(f'"{name}" is {self.stage} at {self._node.name}, not Secondary')
        if core.fenced is not None:
            raise core.fenced
        if core.data_state != CONSISTENT and not engine.can_return:
            raise RefusedError(
                f'the copy of "{name}" at {self._node.name} is {core.data_state}: no image of any '
                "moment",
                hint=f"geomirror status {name}",
            )
        self._enter("promote")
        try:
            await self._freeze()
            if engine.held is not None:
                await self._return()
            identity = self._node.entropy.token_bytes(16)
            wall_ns = self._node.clock.wall_ns()
            generation = engine.next_generation(identity, reason, self._node.name, wall_ns)
            job = engine.promote(generation, self._others())
            await self._execute(job)
            engine.complete_checkpoint(job)
            self.definition = install(generation)
        except GeomirrorError:
            self._enter("failed")
            raise
        self._enter("committed")
        self._begin()
        fields = {"epoch": generation.parent_epoch, "token": generation.token, "reason": reason}
        self._runner.tell("promoted", fields)
        return generation

    async def _return(self) -> None:
        """Go back to the state from before a resync that is under way.

        :raises StorageError: open the resource again, which goes on with it.
        """
        engine = self._engine
        engine.begin_return()
        await self._checkpoint()
        await self._execute(engine.return_job())
        engine.complete_return()
        await self._checkpoint()
        self._runner.tell("returned", {"epoch": engine.applied_epoch})

    async def _checkpoint(self) -> None:
        job = self._engine.checkpoint_job()
        if job is not None:
            await self._execute(job)
            self._engine.complete_checkpoint(job)

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
        def behind() -> list[str]:
            senders = {name: core.senders.get(name) for name in heirs}
            return [
                name
                for name, s in senders.items()
                if s is None
                or not s.is_open
                or s.mode not in (STREAM, FOLD)
                or s.data_state != CONSISTENT
                or s.durable_epoch < epoch
            ]

        try:
            async with asyncio.timeout(timeout_s):
                while core.engine.sealed_epoch < epoch or behind():
                    if core.fenced is not None:
                        raise core.fenced
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise WaitTimeoutError(
                f'"{self.definition.name}" stays at {self._node.name}: {", ".join(behind())} '
                f"has not epoch {epoch} durable after {timeout_s:g} s",
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
        await self._freeze()
        job = self._engine.demote(self._others())
        await self._execute(job)
        self._engine.complete_checkpoint(job)
        self._enter("demoted")
        self._begin()
        self._runner.tell("demoted", {"epoch": self._engine.sealed_epoch})

    # A higher token was heard.

    def hear_token(self, peer: str, chain: list[GenerationEntry]) -> None:
        """A member says that it follows, or is, a primary with this chain."""
        if isinstance(self._core, Primary):
            self._core.supersede(peer, chain)
            self._runner.drive()

    def _look_at_claims(self) -> None:
        """Remember a higher token durably, once."""
        core = self._core
        if not isinstance(core, Primary) or not core.superseded_by or self._remembering is not None:
            return
        known = chain_entries(self._engine.superblock, self._engine.superblock.superseded_by)
        if known != core.superseded_by or self.stage == PRIMARY:
            self._remembering = asyncio.ensure_future(self._remember(core))

    async def _remember(self, core: Primary) -> None:
        try:
            self._enter("higher_token")
            assert core.fenced is not None
            self._held.fail(core.fenced)
            await self._runner.idle()
            job = self._engine.supersede(core.superseded_by)
            if job is not None:
                await self._execute(job)
                self._engine.complete_checkpoint(job)
            if self.comparison().relation == ANCESTOR:
                await self.follow()
        except GeomirrorError as error:
            self._runner.tell("rejoin_failed", {"error": str(error)})
        finally:
            self._remembering = None

    def comparison(self) -> Comparison:
        """How what this superseded primary has relates to the chain that superseded it."""
        superblock = self._engine.superblock
        chain = chain_entries(superblock, superblock.superseded_by)
        last = chain[-1]
        theirs = history(chain, last.parent_epoch, last.parent_hash)
        return compare(my_history(self._engine), theirs)

    @property
    def is_superseded(self) -> bool:
        """A primary that serves nothing, because a higher token exists."""
        return self.stage == SUPERSEDED

    def tail(self) -> dict[str, Any]:
        """What a superseded primary has that the other history has not."""
        superblock, found = self._engine.superblock, self.comparison()
        last = superblock.superseded_by[-1]
        return {
            "relation": found.relation,
            "branch_epoch": None if found.branch is None else found.branch.epoch,
            "own": {
                "node": self._node.name,
                "generation": self._engine.generation.hex(),
                "token": superblock.chain[-1].token,
                "epoch": self._engine.sealed_epoch,
                "has_unsealed": my_history(self._engine).has_unsealed,
            },
            "other": {"node": last.by, "generation": last.identity, "token": last.token},
            "next": f"geomirror resolve {self.definition.name} --keep {last.by}",
        }

    async def follow(self, *, gives_up_tail: bool = False) -> str:
        """Become a secondary of the chain that superseded this primary; its tail becomes a branch.

        :returns: the name of the branch, "" when there was no tail.
        :raises RefusedError: it has a tail and may not give it up, or no common point is known.
        :raises StorageError: open the resource again; that ends what was begun.
        """
        engine, name = self._engine, self.definition.name
        found, branch = self.comparison(), ""
        has_tail = found.relation == DIVERGED and found.branch is not None
        if found.relation != ANCESTOR and not (has_tail and gives_up_tail):
            raise RefusedError(
                f'"{name}" has a tail of its own here ({found.relation})',
                hint=f"geomirror status {name} shows it",
            )
        chain = chain_entries(engine.superblock, engine.superblock.superseded_by)
        self._enter("rejoin")
        try:
            await self._freeze(is_tail_kept=not has_tail)
            if has_tail:
                assert found.branch is not None
                roll_back = partial(
                    engine.roll_back,
                    found.branch.epoch,
                    f"orphan-{engine.generation.hex()[:8]}",
                    wall_ns=self._node.clock.wall_ns(),
                    chain_hash=found.branch.chain_hash,
                )
                loop = asyncio.get_running_loop()
                gone = await loop.run_in_executor(self._node.executor, roll_back)
                branch = gone.branch.name if gone.branch is not None else ""
        except GeomirrorError:
            self._enter("failed")
            raise
        engine.adopt_chain(chain)
        job = engine.demote(self._others())
        await self._execute(job)
        engine.complete_checkpoint(job)
        self._enter("rejoined")
        self._begin()
        fields = {"epoch": engine.sealed_epoch, "by": chain[-1].by, "branch": branch}
        self._runner.tell("rejoined", fields)
        return branch

    # How a role ends.

    async def _freeze(self, *, is_tail_kept: bool = True) -> None:
        """Stop everything that the core does and bring what is durable into the images, unless it
        is about to be rolled back."""
        core, engine = self._core, self._engine
        self._is_changing = True
        if self._pins is not None:
            self._pins.retire()
        core.freeze()
        if isinstance(core, Secondary):
            core.close_session()
        await self._runner.idle()
        await self._runner.stop()
        while is_tail_kept:
            if engine.committed_epoch > engine.sealed_epoch:
                sync = engine.sync_job()
                await self._execute(sync)
                engine.complete_sync(sync)
            checkpoint = engine.checkpoint_job()
            if checkpoint is not None:
                await self._execute(checkpoint)
                engine.complete_checkpoint(checkpoint)
            target = engine.half_applied_through or engine.pass_end(engine.sealed_epoch)
            if target <= engine.applied_epoch:
                return
            apply = engine.apply_job(target)
            await self._execute(apply)
            engine.complete_apply(apply)

    async def _execute(self, job: Any) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._node.executor, job.run)
