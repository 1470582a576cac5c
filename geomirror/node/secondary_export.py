"""A volume of a secondary as a read-only NBD export, pinned to the epoch applied at connect.

While readers are attached the image is kept as it is: epochs go on becoming durable in the journal
and wait. A resync does not wait: it writes the image, and readers see the same epoch through undo.
After `reader_pin_ns_max` of that the readers get EIO and say *stale*, and applying goes
on; long stable reads are what `pause RES --peer N` is for.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from geomirror.errors import RefusedError
from geomirror.limits import Limits
from geomirror.nbd.constants import CMD_FLUSH, CMD_READ, STATE_HOLE, STATE_ZERO
from geomirror.nbd.protocol import ReplySink, Request
from geomirror.node.primary_export import answer_read, merge_extents
from geomirror.node.volume_reads import VolumeReader
from geomirror.volume.engine_jobs import ViewReadJob
from geomirror.volume.view import View
from geomirror.wan_protocol.resync_intake import CONSISTENT
from geomirror.wan_protocol.secondary import Secondary

if TYPE_CHECKING:
    from geomirror.node.replica_runner import ReplicaRunner


STALE = "stale: the copy went on without this reader; a new connection sees what it has now"
_OWNER = "readers"
"""Of the pin on the undo that readers of an earlier epoch need."""


@dataclass(slots=True, eq=False)
class _Reader:
    """One connection; `waiting` until the pass that was running at connect has ended."""

    export: SecondaryExport
    sink: ReplySink
    is_stale: bool = False
    view: View | None = None
    """What it reads during a resync and after it: the epoch that the image had at connect."""
    waiting: list[Request] = field(default_factory=list)


class ReaderPins:
    """All readers of one secondary resource: they share the epoch, because they share the image."""

    def __init__(self, runner: ReplicaRunner, limits: Limits) -> None:
        core = runner.core
        assert isinstance(core, Secondary)
        self.core = core
        self.runner = runner
        self._limits = limits
        self._readers: list[_Reader] = []
        self._since_ns = 0

    @property
    def is_settled(self) -> bool:
        """The image is exactly at the applied epoch and stays there."""
        return self.core.is_image_settled

    @property
    def has_views(self) -> bool:
        """Some reader sees another state than the image's."""
        return any(reader.view is not None for reader in self._readers)

    def attach(self, reader: _Reader) -> None:
        """Pin the image as of the last applied epoch."""
        if not any(not other.is_stale for other in self._readers):
            self._since_ns = self.runner.now_ns()
        self._readers.append(reader)
        if self.core.engine.held is not None:
            self._view_held()
        else:
            self._update()

    def detach(self, reader: _Reader) -> None:
        """A reader is gone."""
        self._readers.remove(reader)
        if not any(other.view is not None for other in self._readers):
            self.core.engine.undo.unpin(_OWNER)
        self._update()

    def retire(self) -> None:
        """The image is no secondary's any more: whoever reads it gets EIO from here on."""
        for reader in self._readers:
            reader.is_stale = True

    def progress(self) -> None:
        """Serve what waited for a pass to end; expire pins that held up applying too long."""
        core = self.core
        if core.engine.held is not None:
            self._view_held()
        if self.is_settled and core.fenced is None:
            for reader in self._readers:
                waiting, reader.waiting = reader.waiting, []
                for request in waiting:
                    reader.export.read(reader, request)
        if not core.hold_apply or core.engine.sealed_epoch <= core.engine.applied_epoch:
            self._since_ns = max(self._since_ns, self.runner.now_ns())
            return
        if self.runner.now_ns() - self._since_ns >= self._limits.reader_pin_ns_max:
            for reader in self._readers:
                reader.is_stale = True
            self._update()

    def _view_held(self) -> None:
        """A resync writes the image: what readers saw of it, undo shows them from now on."""
        engine = self.core.engine
        held = engine.held
        waiting = [r for r in self._readers if r.view is None and not r.is_stale]
        if held is None or not waiting:
            return
        undo = engine.undo
        view = View(
            held.epoch,
            engine.images,
            lambda: undo.history,
            engine.store.open,
            self._limits.view_entries_max,
            undo.suspect,
        )
        undo.pin(_OWNER, held.epoch)
        for reader in waiting:
            reader.view = view
        self._update()

    def _update(self) -> None:
        is_held = any(not reader.is_stale and reader.view is None for reader in self._readers)
        if is_held != self.core.hold_apply:
            self.core.set_hold(is_held, self.runner.now_ns())
            self.runner.drive()


@dataclass
class SecondaryExport:
    """Implements `nbd.protocol.Export` over a `Secondary`: reads of the last applied epoch."""

    name: str
    volume: int
    pins: ReaderPins
    description: str = ""
    is_read_only: bool = True
    is_multi_conn: bool = True
    minimum_block: int = 1
    preferred_block: int = 4096
    maximum_payload: int = 32 << 20

    def __post_init__(self) -> None:
        self.core = self.pins.core
        self.reader = VolumeReader(self.core.engine, self.volume)

    @property
    def size_bytes(self) -> int:
        """Size of the volume at the epoch that a reader who comes now will see."""
        return self.core.served_sizes.get(self.volume, 0)

    def open(self, sink: ReplySink) -> object:
        """Attach a reader.

        :raises RefusedError: fenced, or the image is not a consistent one.
        """
        core = self.core
        if core.fenced is not None:
            raise RefusedError(str(core.fenced))
        if not core.is_whole:
            raise RefusedError(f'"{self.name}" is Inconsistent here: its first sync goes on')
        reader = _Reader(self, sink)
        self.pins.attach(reader)
        return reader

    def close(self, handle: object) -> None:
        """Detach."""
        assert isinstance(handle, _Reader)
        self.pins.detach(handle)

    def submit(self, handle: object, requests: list[Request], sink: ReplySink) -> None:
        """Answer reads; writes were refused before."""
        assert isinstance(handle, _Reader)
        for request in requests:
            if request.command == CMD_FLUSH:
                sink.reply(request.cookie)
            elif request.command != CMD_READ:
                sink.reply(request.cookie, errno.EPERM)
            elif handle.view is None and not self.pins.is_settled:
                handle.waiting.append(request)
            else:
                self.read(handle, request)

    def read(self, reader: _Reader, request: Request) -> None:
        """Read the image; the pin keeps it still."""
        core, sink, cookie = self.core, reader.sink, request.cookie
        if request.offset + request.length > core.engine.images[self.volume].size_bytes:
            # The pass that was to grow the volume is waiting: it is not there yet.
            sink.reply(cookie, errno.EIO)
            return
        is_unknown = reader.view is None and core.data_state != CONSISTENT
        if reader.is_stale:
            sink.reply(cookie, errno.EIO, STALE)
            return
        if core.fenced is not None or is_unknown:
            sink.reply(cookie, errno.EIO)
            return
        if reader.view is not None:
            seen = ViewReadJob(reader.view, self.volume, request.offset, request.length)
            self.pins.runner.run_read(seen, partial(answer_read, sink, cookie, request.offset))
            return
        buffers = self.reader.read_now(request.offset, request.length)
        if buffers is not None:
            sink.reply_read(cookie, request.offset, buffers)
            return
        job = self.reader.read_later(request.offset, request.length)
        self.pins.runner.run_read(job, partial(answer_read, sink, cookie, request.offset))

    def block_status(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Holes of the image; anything else is allocated."""
        if self.pins.has_views or self.core.engine.held is not None:
            return [(length, 0)]  # What is a hole of the image may have been none.
        return merge_extents(self.reader.image_status(offset, length, STATE_HOLE | STATE_ZERO))
