"""One resource on this node: its storage engine, its core, and its NBD exports."""

from __future__ import annotations

import asyncio
from typing import Any

from geomirror.cluster.promotion import DURABLE_ROLE, accepts_writes, state_of
from geomirror.cluster.verdict import MemberAnswer
from geomirror.errors import GeomirrorError, UsageError
from geomirror.nbd.protocol import Export
from geomirror.node.branch_desk import BranchDesk
from geomirror.node.context import NodeContext
from geomirror.node.full_disk import FullDisk
from geomirror.node.grower import Grower
from geomirror.node.history_report import history_object
from geomirror.node.mark_desk import MarkDesk
from geomirror.node.primary_export import FlushToken, HeldWriters
from geomirror.node.replica_exports import ReplicaExports
from geomirror.node.replica_return import ReplicaReturn
from geomirror.node.replica_roles import POLL_S
from geomirror.node.replica_runner import ReplicaRunner
from geomirror.node.replica_shipping import ReplicaShipping
from geomirror.node.replica_status import PrimaryStatus, SecondaryStatus, behind_object
from geomirror.node.replica_storage import create_engine, open_engine
from geomirror.node.resource_definition import ResourceDefinition
from geomirror.node.rewind_plan import RewindPlan
from geomirror.node.secondary_export import ReaderPins
from geomirror.node.sync_status import sync_object
from geomirror.node.verify_desk import VerifyDesk
from geomirror.node.view_host import ViewHost
from geomirror.volume.engine import Engine
from geomirror.volume.store_io import DirectoryStore
from geomirror.volume.superblock import VolumeRecord
from geomirror.volume.volume_change import VolumeChange
from geomirror.wan_protocol.member_answer import answer_of
from geomirror.wan_protocol.messages import AnyMessage
from geomirror.wan_protocol.primary import Primary
from geomirror.wan_protocol.secondary import Secondary
from geomirror.wan_protocol.sync_policy import parse_policy
from geomirror.wan_protocol.verify_schedule import parse_schedule

STOP_S_MAX = 8.0
"""An orderly stop that takes longer leaves the rest to recovery."""
TICK_S = 1.0
SETTLE_S_MAX = 1.0
"""How long an answer about this copy waits for a sync that is under way."""


class ReplicaService(ReplicaReturn, ReplicaShipping):
    """Implements `node.service.Service` over a `Primary` or a `Secondary`."""

    def __init__(
        self,
        definition: ResourceDefinition,
        node: NodeContext,
        engine: Engine,
        store: DirectoryStore,
    ) -> None:
        self.definition = definition
        self._node = node
        self._engine = engine
        self._store = store
        self._core: Primary | Secondary
        self._runner: ReplicaRunner
        self.marks: MarkDesk
        self.verifies: VerifyDesk
        self._status: PrimaryStatus | SecondaryStatus
        self._held = HeldWriters()
        self._full_disk = FullDisk(node.limits.full_disk_wait_ns_max)
        self._pins: ReaderPins | None = None
        self.views = ViewHost(definition.name, engine, store, node)
        self.branches = BranchDesk(definition.name, engine, self.views, node)
        self._replica_exports: ReplicaExports
        self._grower: Grower | None = None
        self._ticker: asyncio.Task[None] | None = None
        self._links_up: set[str] = set()
        self.on_outranked = lambda: None
        self.on_rejoined = lambda by: None

    @classmethod
    def create(cls, definition: ResourceDefinition, node: NodeContext) -> ReplicaService:
        """Make the resource's state on disk; blocking.

        :raises GeomirrorError: nothing is served; the caller removes the directory.
        """
        store, engine = create_engine(definition, node)
        return cls(definition, node, engine, store)

    @classmethod
    def open(cls, definition: ResourceDefinition, node: NodeContext) -> ReplicaService:
        """Recover the resource's state from disk; blocking.

        :raises FencedError, IntegrityError, InUseError, StorageError: nothing was changed.
        """
        store, engine = open_engine(definition, node)
        service = cls(definition, node, engine, store)
        service.views.open_all()
        return service

    @property
    def role(self) -> str:
        """`primary` or `secondary`."""
        return self._engine.superblock.role

    async def start(self) -> None:
        """Begin to serve: core, timer, exports."""
        self.stage = state_of(self.role, is_outranked=self._was_outranked)
        self._begin()  # Which looks at higher tokens that were heard of before, too.
        self._ticker = asyncio.get_running_loop().create_task(self._tick())

    @property
    def _was_outranked(self) -> bool:
        """The superblock says that a higher token was seen."""
        return bool(self._engine.superblock.superseded_by)

    def _begin(self) -> None:
        node, definition, clock = self._node, self.definition, self._node.clock
        self._make_core()
        self._runner = ReplicaRunner(
            self._core,
            definition.name,
            node,
            on_room=self._held.retry,
            on_flush=self._flushed,
            on_progress=self._progress,
        )
        self.marks = MarkDesk(definition.name, self._engine, self._runner)
        schedule = parse_schedule(definition.settings)
        self.verifies = VerifyDesk(definition.name, self._engine, self._runner, node, schedule)
        self._pins, self._grower = None, None
        if isinstance(self._core, Secondary):
            self._pins = ReaderPins(self._runner, node.limits)
        else:
            self._grower = Grower(self._core, self._runner, node)
        self._replica_exports = ReplicaExports(
            definition.name,
            node,
            self._runner,
            self._held,
            self._pins,
            is_writable=accepts_writes(self.stage),
        )
        self._is_changing = False
        self._core.handle_timer(clock.now_ns())
        if self.role == "primary":
            # A member is offered a session when it has the definition, as after a start.
            self._links_up.clear()
        for peer in sorted(self._links_up):
            self._core.link_up(peer, clock.now_ns())
        self.verifies.resume()
        self._runner.drive()

    def _make_core(self) -> None:
        """A core for the role, which is the same in memory and on disk."""
        durable = self.role, self._was_outranked
        assert durable == DURABLE_ROLE[self.stage], f"{self.stage}, and {durable} on disk"
        node, definition = self._node, self.definition
        clock, limits = node.clock, node.limits
        if self.role == "primary":
            primary = Primary(
                self._engine,
                limits,
                incarnation=node.entropy.token_bytes(16),
                peers=definition.secondaries,
                now_ns=clock.now_ns(),
                wall_ns=clock.wall_ns(),
            )
            primary.set_policy(
                parse_policy(definition.settings, definition.secondaries), clock.now_ns()
            )
            self._core, self._status = primary, PrimaryStatus(primary)
        else:
            secondary = Secondary(
                self._engine, limits, primary=definition.primary, members=self._others()
            )
            secondary.now_ns = clock.now_ns()
            self._core, self._status = secondary, SecondaryStatus(secondary)

    async def stop(self) -> None:
        """Seal, flush, apply what is sealed, close. What does not finish is left to recovery."""
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.gather(self._ticker, return_exceptions=True)
        if self._remembering is not None:
            await asyncio.gather(self._remembering, return_exceptions=True)
        if self._core.fenced is None:
            try:
                async with asyncio.timeout(STOP_S_MAX):
                    await self._settle()
            except TimeoutError:
                self._node.emit("stop_unfinished", {"resource": self.definition.name})
        await self.verifies.close()
        await self._runner.stop()
        await self.views.stop()
        self._engine.close()
        self._store.close()

    async def _settle(self) -> None:
        core, runner = self._core, self._runner
        core.stop(runner.now_ns())
        runner.drive()
        while core.fenced is None and not (core.is_settled and core.is_idle):
            await asyncio.sleep(POLL_S)
            core.handle_timer(runner.now_ns())
            runner.drive()

    # What the node asks.

    def exports(self) -> dict[str, Export]:
        """`RES/VOLUME` for every volume, `RES` for the first, and those of views."""
        own = {} if self._is_changing else self._replica_exports.exports
        return {**own, **self.views.exports()}

    def position(self) -> dict[str, Any]:
        """Epochs here; `lsn` is where the next write goes (primary) or what is applied."""
        engine = self._engine
        held = engine.held
        if held is not None:
            # What can be read here, and what a promotion would have.
            epochs = dict.fromkeys(("epoch", "durable_epoch", "applied_epoch"), held.epoch)
            return {**epochs, "lsn": held.end_lsn}
        epoch = engine.sealed_epoch if self.role == "primary" else engine.applied_epoch
        lsn = engine.completed_lsn if self.role == "primary" else engine.superblock.applied_end_lsn
        return {
            "epoch": epoch,
            "lsn": lsn,
            "durable_epoch": engine.sealed_epoch,
            "applied_epoch": engine.applied_epoch,
        }

    def status(self) -> dict[str, Any]:
        """The resource object of `status --json`, without what only the node knows."""
        engine, status, core = self._engine, self._status, self._core
        journal: dict[str, Any] = {
            "bytes_used": engine.journal.bytes_used,
            "bytes_total": engine.journal.bytes_total,
            "covers_seconds": None,
        }
        choice = ""
        if isinstance(status, PrimaryStatus):
            choice = status.choice()
            journal["covers_seconds"] = status.covers_seconds()
            peers, disk_state = status.peers(self._runner.now_ns()), "UpToDate"
            for peer in peers:
                peer["verify"] = self.verifies.describe(peer["node"])
        else:
            peers, disk_state = status.peers(), status.disk_state()
        no_space = self._held.no_space
        return {
            "name": self.definition.name,
            "generation": engine.generation.hex(),
            "role": self.role,
            "state": "storage_full" if no_space else status.state(),
            "disk_state": disk_state,
            "journal": journal,
            "volumes": [
                {"name": each.name, "size_bytes": each.size_bytes} for each in self.volumes()
            ],
            "position": self.position(),
            "peers": peers,
            "sync": sync_object(core),
            "behind": behind_object(engine),
            "superseded": self.tail() if engine.superblock.superseded_by else None,
            "history": history_object(engine, self._node.limits),
            "branches": self.branches.summary(),
            "reason": self.outranked_reason()
            or str(core.fenced or core.stalled or no_space or choice),
        }

    async def answer(self) -> MemberAnswer:
        """What this member knows; what is received whole is durable first, if that takes no second.

        :raises FencedError: the resource stopped serving; what it has is not for sure.
        """
        engine = self._engine
        for _ in range(round(SETTLE_S_MAX / POLL_S)):
            if self._core.fenced is not None:
                raise self._core.fenced
            if engine.committed_epoch == engine.sealed_epoch:
                break
            await asyncio.sleep(POLL_S)
        return answer_of(self._node.name, self._core)

    @property
    def put_back_primary(self) -> str:
        """The primary that this copy refuses because it has lost epochs that are here, or ""."""
        return self._core.put_back_primary if isinstance(self._core, Secondary) else ""

    def plan(self) -> RewindPlan:
        """What going back would take out of the volumes."""
        return RewindPlan(self._engine, self.branches, self._node)

    def volumes(self) -> list[VolumeRecord]:
        """The volumes now, or as of the applied epoch at a secondary, by index."""
        return self._replica_exports.volumes()

    async def grow(self, change: VolumeChange) -> int:
        """Grow or add a volume; returns the epoch that has it, sealed.

        :raises UsageError: a secondary. :raises GeomirrorError: see `Grower.grow`.
        """
        if self._grower is None:
            raise UsageError(f'"{self.definition.name}" is a secondary here; grow at the primary')
        number = await self._grower.grow(change)
        self._replica_exports.update()
        return number

    # Events of links.

    def link_up(self, peer: str) -> None:
        """The link to a member is there, and the member knows the resource."""
        self._links_up.add(peer)
        self._core.link_up(peer, self._runner.now_ns())
        self._runner.drive()

    def link_down(self, peer: str) -> None:
        """The link to a member is gone."""
        self._links_up.discard(peer)
        self._core.link_down(peer, self._runner.now_ns())
        self._runner.drive()

    def message(self, peer: str, session: int, message: AnyMessage) -> None:
        """A message of this resource's session. :raises RemoteProtocolError: close the link."""
        self._runner.trace.told(peer, message, is_sent=False)
        self._core.receive(peer, message, self._runner.now_ns())
        self._room(peer)
        self._runner.drive()

    def frame(
        self, peer: str, session: int, epoch: int, sequence: int, is_resync: bool, body: bytes
    ) -> None:
        """A data frame of this session. :raises RemoteProtocolError: close the link."""
        if isinstance(self._core, Secondary):
            now_ns = self._runner.now_ns()
            self._core.receive_frame(
                peer, epoch, sequence, body, is_resync=is_resync, now_ns=now_ns
            )
            self._runner.drive()

    def writable(self, peer: str) -> None:
        """The link's queues have room again."""
        self._room(peer)
        self._runner.drive()

    def _room(self, peer: str) -> None:
        if isinstance(self._core, Primary):
            room = self._node.links.writable_bytes(peer)
            self._core.link_room(peer, room, self._runner.now_ns())

    # The inside.

    def _flushed(self, token: object, error: GeomirrorError | None) -> None:
        assert isinstance(token, FlushToken)
        token.answer(error)

    def _progress(self) -> None:
        if self._core.fenced is not None and self._held:
            self._held.fail(self._core.fenced)
        self._look_at_claims()
        if self._pins is not None:
            self._pins.progress()
            self._replica_exports.progress()
        elif isinstance(self._core, Primary):
            for name in self._links_up:
                # A session that was just accepted does not know the link's room yet.
                sender = self._core.senders.get(name)
                if sender is not None and sender.is_open and sender.room_bytes == 0:
                    self._core.link_room(
                        name, self._node.links.writable_bytes(name), self._runner.now_ns()
                    )

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._status.sample(self._runner.now_ns())
            self._core.handle_timer(self._runner.now_ns())
            for peer in list(self._links_up):
                self._room(peer)
            self._runner.drive()
            self._mind_full_disk()
            for name in await self.views.expire():
                self._runner.tell("view_expired", {"view": name})
            await self.verifies.tick()

    def _mind_full_disk(self) -> None:
        """Writers wait for space, then they are told; the first look tells the operator."""
        held, now_ns = self._held, self._runner.now_ns()
        if held.no_space is not None:
            self._runner.tell("storage_full", {"job": "write", "error": str(held.no_space)})
            held.retry()
        error = self._full_disk.look(held.no_space or self._core.stalled, now_ns)
        if error is not None and held:
            held.fail(error)
