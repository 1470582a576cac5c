"""The secondary's side of a verify: it compares its own content at exactly the epoch asked about.

```
 VerifyPin(e) ─▶ e durable here? ─▶ content of e kept readable ─▶ VerifyAsk ─▶ job ─▶ VerifyAnswer
                  before any pass past e begins                    one at a time, paced
```
Invariants: what is compared is the content at the pinned epoch, byte for byte, whatever is applied
meanwhile (`volume.epoch_content`); what cannot be read at that epoch is not compared, and said so.
Applying, the stream and the journal's room come first: a pin that is in their way is given up.
Deliberately not here: what differs in a region, and what is done about it (`verifying`, primary).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from geomirror.environment import SECOND
from geomirror.errors import GeomirrorError, RemoteProtocolError
from geomirror.limits import BLOCK_BYTES, Limits
from geomirror.volume.engine import Engine
from geomirror.volume.epoch_content import (
    DIGEST_BYTES,
    EpochContent,
    RangeDigests,
    digest_pairs,
    region_digests,
)
from geomirror.wan_protocol.decisions import RunJob
from geomirror.wan_protocol.messages import VerifyAnswer, VerifyAsk, VerifyPin
from geomirror.wan_protocol.resync_intake import CONSISTENT
from geomirror.wan_protocol.session_intake import SessionIntake

ASK_BLOCKS_MAX = 1 << 14
"""Blocks of one ask, 64 MiB: holes cost nothing."""
DIFFERENT_MAX = 16
"""Regions that one answer names, 64 KiB of digests: acknowledgements must not wait behind it."""
ASKS_MAX = 8
"""Asks under way at once."""
PIN_NS_MAX = 60 * SECOND
"""A primary that hangs must not hold the journal here any longer."""
REASON_MAX = 1000
KIND = "verify"


@dataclass(eq=False)
class Pinned:
    """The epoch that is asked about."""

    number: int
    epoch: int
    content: EpochContent | None = None
    until_ns: int = 0
    problem: str = ""
    """Why it cannot be read, or not any more."""
    asks: deque[VerifyAsk] = field(default_factory=deque)
    is_over: bool = False


def check_ask(message: VerifyAsk) -> None:
    """Believe no bounds that cannot be. :raises RemoteProtocolError: they cannot."""
    count, step = message.block_count, message.region_blocks
    is_range = message.first_block >= 0 and 0 < count <= ASK_BLOCKS_MAX
    is_split = is_range and 0 < step <= ASK_BLOCKS_MAX
    if not is_split or len(message.digests) != -(-count // step) * DIGEST_BYTES:
        raise RemoteProtocolError(f"verify of {count} blocks in regions of {step}")
    if message.bytes_per_second <= 0:
        raise RemoteProtocolError("verify at no rate")


def different_regions(ask: VerifyAsk, job: RangeDigests) -> tuple[list[tuple[int, bytes]], int]:
    """The first regions whose content is another one here, with the digests of their blocks, and
    how many blocks that was looked for in."""
    step = ask.region_blocks
    own = region_digests(job.low, job.high, step)
    pairs = digest_pairs(job.low, job.high)
    found: list[tuple[int, bytes]] = []
    for region in range(len(own) // DIGEST_BYTES):
        part = slice(region * DIGEST_BYTES, (region + 1) * DIGEST_BYTES)
        if own[part] != ask.digests[part]:
            at = region * step * DIGEST_BYTES
            found.append((region, pairs[at : at + step * DIGEST_BYTES]))
            if len(found) == DIFFERENT_MAX:
                return found, min((region + 1) * step, ask.block_count)
    return found, ask.block_count


class VerifyAnswering(SessionIntake):
    """The part of the secondary that answers whether content is the same."""

    def __init__(self, engine: Engine, limits: Limits, *, primary: str) -> None:
        super().__init__(engine, limits, primary=primary)
        self._pinned: Pinned | None = None
        self._reading: Pinned | None = None
        """What the job that runs looks at; it may be over by now."""
        self._verify_not_before_ns = 0

    def take_verify(self, message: VerifyPin | VerifyAsk) -> None:
        """Take a word of the primary. :raises RemoteProtocolError: it is out of bounds."""
        if isinstance(message, VerifyPin):
            self._unpin()
            if message.epoch > 0:
                self._pinned = Pinned(message.number, message.epoch)
            return
        check_ask(message)
        pinned = self._pinned
        if pinned is None or pinned.number != message.number:
            self._answer_not(message, "another epoch is asked about")
            return
        if len(pinned.asks) >= ASKS_MAX:
            raise RemoteProtocolError(f"more than {ASKS_MAX} questions of a verify at once")
        pinned.asks.append(message)

    def _pump_role(self) -> None:
        # Before a pass can begin: the content of an epoch is kept from its first moment on.
        self._pump_verify()
        super()._pump_role()

    def _pump_verify(self) -> None:
        pinned = self._pinned
        if pinned is None:
            return
        if pinned.content is None and not pinned.problem:
            self._keep(pinned)
        if pinned.content is not None and not pinned.is_over:
            self._mind(pinned)
        while pinned.problem and pinned.asks and self._reading is not pinned:
            self._answer_not(pinned.asks.popleft(), pinned.problem)
        is_due = self.now_ns >= self._verify_not_before_ns and not self.is_running(KIND)
        if pinned.content is not None and pinned.asks and is_due and not pinned.is_over:
            self._read(pinned, pinned.content)

    def _keep(self, pinned: Pinned) -> None:
        """Keep the epoch's content readable, if it is durable by now."""
        engine = self.engine
        if self.data_state != CONSISTENT or self.resync is not None:
            pinned.problem = "a resync is under way"
        elif engine.sealed_epoch >= pinned.epoch:
            try:
                owner = f"{KIND} {pinned.number}"
                pinned.content = EpochContent(engine, pinned.epoch, owner)
                pinned.until_ns = self.now_ns + PIN_NS_MAX
            except GeomirrorError as error:
                pinned.problem = error.message

    def _mind(self, pinned: Pinned) -> None:
        """Give up an epoch that is in the way of anything."""
        # A journal gives its history up for a segment of room: what lacks more is in need.
        if self.engine.journal.room_bytes() < self.limits.epoch_bytes_max:
            pinned.problem = "the journal needs its room"
        elif self.data_state != CONSISTENT or self.resync is not None:
            pinned.problem = "a resync began"
        elif self.now_ns >= pinned.until_ns:
            pinned.problem = "it took too long"
        if pinned.problem:
            self._end(pinned)

    def _read(self, pinned: Pinned, content: EpochContent) -> None:
        ask = pinned.asks[0]
        if ask.first_block + ask.block_count > content.block_count(ask.volume):
            pinned.asks.popleft()
            self._answer_not(ask, f"volume {ask.volume} is smaller here")
            return
        job = RangeDigests(
            content,
            ask.volume,
            ask.first_block,
            ask.block_count,
            region_blocks=ask.region_blocks,
            bytes_max=ask.block_count * BLOCK_BYTES,
        )
        self._reading = pinned
        self._run(KIND, job, self._verify_read)

    def _verify_read(self, job: RangeDigests) -> None:
        pinned, self._reading = self._reading, None
        assert pinned is not None
        if pinned.is_over:
            self._end(pinned)
            return
        ask = pinned.asks.popleft()
        pause_ns = job.read_bytes * SECOND // ask.bytes_per_second
        self._verify_not_before_ns = self.now_ns + pause_ns
        pinned.until_ns = self.now_ns + pause_ns + PIN_NS_MAX
        found, count = different_regions(ask, job)
        self._send(VerifyAnswer(self.session, ask.number, ask.ask, count, found, job.read_bytes))

    def _job_failed(self, run: RunJob, error: GeomirrorError) -> None:
        if run.kind != KIND:
            super()._job_failed(run, error)
            return
        # Whatever a look at the content finds in its way: replication does not stop for it.
        pinned, self._reading = self._reading, None
        assert pinned is not None
        pinned.problem = pinned.problem or error.message
        self._end(pinned)

    def _answer_not(self, ask: VerifyAsk, reason: str) -> None:
        if self.is_open:
            reason = reason[:REASON_MAX]
            self._send(VerifyAnswer(self.session, ask.number, ask.ask, 0, [], 0, reason))

    # The end of it.

    def _end(self, pinned: Pinned) -> None:
        """Let go of the content, as soon as no thread reads it."""
        pinned.is_over = True
        if self._reading is not pinned and pinned.content is not None:
            pinned.content.release()
            pinned.content = None

    def _unpin(self) -> None:
        """Nothing is asked about any more."""
        if self._pinned is not None:
            self._end(self._pinned)
            self._pinned = None

    def verify_timer(self) -> int | None:
        """When `handle_timer` has something to do for a verify."""
        pinned = self._pinned
        if pinned is None or pinned.content is None or self._retry_at_ns is not None:
            return None
        if self._reading is not None:
            return None
        is_waiting = bool(pinned.asks) and self._verify_not_before_ns > self.now_ns
        return min(self._verify_not_before_ns, pinned.until_ns) if is_waiting else pinned.until_ns

    def _accept(self) -> None:
        self._unpin()
        super()._accept()

    def close_session(self) -> None:
        """The link is gone, or the resource stops."""
        self._unpin()
        super().close_session()

    def freeze(self) -> None:
        """Start nothing more, for good; another core may go on with the engine."""
        self._unpin()
        super().freeze()

    def _release_everything(self, error: GeomirrorError) -> None:
        self._unpin()
        super()._release_everything(error)
