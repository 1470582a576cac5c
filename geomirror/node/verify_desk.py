"""The verifies of one resource at its primary: begun, gone on with after a restart, remembered."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from geomirror.environment import SECOND
from geomirror.errors import NotFoundError, RefusedError, StorageError
from geomirror.limits import BLOCK_BYTES
from geomirror.node.context import NodeContext
from geomirror.node.rfc3339 import rfc3339
from geomirror.node.verify_book import Blocks, PeerBook, Running, Tally, VerifyBook
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
from geomirror.wan_protocol.verifying import RATE_MIN

if TYPE_CHECKING:
    from geomirror.node.replica_runner import ReplicaRunner

SAVE_INTERVAL_NS = 10 * SECOND
"""How much of a verify a crash may repeat."""


class VerifyDesk:
    """Beside the core of a running resource."""

    def __init__(
        self, resource: str, engine: Engine, runner: ReplicaRunner, node: NodeContext
    ) -> None:
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

    def resume(self) -> None:
        """Go on with what a restart interrupted; what belongs to another history is given up."""
        core = self._runner.core
        if not isinstance(core, Primary):
            return
        for peer in sorted(core.senders):
            book = self._book.find(peer)
            running = None if book is None else book.running
            if book is None or running is None or peer in self._runs:
                continue
            if running.generation != self._engine.generation.hex():
                running.tally.reason = "the primary changed"
                self._ended(book, running.tally)
                continue
            tally = running.tally
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
        """Begin with one peer or all; one that runs already goes on as it is.

        :raises RefusedError: this is a secondary, or there is no other copy.
        :raises NotFoundError: no such peer. :raises StorageError: nothing was begun.
        """
        async with self._starting:
            idle = self._idle_peers(peer)
            wall_ns, generation = self._node.clock.wall_ns(), self._engine.generation.hex()
            blocks = total_blocks(self._engine.sizes.now)
            rate = max(RATE_MIN, bytes_per_second)
            for name in idle:
                self._book.of(name).running = Running(
                    generation, Tally(wall_ns, heals, rate, blocks)
                )
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
        self._note()
        return [name for name in peers if name not in self._runs]

    async def stop(self, peer: str | None) -> None:
        """End what runs, with what it found so far."""
        core = self._primary()
        for name, run in self._runs.items():
            if peer in (None, name) and not run.is_over:
                core.stop_verify(name, "stopped by the operator", self._runner.now_ns())
        self._runner.drive()
        self._note()
        await self._save()

    async def tick(self) -> None:
        """Once a second: note results when they are there, and positions now and then."""
        self._note()
        is_due = self._runner.now_ns() >= self._saved_ns + SAVE_INTERVAL_NS
        if self._is_unsaved or (self._runs and is_due):
            with contextlib.suppress(StorageError):  # A full disk: the next time.
                await self._save()

    async def close(self) -> None:
        """The resource stops: a verify goes on from here after the next start."""
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
        if tally.result == CLEAN:
            book.last_clean_wall_ns = tally.started_wall_ns

    # What is told.

    def describe(self, peer: str) -> dict[str, Any] | None:
        """`peers[].verify` of `status --json`; None if nothing was ever compared."""
        self._note()
        book = self._book.find(peer)
        if book is None or (book.running is None and book.last is None):
            return self._unknown() if self._book.problem else None
        clean_ns = book.last_clean_wall_ns
        return {
            "state": "idle" if book.running is None else "running",
            "reason": "" if book.running is None else book.running.tally.reason,
            "current": None if book.running is None else self._tally(book.running.tally),
            "last": None if book.last is None else self._tally(book.last),
            "last_clean_at": None if clean_ns is None else rfc3339(clean_ns),
        }

    def _unknown(self) -> dict[str, Any]:
        problem = self._book.problem
        nothing = dict.fromkeys(("current", "last", "last_clean_at"))
        return {"state": "idle", "reason": problem, **nothing}

    def describe_all(self) -> dict[str, Any]:
        """What `verify` shows: one object a peer."""
        core = self._primary()
        peers = [{"node": name, "verify": self.describe(name)} for name in sorted(core.senders)]
        return {"name": self._resource, "node": self._node.name, "peers": peers}

    def _tally(self, tally: Tally) -> dict[str, Any]:
        names = self._engine.sizes.names
        ended_ns = tally.ended_wall_ns
        is_over = ended_ns is not None
        return {
            "result": (tally.result or "stopped") if is_over else None,
            "reason": tally.reason if is_over else "",
            "heals": tally.heals,
            "rate_bytes_per_second": tally.bytes_per_second,
            "started_at": rfc3339(tally.started_wall_ns),
            "ended_at": None if ended_ns is None else rfc3339(ended_ns),
            "epoch": tally.epoch,
            "total_bytes": tally.total_blocks * BLOCK_BYTES,
            "compared_bytes": tally.compared_blocks * BLOCK_BYTES,
            "different_blocks": tally.different_blocks,
            "healed_blocks": tally.healed_blocks,
            "unhealed_blocks": tally.unhealed_blocks,
            "different": [
                {"volume": names.get(e.volume, str(e.volume)), "block": e.first, "blocks": e.count}
                for e in tally.different
            ],
        }

    def _primary(self) -> Primary:
        core = self._runner.core
        if not isinstance(core, Primary):
            raise RefusedError(f'"{self._resource}" is a secondary here; verify at the primary')
        return core
