"""The primary's side of a verify: asks a peer, round by round, whether it has the same content.

```
 round at e = newest sealed epoch:   VerifyPin(e) ─────────────▶ peer keeps the content of e
   span ─▶ digests (job, paced) ───▶ VerifyAsk ────────────────▶ compares, at exactly e
   equal, or which blocks differ ◀── VerifyAnswer ◀─────────────
 between rounds: different blocks are written again (`verify_healing`), then compared once more
```
Invariants: both sides look at the same epoch, or at nothing: a pin is sent before the commit of any
later epoch, and what cannot be read at its epoch is asked again at another one. So there is no
false alarm, however busy the volume is, and a block counts as compared only if it was.
Deliberately not here: when one is begun (`verify_schedule`), and what is kept of it (the node).
"""

from __future__ import annotations

from functools import partial

from geomirror.environment import SECOND
from geomirror.errors import GeomirrorError, NotFoundError, RefusedError, RemoteProtocolError
from geomirror.limits import BLOCK_BYTES, Limits
from geomirror.volume.engine import Engine
from geomirror.volume.epoch_content import EpochContent, RangeDigests, region_digests
from geomirror.wan_protocol.decisions import Emit, RunJob, SendMessage
from geomirror.wan_protocol.messages import SessionAccept, VerifyAnswer, VerifyAsk, VerifyPin
from geomirror.wan_protocol.sender import STREAM, Sender
from geomirror.wan_protocol.verify_answering import ASKS_MAX
from geomirror.wan_protocol.verify_healing import Healing
from geomirror.wan_protocol.verify_run import (
    CLEAN,
    DONE,
    STOPPED,
    Ask,
    Position,
    Round,
    VerifyRun,
    total_blocks,
)
from geomirror.wan_protocol.verify_schedule import RATE_MIN

ROUND_S = 2
"""A round is about so long: both sides keep its epoch readable meanwhile."""
ROUND_ASKS_MAX = 64
"""Asks of a round, whatever they find to read: 4 GiB of holes."""
AGAIN_NS = 1 * SECOND
"""After a round that came to nothing."""
ANSWER_NS_MAX = 60 * SECOND
"""A peer that has the epoch and does not answer for so long has lost the question."""


class Verifying(Healing):
    """The part of the primary that compares."""

    _is_stopping: bool

    def __init__(self, engine: Engine, limits: Limits) -> None:
        super().__init__(engine, limits)
        self.verifies: dict[str, VerifyRun] = {}
        """The last one of each peer."""
        self._verify_number = 0
        self._takes_verify: set[str] = set()

    def start_verify(
        self,
        peer: str,
        *,
        bytes_per_second: int,
        is_healing: bool,
        now_ns: int,
        found: Position | None = None,
    ) -> VerifyRun:
        """Compare all volumes with a peer; waits while the peer is away or in a resync.

        :param found: of an earlier one that goes on.
        :raises NotFoundError: no such peer. :raises RefusedError: one runs already.
        """
        if peer not in self.senders:
            raise NotFoundError(f'"{self.engine.superblock.name}" has no copy on "{peer}"')
        before = self.verifies.get(peer)
        if before is not None and not before.is_over:
            raise RefusedError(f'a verify of "{peer}" runs already')
        run = self.verifies[peer] = VerifyRun(
            peer,
            max(RATE_MIN, bytes_per_second),
            is_healing,
            self.limits,
            total_blocks(self.engine.sizes.now),
            found or Position(),
        )
        self.now_ns = max(self.now_ns, now_ns)
        self._decide(Emit("verify_started", {"peer": peer, "heals": is_healing}))
        self._pump()
        return run

    def stop_verify(self, peer: str, reason: str, now_ns: int) -> None:
        """End a verify where it is."""
        self.now_ns = max(self.now_ns, now_ns)
        run = self.verifies.get(peer)
        if run is not None and not run.is_over:
            self._give_up_round(run)
            run.state, run.reason = STOPPED, reason
            self._decide(Emit("verify_stopped", {"peer": peer, "reason": reason}))

    def is_comparable(self, peer: str) -> bool:
        """Whether something could be compared with a peer right now."""
        sender = self.senders.get(peer)
        return sender is not None and not self._why_not(sender)

    # The machinery.

    def _pump_verifies(self) -> None:
        for run in self.verifies.values():
            if not run.is_over:
                self._pump_verify(run)

    def _pump_verify(self, run: VerifyRun) -> None:
        sender = self.senders[run.peer]
        waits = self._why_not(sender)
        if waits:
            self._give_up_round(run)
            run.reason = waits
            return
        if run.round is not None:
            self._pump_round(run, run.round, sender)
        if run.round is None and self.now_ns >= run.not_before_ns:
            run.reason = ""
            if run.to_heal or self._healing is run:
                self._pump_heal(run)
            elif not self.is_running(_kind(run)):
                self._begin_round(run, sender)

    def _why_not(self, sender: Sender) -> str:
        """Why nothing can be compared with a peer now, "" if it can."""
        if not sender.is_open:
            return "not connected"
        if sender.name not in self._takes_verify:
            return "it runs a version that does not know verify: update it"
        if sender.mode != STREAM or sender.data_state != "consistent":
            return f"it catches up ({sender.mode})"
        if sender.is_paused:
            return "shipping is paused"
        return "it is being stopped" if self.is_draining or self._is_stopping else ""

    def _begin_round(self, run: VerifyRun, sender: Sender) -> None:
        epoch = self.engine.sealed_epoch
        sizes = self.engine.sizes.at(epoch)
        span = run.next_span(sizes)
        if span is None:
            self._at_the_end(run, sender)
            return
        run.give_back([span])
        self._verify_number += 1
        number = self._verify_number
        try:
            content = EpochContent(self.engine, epoch, f"verify {number}")
        except GeomirrorError as error:
            self._again(run, error.message)
            return
        limits = self.limits
        left_bytes = min(ROUND_S * run.bytes_per_second, limits.verify_round_bytes_max)
        run.round = Round(number, epoch, content, left_bytes, ROUND_ASKS_MAX, self.now_ns)
        # At once: it has to be there before the commit of a later epoch.
        self._send_verify(run, VerifyPin(self.session, number, epoch))
        self._pump_round(run, run.round, sender)

    def _pump_round(self, run: VerifyRun, current: Round, sender: Sender) -> None:
        if self._room_wanted:
            self._again(run, "writers wait for room in the journal")
            return
        if current.content is not None and current.reading is None:
            self._read_next(run, current, current.content)
        if sender.durable_epoch < current.epoch:
            current.progress_ns = self.now_ns
        if current.content is None and current.reading is None and not current.asks:
            run.round = None
            self._send_verify(run, VerifyPin(self.session, current.number, 0))
        elif self.now_ns >= current.progress_ns + ANSWER_NS_MAX and current.asks:
            self._again(run, "it does not answer")

    def _read_next(self, run: VerifyRun, current: Round, content: EpochContent) -> None:
        if self.is_running(_kind(run)) or self.now_ns < run.not_before_ns:
            return
        if len(current.asks) >= ASKS_MAX:
            return
        is_enough = current.left_bytes <= 0 or current.left_asks <= 0
        span = None if is_enough else run.next_span(content.sizes)
        if span is None:
            content.release()
            current.content = None
            return
        current.reading = span
        limits = self.limits
        a_while_bytes = run.bytes_per_second // 8
        job = RangeDigests(
            content,
            *span,
            region_blocks=limits.verify_region_blocks,
            bytes_max=min(a_while_bytes, limits.verify_read_bytes_max, current.left_bytes),
        )
        self._run(_kind(run), job, partial(self._verify_read, run, current))

    def _verify_read(self, run: VerifyRun, current: Round, job: RangeDigests) -> None:
        span, current.reading = current.reading, None
        if current.is_over:
            job.content.release()
            return
        assert span is not None
        self._verify_number += 1
        number, step = self._verify_number, self.limits.verify_region_blocks
        span = run.taken(span, job.count)
        current.asks[number] = Ask(span, job.low, job.high, job.read_bytes)
        current.left_bytes -= job.read_bytes
        current.left_asks -= 1
        run.not_before_ns = self.now_ns + job.read_bytes * SECOND // run.bytes_per_second
        digests = region_digests(job.low, job.high, step)
        self._send_verify(
            run,
            VerifyAsk(
                *(self.session, current.number, number, *span, step),
                *(digests, run.bytes_per_second),
            ),
        )

    def _verify_answered(self, sender: Sender, answer: VerifyAnswer) -> None:
        run = self.verifies.get(sender.name)
        current = run.round if run is not None else None
        if run is None or current is None or answer.number != current.number:
            return  # Of a round that was given up.
        ask = current.asks.get(answer.ask)
        if ask is None:
            raise RemoteProtocolError(f'"{sender.name}" answers what it was not asked')
        if answer.compared_blocks == 0:
            self._again(run, answer.reason)
            return
        is_first = run.found.different_blocks == 0
        runs = run.compared(ask, answer)
        del current.asks[answer.ask]
        current.progress_ns = self.now_ns
        run.epoch = max(run.epoch, current.epoch)
        more_bytes = max(0, min(answer.read_bytes, ask.span.blocks * BLOCK_BYTES) - ask.read_bytes)
        pause_ns = more_bytes * SECOND // run.bytes_per_second
        run.not_before_ns = max(run.not_before_ns, self.now_ns) + pause_ns
        if runs and (is_first or run.is_rechecking):
            fields: dict[str, object] = {
                "peer": run.peer,
                "epoch": current.epoch,
                "volume": runs[0].volume,
                "block": runs[0].first,
                "blocks": sum(each.blocks for each in runs),
                "heals": run.is_healing and not run.is_rechecking,
            }
            self._decide(Emit("verify_mismatch", fields))

    # The end.

    def _at_the_end(self, run: VerifyRun, sender: Sender) -> None:
        """Everything is compared: once what was written again is applied there, look again."""
        if run.rechecks:
            if sender.applied_epoch < run.heal_epoch:
                run.reason = "what was written again is on its way"
                return
            run.is_rechecking = True
            run.todo.extend(run.rechecks)
            run.rechecks = []
            run.not_before_ns = self.now_ns + 1
            return
        run.state = DONE
        found = run.found
        fields: dict[str, object] = {
            "peer": run.peer,
            "result": run.result,
            "epoch": run.epoch,
            "compared_blocks": found.compared_blocks,
        }
        if run.result != CLEAN:
            fields["different_blocks"] = found.different_blocks
            fields["healed_blocks"] = found.healed_blocks
        self._decide(Emit("verify_ended", fields))

    def _again(self, run: VerifyRun, reason: str) -> None:
        self._give_up_round(run)
        run.reason = reason
        run.not_before_ns = self.now_ns + AGAIN_NS

    def _give_up_round(self, run: VerifyRun) -> None:
        ended = run.end_round()
        if ended is None:
            return
        if ended.content is not None and not self.is_running(_kind(run)):
            ended.content.release()
        self._send_verify(run, VerifyPin(self.session, ended.number, 0))

    def _send_verify(self, run: VerifyRun, message: VerifyPin | VerifyAsk) -> None:
        if self.senders[run.peer].is_open and not self.is_frozen:
            self._decide(SendMessage(run.peer, self.session, message))

    def _job_failed(self, run: RunJob, error: GeomirrorError) -> None:
        """What a look at the content finds in its way does not stop the resource."""
        if not isinstance(run.job, RangeDigests):
            super()._job_failed(run, error)
            return
        job, verify = run.job, self.verifies.get(run.kind.removeprefix("verify:"))
        current = None if verify is None else verify.round
        if verify is not None and current is not None and current.reading is not None:
            self._again(verify, error.message)
        job.content.release()

    # What else happens to a session or a role.

    def verify_timers(self) -> list[int]:
        """When `handle_timer` has something to do for a verify."""
        times: list[int] = []
        for run in self.verifies.values():
            if run.is_over or self._why_not(self.senders[run.peer]):
                continue
            if run.not_before_ns > self.now_ns:
                times.append(run.not_before_ns)
            if run.round is not None and run.round.asks:
                times.append(max(self.now_ns + SECOND, run.round.progress_ns + ANSWER_NS_MAX))
        return times

    def _session_opened(self, sender: Sender, message: SessionAccept) -> None:
        super()._session_opened(sender, message)
        self._give_up_verify(sender.name)
        self._takes_verify.discard(sender.name)
        if message.takes_verify:
            self._takes_verify.add(sender.name)

    def _give_up_verify(self, name: str) -> None:
        """The session is gone: what was asked in it is asked again in the next one."""
        run = self.verifies.get(name)
        if run is not None:
            self._give_up_round(run)

    def remove_peer(self, name: str) -> None:
        """Forget the peer, and end a verify of it."""
        self.stop_verify(name, "it is no member any more", self.now_ns)
        self.verifies.pop(name, None)
        super().remove_peer(name)

    def freeze(self) -> None:
        """Start nothing more, for good; another core may go on with the engine."""
        self._stop_all("the role changes")
        super().freeze()

    def _release_everything(self, error: GeomirrorError) -> None:
        self._stop_all(error.message)
        super()._release_everything(error)

    def _stop_all(self, reason: str) -> None:
        for run in self.verifies.values():
            self._give_up_round(run)
            run.reason = reason


def _kind(run: VerifyRun) -> str:
    return f"verify:{run.peer}"
