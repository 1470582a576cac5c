"""How epochs come into a secondary: frames spooled as they arrive, committed in order.

Only the epoch that is next in order has a right to the journal's room; what comes ahead of it is
taken while there is plenty, and dropped and asked for again when there is not.
"""

from __future__ import annotations

from geomirror.environment import SECOND
from geomirror.errors import (
    BadFrameError,
    GeomirrorError,
    IntegrityError,
    JournalFullError,
    LimitExceededError,
    NoSpaceError,
    RemoteProtocolError,
    StorageError,
)
from geomirror.limits import Limits
from geomirror.volume.engine import Engine
from geomirror.wan_protocol.decisions import Emit
from geomirror.wan_protocol.epoch_decode import FrameDecoder
from geomirror.wan_protocol.frame import FRAME_BODY_BYTES_MAX
from geomirror.wan_protocol.growth import growth_problem
from geomirror.wan_protocol.incoming import FRAMES_MAX, Incoming, check_commit
from geomirror.wan_protocol.mark_intake import MarkIntake, check_marks
from geomirror.wan_protocol.messages import EpochCommit, Marks
from geomirror.wan_protocol.replica import Replica

INCOMING_MAX = 1024
"""Epochs that may be under way at once."""
MISSING_AFTER_NS = 1 * SECOND
"""A committed epoch without news for this long: its missing frames were lost with a connection."""


class EpochIntake(Replica):
    """The part of the secondary that is about epochs under way."""

    def __init__(self, engine: Engine, limits: Limits) -> None:
        super().__init__(engine, limits)
        self.incoming: dict[int, Incoming] = {}
        self.marks = MarkIntake(engine)
        self.taken_bytes = 0
        """Frame body bytes taken in this session. What is dropped here is asked for and sent again,
        so only what is taken opens the primary's window."""
        self.decoder = FrameDecoder(limits, engine.sizes.now)
        self._unspooled: NoSpaceError | None = None
        """Why the last frame found no room on the disk."""

    @property
    def stalled(self) -> GeomirrorError | None:
        """Why something waits for disk space at this moment."""
        return self._stalled or self._unspooled

    @property
    def _waits_for_sync(self) -> bool:
        # Trims of what was dropped do, and the begin of a resync; syncs are few here.
        return True

    def _diverged(self, error: IntegrityError) -> None:
        """What arrived is not what the primary sealed."""
        raise NotImplementedError

    def take_frame(self, epoch: int, sequence: int, body: bytes) -> None:
        """Spool a data frame; one that is here already, or has to wait for room, is dropped.

        :raises RemoteProtocolError: hostile content, or too many epochs under way.
        """
        if not 0 <= sequence < FRAMES_MAX:
            raise RemoteProtocolError(f"frame number {sequence} of epoch {epoch}")
        incoming = self._incoming_of(epoch)
        if sequence in incoming.parts or self._must_wait(incoming):
            return
        try:
            frame = self.decoder.decode(body)
        except BadFrameError as error:
            self._decide(Emit("bad_frame", {"epoch": epoch, "error": str(error)}))
            return
        address = 0
        if frame.data:
            try:
                address = self.engine.spool([frame.data], 0)
            except (JournalFullError, NoSpaceError) as error:
                self._unspooled = error if isinstance(error, NoSpaceError) else None
                self._spool_full(epoch)
                return
            except StorageError as error:
                self._fence(error)
                return
            self._unspooled = None
        incoming.progress_ns = self.now_ns
        incoming.add(sequence, frame, address, len(body))
        self.taken_bytes += len(body)
        if incoming.is_complete:  # Else no epoch can have become so.
            self.commit_complete()

    def _incoming_of(self, epoch: int) -> Incoming:
        if len(self.incoming) >= INCOMING_MAX and epoch not in self.incoming:
            raise LimitExceededError(f"more than {INCOMING_MAX} epochs under way")
        return self.incoming.setdefault(epoch, Incoming(epoch))

    def _must_wait(self, incoming: Incoming) -> bool:
        """Whether the journal's room belongs to the epoch that is next in order."""
        limits = self.limits
        reserve_bytes = limits.fold_bytes_max + limits.epoch_bytes_max
        is_scarce = self.engine.journal.room_bytes() < reserve_bytes
        return is_scarce and incoming.number > min(self.incoming)

    def _spool_full(self, epoch: int) -> None:
        """No room: give up what is ahead of the next epoch, so that this one can finish.

        What is dropped is asked for again once it is next.
        """
        first = min(self.incoming)
        for number, incoming in self.incoming.items():
            if number > first:
                self.taken_bytes -= incoming.drop_parts()
        self.engine.keep_spooled(self._lowest_spooled())
        self._reclaim()
        self._decide(Emit("spool_full", {"epoch": epoch}))

    def take_commit(self, message: EpochCommit) -> None:
        """Take the word on what an epoch is; it is committed once all of its frames are here.

        :raises RemoteProtocolError: out of bounds, or too many epochs under way.
        """
        check_commit(message, self.limits.epoch_entries_max)
        if message.epoch <= self.engine.committed_epoch:
            return
        incoming = self._incoming_of(message.epoch)
        for number in [n for n in self.incoming if message.first_epoch <= n < message.epoch]:
            # The primary cuts its stream otherwise now: these will never be completed.
            self.taken_bytes -= self.incoming.pop(number).drop_parts()
        incoming.commit = message
        incoming.progress_ns = self.now_ns
        self.commit_complete()

    def commit_complete(self) -> None:
        """Commit every complete epoch that is next in order."""
        engine = self.engine
        while self.incoming:
            ready = [
                i
                for i in self.incoming.values()
                if i.is_complete and i.commit and i.commit.first_epoch == engine.committed_epoch + 1
            ]
            if not ready:
                return
            incoming = ready[0]
            try:
                epoch = incoming.assemble(engine.committed_hash, engine.sizes.now)
                problem = growth_problem(engine, epoch.changes)
                if problem:
                    raise IntegrityError(f"epoch {epoch.number}: {problem}")
            except IntegrityError as error:
                self._not_as_sealed(incoming, error)
                return
            try:
                engine.commit(epoch, epoch.wall_ns, self.marks.mark_of(epoch.number))
            except (JournalFullError, NoSpaceError) as error:
                self._stall("commit", error)
                return
            except StorageError as error:
                self._fence(error)
                return
            del self.incoming[incoming.number]
            for number in [n for n in self.incoming if n <= epoch.number]:
                del self.incoming[number]
            engine.keep_spooled(self._lowest_spooled())
            self._sync_wanted = True
            self._pump_sync()

    def credit_bytes(self, queued_bytes: int | None) -> int:
        """Bytes that the primary may have sent in this session in total.

        :param queued_bytes: of a resync under way, waiting for the image.
        """
        if queued_bytes is not None:
            # These wait as they came. Never none: the next frame may be the one that all wait for.
            spare = self.limits.credit_bytes - queued_bytes
            return self.taken_bytes + max(spare, FRAME_BODY_BYTES_MAX)
        room = self.engine.journal.room_bytes()
        spare = room - self.limits.epoch_bytes_max // 2
        # A frame may blow up to its raw size in the journal; compressed bytes are what is granted.
        granted = max(0, min(self.limits.credit_bytes, spare // 4))
        if room >= 2 * FRAME_BODY_BYTES_MAX:
            # Less than one frame would hold the next epoch up for ever.
            granted = max(granted, FRAME_BODY_BYTES_MAX)
        return self.taken_bytes + granted

    def take_marks(self, message: Marks) -> None:
        """Take all marks of the primary. :raises RemoteProtocolError: they cannot be."""
        self.marks.take(check_marks(message, self.limits))

    def write_marks(self) -> None:
        """Bring what was told of marks into the journal, as far as their epochs are here."""
        try:
            if self.marks.write_down():
                self._sync_wanted = True
        except (JournalFullError, NoSpaceError) as error:
            self._stall("marks", error)

    def _not_as_sealed(self, incoming: Incoming, error: IntegrityError) -> None:
        """Take the epoch's frames anew once: some may be of another cut into folds."""
        if incoming.is_second_try:
            self._diverged(error)
            return
        incoming.is_second_try = True
        self.taken_bytes -= incoming.drop_parts()
        incoming.progress_ns = self.now_ns - MISSING_AFTER_NS  # Asked for at once.
        self.engine.keep_spooled(self._lowest_spooled())
        self._reclaim()
        self._decide(Emit("bad_epoch", {"epoch": incoming.number, "error": str(error)}))

    def forget_incoming(self) -> None:
        """Drop everything that is under way."""
        if self.incoming:
            self._reclaim()
        self.incoming.clear()
        self._unspooled = None
        self.engine.keep_spooled(0)

    def _reclaim(self) -> None:
        """Let the journal be trimmed of dropped frames: no epoch may ever come to bring that."""
        self._sync_wanted = self._checkpoint_wanted = True

    def _lowest_spooled(self) -> int:
        lowest = [i.lowest_address for i in self.incoming.values() if i.lowest_address]
        return min(lowest, default=0)

    @property
    def awaited(self) -> Incoming | None:
        """The epoch that is next in order, when its commit is here and frames are missing."""
        if not self.incoming:
            return None
        incoming = self.incoming[min(self.incoming)]
        return incoming if incoming.commit is not None and not incoming.is_complete else None
