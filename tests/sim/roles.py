"""A simulated node changes its role: what `node.replica_roles` does, with jobs that take a while.

What follows what is the product's table (`cluster.promotion`), the steps are the product's
(`wan_protocol.role_change`); here jobs are waited for, and positions to be reached. A crash comes
between two jobs or within one; what the role is then is the disk's to say.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from geomirror.cluster.history import ANCESTOR, EQUAL
from geomirror.cluster.promotion import (
    DIVERGED,
    DRAINING,
    PRIMARY,
    SECONDARY,
    SUPERSEDED,
    is_legal,
    next_state,
)
from geomirror.errors import GeomirrorError, NotPrimaryError, StorageError
from geomirror.volume.superblock import GenerationRecord
from geomirror.wan_protocol.decisions import Job
from geomirror.wan_protocol.primary import Primary
from geomirror.wan_protocol.role_change import (
    Change,
    Steps,
    check_following,
    claim,
    compare_with_claim,
    counts_with_resync,
    demotion,
    following,
    lacking,
    promotion,
)
from geomirror.wan_protocol.secondary import CONSISTENT, Secondary
from geomirror.wan_protocol.session import chain_entries, claim_history
from tests.sim.world import MS, SECOND

if TYPE_CHECKING:
    from tests.sim.node import SimNode

IDLE_NS = 5 * MS
POLL_NS = 50 * MS
CATCH_UP_NS = 20 * SECOND
DRAIN_NS = 10 * SECOND
"""How long a switchover lets the heirs catch up, and holds writers back."""

Position = tuple[bytes, int]
"""Generation and epoch."""
Failed = Callable[[GeomirrorError], None]


class Roles:
    """The changes of one node."""

    def __init__(self, node: SimNode) -> None:
        self.node = node
        self.stage = SECONDARY
        self.promotions = 0
        self._is_remembering = False
        self._outranked_by: list[GenerationRecord] | None = None

    def begin(self, role: str) -> None:
        """The resource is opened; its superblock has this role."""
        self.stage = PRIMARY if role == "primary" else SECONDARY
        self._is_remembering = False
        self._outranked_by = None

    @property
    def is_writer(self) -> bool:
        """Its superblock says primary, and it has not heard of a higher claim."""
        core = self.node.core
        return isinstance(core, Primary) and not core.superseded_by

    @property
    def is_outranked(self) -> bool:
        """It has a tail that a history with a higher claim lacks, and accepts nothing."""
        return self.stage in (SUPERSEDED, DIVERGED) and not self._is_remembering

    # Secondary to primary.

    def may_promote(self) -> bool:
        """Whether this copy can become the primary now."""
        core, engine = self.node.core, self.node.engine
        is_whole = engine.superblock.data_state == CONSISTENT or engine.can_return
        is_whole = is_whole or engine.has_all_of_resync
        is_free = self.stage in (SECONDARY, DIVERGED, SUPERSEDED) and not self._is_remembering
        is_well = self.stage == SUPERSEDED or (core.fenced is None and not core.is_frozen)
        # One that has not heard of its primary yet is a part of no history.
        is_placed = bool(engine.superblock.chain)
        return is_free and is_well and is_whole and is_placed

    def promote(self, reason: str) -> None:
        """Become the primary at the durable epoch."""
        node = self.node
        self._enter("promote")
        node.world.note(f"{node.name}: promotion ({reason})")

        def steps() -> Steps[Any]:
            identity, wall_ns = node.entropy.token_bytes(16), node.wall_ns()
            return promotion(node.engine, identity, reason, node.name, wall_ns, node.others)

        def done(_: Any) -> None:
            self._enter("committed")
            self.promotions += 1
            node.world.note(f"{node.name}: primary from epoch {node.engine.sealed_epoch} on")
            node.serve()

        def failed(error: GeomirrorError) -> None:
            self._enter("failed")
            self._reopen()

        self._freeze(lambda: self._run(steps(), done, failed), is_urgent=True)

    # Primary to secondary.

    def hand_over(
        self, heirs: list[str], done: Callable[[Position], None], failed: Callable[[], None]
    ) -> None:
        """Stop accepting writes once every heir has everything, and become a secondary."""
        node, core = self.node, self.node.core
        assert isinstance(core, Primary)
        life = node.life
        self._enter("drain")

        def cancelled() -> None:
            node.world.note(f"{node.name}: not handed over")
            if node.life == life and self.stage == DRAINING:
                self._enter("cancelled")
                node.call(lambda: core.undrain(node.now_ns()))
            failed()

        def caught_up() -> None:
            node.call(lambda: core.drain(node.now_ns()))
            self._reach(core, heirs, DRAIN_NS, demote, cancelled)

        def demote() -> None:
            position = (node.engine.generation, node.engine.sealed_epoch)
            error = NotPrimaryError(f"{node.name} is a secondary now")
            node.call(lambda: core.retire(error))
            node.setup.on_room(node)

            def demoted(_: Any) -> None:
                self._enter("demoted")
                node.serve()
                done(position)

            def reopen(_: GeomirrorError) -> None:
                self._reopen()
                failed()

            self._freeze(lambda: self._run(demotion(node.engine, node.others), demoted, reopen))

        node.call(lambda: core.seal_now(node.now_ns()))
        self._reach(core, heirs, CATCH_UP_NS, caught_up, cancelled)

    def _reach(
        self,
        core: Primary,
        heirs: list[str],
        timeout_ns: int,
        done: Callable[[], None],
        failed: Callable[[], None],
    ) -> None:
        node, life, epoch = self.node, self.node.life, core.target_epoch
        until_ns = node.world.now_ns + timeout_ns

        def look() -> None:
            if node.life != life or core.fenced is not None or node.world.now_ns > until_ns:
                failed()
            elif node.engine.sealed_epoch >= epoch and not lacking(core, heirs, epoch):
                done()
            else:
                node.world.after(POLL_NS, look)

        look()

    # A higher token was heard.

    def look(self) -> None:
        """A higher claim was heard of, or a member that was outranked is not any more."""
        core, superblock = self.node.core, self.node.engine.superblock
        if self._is_remembering:
            return
        if isinstance(core, Primary):
            if core.superseded_by and is_legal(self.stage, "higher_token"):
                known = chain_entries(superblock, superblock.superseded_by)
                if known != core.superseded_by or self.stage == PRIMARY:
                    self._remember(core)
        elif self.stage == DIVERGED and not superblock.superseded_by:
            self._enter("follow")
            self._outranked_by = None
        elif self.stage in (SECONDARY, DIVERGED) and superblock.superseded_by not in (
            [],
            self._outranked_by,
        ):
            # The core writes it down with its next checkpoint.
            self._enter("higher_token")
            self._settle_claim()

    def _remember(self, core: Primary) -> None:
        """Durably, once."""
        engine = self.node.engine
        self._is_remembering = True
        self._enter("higher_token")
        self.node.setup.on_room(self.node)

        def remembered(_: Any) -> None:
            self._is_remembering = False
            self.node.setup.placing.acted(self.node, engine.superblock.superseded_by)
            self._settle_claim()

        def failed(_: GeomirrorError) -> None:
            self._is_remembering = False

        chain, starts = core.superseded_by, core.superseded_starts
        self._wait_idle(lambda: self._run(claim(engine, chain, starts), remembered, failed))

    def _settle_claim(self) -> None:
        engine = self.node.engine
        self._outranked_by = list(engine.superblock.superseded_by)
        if compare_with_claim(engine).relation in (ANCESTOR, EQUAL):
            self.follow(gives_up_tail=False)
        else:
            self.node.setup.on_outranked(self.node)

    def follow(self, *, gives_up_tail: bool) -> None:
        """Follow the chain that outranks this member; its tail becomes a branch.

        :raises RefusedError: it has a tail and may not give it up, or no common point is known.
        """
        node = self.node
        check_following(node.engine, gives_up_tail=gives_up_tail)
        self._enter("rejoin")
        held, theirs = node.engine.held, claim_history(node.engine.superblock)
        if held is not None and not counts_with_resync(node.engine, theirs):
            # What it has beyond the state that it holds is given up with that resync.
            mirror = node.setup.placing.mirror(node)
            mirror.durable_epoch = min(mirror.durable_epoch, held.epoch)

        def steps() -> Steps[Any]:
            return following(node.engine, node.others, node.wall_ns(), gives_up_tail=gives_up_tail)

        def done(branch: Any) -> None:
            self._enter("rejoined")
            self._outranked_by = None
            name = branch.name if branch is not None else "none"
            node.setup.on_followed(node)
            node.world.note(f"{node.name}: follows from {node.engine.sealed_epoch}, branch {name}")
            node.serve()

        def failed(error: GeomirrorError) -> None:
            self._enter("failed")
            node.setup.on_not_followed(node, error)
            if node.engine.must_reopen or isinstance(error, StorageError):
                self._reopen()
            else:
                node.serve()

        self._freeze(lambda: self._run(steps(), done, failed))

    # How a role ends.

    def _enter(self, event: str) -> None:
        self.stage = next_state(self.stage, event)

    def _freeze(self, then: Callable[[], None], *, is_urgent: bool = False) -> None:
        core = self.node.core

        def freeze() -> None:
            core.freeze()
            if isinstance(core, Secondary):
                if is_urgent:
                    core.hurry()
                core.close_session()

        self.node.call(freeze)
        self._wait_idle(then)

    def _wait_idle(self, then: Callable[[], None]) -> None:
        node, life = self.node, self.node.life

        def look() -> None:
            if node.life != life or not node.is_alive:
                return
            if node.core.is_idle and not node.readings:
                then()
            else:
                node.world.after(IDLE_NS, look)

        look()

    def _run(self, steps: Steps[Any], done: Callable[[Any], None], failed: Failed) -> None:
        self._go_on(Change(steps), self.node.life, done, failed, None)

    def _go_on(
        self,
        change: Change[Any],
        life: int,
        done: Callable[[Any], None],
        failed: Failed,
        error: GeomirrorError | None,
    ) -> None:
        """Ask for the next job, and run it in a while."""
        node = self.node
        if node.life != life or not node.is_alive:
            return
        job: Job | None = None

        def ask() -> None:
            nonlocal job
            job = change.next_job(error)

        def run() -> None:
            if node.life != life:
                return
            assert job is not None
            node.setup.on_step(node)
            failure = node.run_blocking(job.run)
            if node.life == life:
                go_on = partial(self._go_on, change, life, done, failed, failure)
                node.world.at(end_ns, go_on)

        refusal = node.run_blocking(ask)
        if node.life != life:
            return
        if refusal is not None:
            node.world.note(f"{node.name}: the change of its role ends: {refusal}")
            failed(refusal)
        elif job is None:
            done(change.result)
        else:
            node.setup.placing.begin_generation(node)
            at_ns, end_ns = node.job_times("role")
            node.world.at(at_ns, run)

    def _reopen(self) -> None:
        """The superblock has the role that counts: read it."""
        self.node.setup.on_reopen(self.node)
