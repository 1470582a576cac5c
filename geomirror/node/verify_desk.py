"""The verifies of one resource at its primary: begun when asked for or due, gone on with after a
restart or when the node is the primary again, remembered."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from geomirror.environment import SECOND
from geomirror.errors import NotFoundError, RefusedError, StorageError
from geomirror.node.context import NodeContext
from geomirror.node.rfc3339 import rfc3339
from geomirror.node.verify_book import Blocks, PeerBook, Running, Tally, VerifyBook
from geomirror.node.verify_report import verify_object
from geomirror.volume.engine import Engine
from geomirror.wan_protocol.primary import Primary
from geomirror.wan_protocol.verify_run import (
    CLEAN,
    DONE,
    Position,
    Span,
    VerifyRun,
    total_blocks,
)
from geomirror.wan_protocol.verify_schedule import (
    RATE_MIN,
    Copy,
    Times,
    VerifySchedule,
    choose,
    why_anew,
)

if TYPE_CHECKING:
    from geomirror.node.replica_runner import ReplicaRunner

SAVE_INTERVAL_NS = 10 * SECOND
"""How much of a verify a crash may repeat."""


class VerifyDesk:
    """Beside the core of a running resource."""

    def __init__(
        self,
        resource: str,
        engine: Engine,
        runner: ReplicaRunner,
        node: NodeContext,
        schedule: VerifySchedule,
    ) -> None:
        self.schedule = schedule
        """May be replaced at any time."""
        self._resource = resource
        self._engine = engine
        self._runner = runner
        self._node = node
        self._book = VerifyBook(resource, node)
        self._runs: dict[str, VerifyRun] = {}
        self._saved_ns = 0
        self._is_unsaved = False
        """Something has ended, and the file does not say so."""
        self._starting = asyncio.Lock()
        self._overdue: set[str] = set()
        """Copies of which that was told."""

    def resume(self) -> None:
        """Go on with what a restart or another primary interrupted, where that is still right."""
        core = self._runner.core
        if not isinstance(core, Primary):
            return
        for peer in sorted(core.senders):
            book = self._book.find(peer)
            running = None if book is None else book.running
            if book is None or running is None or peer in self._runs:
                continue
            tally, wall_ns = running.tally, self._node.clock.wall_ns()
            tally.reason = why_anew(
                self._engine.superblock.chain,
                running.generation,
                tally.epoch,
                wall_ns - running.noted_wall_ns,
                self.schedule.every_ns,
            )
            if tally.reason:
                self._ended(book, tally)
                continue
            running.generation = self._engine.generation.hex()
            found = Position(
                running.volume,
                running.block,
                tally.compared_blocks,
                tally.different_blocks,
                tally.healed_blocks,
                [Span(each.volume, each.first, each.count) for each in tally.different],
            )
            self._runs[peer] = core.start_verify(
                peer,
                bytes_per_second=tally.bytes_per_second,
                is_healing=tally.heals,
                now_ns=self._runner.now_ns(),
                found=found,
            )

    async def start(self, peer: str | None, bytes_per_second: int, *, heals: bool) -> None:
        """Begin with one peer or all; one that was asked for and runs already goes on as it is, one
        that was due gives way.

        :raises RefusedError: this is a secondary, or there is no other copy.
        :raises NotFoundError: no such peer. :raises StorageError: nothing was begun.
        """
        async with self._starting:
            idle = self._idle_peers(peer)
            for name in idle:
                self._enter(name, max(RATE_MIN, bytes_per_second), heals=heals)
            try:
                await self._save()
            except StorageError:
                for name in idle:
                    self._book.of(name).running = None
                raise
            self.resume()
            self._runner.drive()

    def _idle_peers(self, peer: str | None) -> list[str]:
        """The peer, or all, unless one of it runs already."""
        core = self._primary()
        peers = sorted(core.senders) if peer is None else [peer]
        if not peers:
            raise RefusedError(f'"{self._resource}" has no other copy')
        unknown = [name for name in peers if name not in core.senders]
        if unknown:
            hint = f"it has copies on {', '.join(sorted(core.senders)) or 'no other node'}"
            raise NotFoundError(f'"{self._resource}" has no copy on "{unknown[0]}"', hint=hint)
        self._end_scheduled("somebody asked for a verify", peers)
        return [name for name in peers if name not in self._runs]

    def _enter(
        self, peer: str, bytes_per_second: int, *, heals: bool, is_scheduled: bool = False
    ) -> None:
        """Of a verify that is to begin."""
        wall_ns, blocks = self._node.clock.wall_ns(), total_blocks(self._engine.sizes.now)
        tally = Tally(wall_ns, heals, bytes_per_second, blocks, is_scheduled=is_scheduled)
        generation = self._engine.generation.hex()
        self._book.of(peer).running = Running(generation, tally, noted_wall_ns=wall_ns)

    async def stop(self, peer: str | None) -> None:
        """End what runs, with what it found so far."""
        core = self._primary()
        for name, run in self._runs.items():
            if peer in (None, name) and not run.is_over:
                core.stop_verify(name, "stopped by the operator", self._runner.now_ns())
                times = self._book.of(name).times
                if times is not None:
                    times.put_off(self._node.clock.wall_ns())
        self._runner.drive()
        self._note()
        await self._save()

    async def tick(self) -> None:
        """Once a second: begin what is due, note results, and positions now and then."""
        self._note()
        core = self._runner.core
        is_serving = isinstance(core, Primary) and core.fenced is None and not core.is_frozen
        if isinstance(core, Primary) and is_serving and not self._starting.locked():
            self._look_at_schedule(core)
        is_due = self._runner.now_ns() >= self._saved_ns + SAVE_INTERVAL_NS
        if self._is_unsaved or (self._runs and is_due):
            with contextlib.suppress(StorageError):  # A full disk: the next time.
                await self._save()

    def _look_at_schedule(self, core: Primary) -> None:
        """Begin with a copy that is due; say of which that is not enough."""
        wall_ns, every_ns = self._node.clock.wall_ns(), self.schedule.every_ns
        if self._book.forget_others(core.senders):
            self._is_unsaved = True
        if every_ns is None:
            self._end_scheduled("verify_every=off", core.senders)
            return
        copies: list[Copy] = []
        for name in sorted(core.senders):
            book = self._book.of(name)
            if book.times is None:
                book.times = Times.first_seen(wall_ns)
                # What cannot be read stays there to be looked at, until something is compared.
                self._is_unsaved = self._is_unsaved or not self._book.problem
            self._tell_overdue(name, book.times, every_ns, wall_ns)
            copies.append(Copy(name, book.times, name in self._runs, core.is_comparable(name)))
        chosen = choose(every_ns, copies, wall_ns)
        if chosen is not None:
            schedule = self.schedule
            rate, heals = schedule.bytes_per_second, schedule.heals
            self._enter(chosen, rate, heals=heals, is_scheduled=True)
            self._is_unsaved = True
            self.resume()
            self._runner.drive()

    def _tell_overdue(self, name: str, times: Times, every_ns: int, wall_ns: int) -> None:
        if not times.is_overdue(every_ns, wall_ns):
            self._overdue.discard(name)
        elif name not in self._overdue:
            self._overdue.add(name)
            clean_ns = times.clean_wall_ns
            last = None if clean_ns is None else rfc3339(clean_ns)
            self._runner.tell("verify_overdue", {"peer": name, "last_clean_at": last})

    def _end_scheduled(self, reason: str, peers: Iterable[str]) -> None:
        """End those that were due and that nobody asked for, where they are."""
        self._note()
        core, wanted = self._primary(), set(peers)
        for name in wanted & set(self._runs):
            running = self._book.of(name).running
            if running is not None and running.tally.is_scheduled:
                core.stop_verify(name, reason, self._runner.now_ns())
        self._note()

    async def close(self) -> None:
        """The resource or its role ends: a verify goes on from here the next time."""
        self._note()
        if self._runs or self._is_unsaved:
            with contextlib.suppress(StorageError):
                await self._save()

    async def _save(self) -> None:
        self._saved_ns = self._runner.now_ns()
        await self._book.save()
        self._is_unsaved = False

    def _note(self) -> None:
        """Enter what runs found, and what became of those that have ended."""
        for name, run in list(self._runs.items()):
            book = self._book.of(name)
            running = book.running
            if running is None:
                continue
            found, tally = run.position(), running.tally
            running.volume, running.block = found.volume, found.block
            running.noted_wall_ns = self._node.clock.wall_ns()
            tally.compared_blocks = found.compared_blocks
            tally.different_blocks = found.different_blocks
            tally.healed_blocks = found.healed_blocks
            tally.unhealed_blocks = run.unhealed_blocks
            tally.different = [Blocks(*span) for span in found.runs]
            tally.epoch, tally.reason = run.epoch, run.reason
            if run.is_over:
                tally.result = run.result if run.state == DONE else ""
                self._ended(book, tally)
                del self._runs[name]

    def _ended(self, book: PeerBook, tally: Tally) -> None:
        tally.ended_wall_ns = self._node.clock.wall_ns()
        book.running = None
        self._is_unsaved = True
        if not tally.result and not tally.different_blocks:
            # It says nothing about what it did not reach; the result before still stands.
            if book.last is None:
                book.last = tally
            return
        book.last = tally
        if tally.result:
            times = book.times = book.times or Times.first_seen(tally.started_wall_ns)
            times.ended(tally.started_wall_ns, is_clean=tally.result == CLEAN)

    # What is told.

    def describe(self, peer: str) -> dict[str, Any]:
        """`peers[].verify` of `status --json`."""
        self._note()
        return verify_object(
            self._book.find(peer),
            self.schedule,
            self._engine.sizes.names,
            self._node.clock.wall_ns(),
            self._book.problem,
        )

    def describe_all(self) -> dict[str, Any]:
        """What `verify` shows: one object a peer."""
        core = self._primary()
        peers = [{"node": name, "verify": self.describe(name)} for name in sorted(core.senders)]
        return {"name": self._resource, "node": self._node.name, "peers": peers}

    def _primary(self) -> Primary:
        core = self._runner.core
        if not isinstance(core, Primary):
            raise RefusedError(f'"{self._resource}" is a secondary here; verify at the primary')
        return core
