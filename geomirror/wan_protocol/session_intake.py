"""Which primary a secondary follows, and how a session with it begins.

```
 SessionOpen ─▶ may it be followed? ─no─▶ SessionRefuse, the session there is goes on
                     │ yes: equal, or a part of what it offers, by the chain with the highest token
                     ▼
              chain durable ─▶ everything received durable ─▶ SessionAccept

 a higher token, and epochs here that it has not ─▶ *diverged*: nobody with less is followed
```
Invariants: nothing is taken from a primary whose token is lower than one that was seen here, even
before a crash (I8), so a chain is durable before its session is accepted; a primary with another
history never changes any data here, whatever its token. Deliberately not here: what arrives in a
session, and giving up what makes a copy diverge (the node).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from geomirror.cluster.history import compare, history, outranks
from geomirror.errors import (
    GeomirrorError,
    IntegrityError,
    PutBackError,
    RefusedError,
    SplitBrainError,
    SupersededError,
)
from geomirror.limits import Limits
from geomirror.volume.engine import Engine
from geomirror.volume.engine_base import NO_GENERATION
from geomirror.volume.generations import chain_records
from geomirror.wan_protocol.decisions import Emit
from geomirror.wan_protocol.growth import volumes_at
from geomirror.wan_protocol.incoming import number_bitmap
from geomirror.wan_protocol.messages import (
    GenerationEntry,
    SessionAccept,
    SessionOpen,
    SessionRefuse,
    StartEntry,
)
from geomirror.wan_protocol.primary_starts import check_starts, start_entries, start_records
from geomirror.wan_protocol.resync_intake import ResyncIntake
from geomirror.wan_protocol.session import (
    chain_entries,
    highest_chain,
    highest_starts,
    my_history,
    session_problem,
)

SPOOLED_REPORTED_MAX = 64
"""Epochs under way that are reported when a session opens; the rest is sent again."""
HISTORY_FRACTION = 0.25
"""Of the journal, for epochs that the other members may lack: after a promotion they stream on from
there instead of being copied anew. As much as a peer's backlog may take before it is folded."""


class SessionIntake(ResyncIntake):
    """The part of the secondary that chooses whom to listen to."""

    members: list[str]

    def __init__(self, engine: Engine, limits: Limits, *, primary: str) -> None:
        super().__init__(engine, limits, primary=primary)
        self.is_open = False
        self.is_link_up = False
        self.refusal = ""
        self.put_back_primary = ""
        """The primary, while it is refused because it has lost epochs that are here."""
        self.primary_epoch = 0
        self._is_accepting = False
        self._is_adopting = False
        self._incarnation = b""

    def opened(self, peer: str, message: SessionOpen) -> None:
        """A member offers a session as the primary. :raises RemoteProtocolError: nobody can."""
        check_starts(message.starts)
        problem = self._problem_with(peer, message)
        if isinstance(problem, SplitBrainError):
            self._note_higher(peer, message.chain, message.starts)
        if problem is not None:
            if peer == self.primary:
                self._refuse_session(problem)
            else:
                self._refuse(peer, problem)
            return
        engine = self.engine
        if peer != self.primary:
            self.keep_standing_now()
            self.primary, self.is_link_up = peer, True
            fields: dict[str, object] = {"primary": peer, "epoch": message.epoch}
            self._decide(Emit("primary_changed", fields))
        if message.incarnation != self._incarnation:
            # Another start of the primary may cut the same epoch into other frames.
            self.forget_incoming()
            self._incarnation = message.incarnation
        self.marks.forget()
        if engine.superblock.superseded_by:
            # What is here is a part of the history with the highest token, after all.
            engine.superblock.superseded_by, engine.superblock.superseded_starts = [], []
            self._checkpoint_wanted = True
        if message.chain and message.chain != chain_entries(engine.superblock):
            is_first = engine.generation == NO_GENERATION
            engine.adopt_chain(message.chain)
            self.standing_version = 0
            self._checkpoint_wanted = True
            self._is_adopting = not is_first
        starts = start_records(message.starts)
        if message.chain and starts != engine.superblock.starts:
            engine.superblock.starts = starts
            self._checkpoint_wanted = self._is_adopting = True
        self.is_open = False
        self.refusal = self.put_back_primary = ""
        self.resync = None
        self.primary_epoch = message.epoch
        self._is_accepting = True
        if engine.committed_epoch > engine.sealed_epoch:
            self._sync_wanted = True  # The position is told when it stands.
        self._try_accept()

    def hear_chain(
        self, peer: str, chain: Sequence[GenerationEntry], starts: Sequence[StartEntry] = ()
    ) -> None:
        """A member knows of this chain: if it has the highest claim and leaves out epochs that are
        here, nobody with less is followed any more. :raises RemoteProtocolError: nobody can."""
        check_starts(starts)
        theirs = history(chain, chain[-1].parent_epoch, chain[-1].parent_hash, starts=starts)
        is_behind = compare(my_history(self.engine), theirs).may_follow
        if not is_behind and not self.is_frozen and self.fenced is None:
            self._note_higher(peer, chain, starts)
            self._pump()

    @property
    def is_outranked(self) -> bool:
        """A history with a higher token lacks epochs that are here."""
        return bool(self.engine.superblock.superseded_by)

    def _note_higher(
        self, peer: str, chain: Sequence[GenerationEntry], starts: Sequence[StartEntry] = ()
    ) -> None:
        """Remember the chain; it is durable with the next checkpoint."""
        superblock = self.engine.superblock
        mine = chain_entries(superblock)
        is_related = bool(chain) and bool(mine) and chain[0].identity == mine[0].identity
        if not is_related or not outranks(chain, highest_chain(superblock)):
            return
        superblock.superseded_by = chain_records(chain)
        superblock.superseded_starts = start_records(starts)
        self._checkpoint_wanted = True
        maker = chain[-1].by or peer
        if maker != self.primary:
            if self.is_open or self._is_accepting:
                text = f'token {chain[-1].token} of "{superblock.name}" is known here'
                self._refuse(self.primary, SupersededError(text))
            self.keep_standing_now()
            self.primary, self.is_link_up = maker, maker == peer
            self.refusal = self.put_back_primary = ""
        self.close_session()
        self.resync = None
        fields: dict[str, object] = {"by": maker, "token": chain[-1].token}
        self._decide(Emit("diverged", {**fields, "epoch": self.engine.committed_epoch}))

    def _problem_with(self, peer: str, message: SessionOpen) -> GeomirrorError | None:
        name = self.engine.superblock.name
        if self.fenced is not None:
            return RefusedError(str(self.fenced))
        problem = session_problem(self.engine, peer, message)
        if problem is None and peer != self.primary:
            # Two nodes with the same chain: only who made its last generation may write to it.
            maker = message.chain[-1].by if message.chain else ""
            if maker != peer:
                text = f'"{peer}" is not the primary of "{name}" here, "{self.primary}" is'
                return RefusedError(text)
        return problem

    def _try_accept(self) -> None:
        is_durable = self.engine.sealed_epoch == self.engine.committed_epoch
        if self._is_accepting and is_durable and not self._is_adopting:
            self._accept()

    def _accept(self) -> None:
        engine = self.engine
        self._is_accepting = False
        self.is_open = True
        self.taken_bytes = self._unreported_bytes = 0
        spooled = [i for i in self.incoming.values() if i.parts]
        for incoming in spooled[SPOOLED_REPORTED_MAX:]:
            incoming.drop_parts()
        self._send(
            SessionAccept(
                self.session,
                engine.generation,
                engine.sealed_epoch,
                engine.sealed_hash,
                self._applied_reported,
                self.data_state,
                [(i.number, number_bitmap(set(i.parts))) for i in spooled[:SPOOLED_REPORTED_MAX]],
                self._credit(),
                engine.superblock.consistent_from,
                self.standing_version,
                takes_marks=True,
                volumes=volumes_at(engine, engine.sealed_epoch),
                held_epoch=-1 if engine.held is None else engine.held.epoch,
                gives_digests=True,
                takes_verify=True,
            )
        )
        for incoming in self.incoming.values():
            incoming.commit = None
        fields: dict[str, object] = {"peer": self.primary, "epoch": self.primary_epoch}
        self._decide(Emit("primary_connected", fields))

    def _credit(self) -> int:
        return self.credit_bytes(None if self.resync is None else self.resync.queued_bytes)

    def close_session(self) -> None:
        """The link is gone, or the resource stops."""
        self.is_open = self._is_accepting = False

    # Refusals.

    def _diverged(self, error: IntegrityError) -> None:
        """What arrived is not what the primary sealed: take nothing, say so, ask again anew."""
        self.forget_incoming()
        self._refuse_session(error)

    def _refuse_session(self, error: GeomirrorError) -> None:
        self.close_session()
        self.resync = None
        if str(error) != self.refusal:  # It is tried again and again.
            self._decide(Emit("session_refused", {"reason": str(error)}))
            if isinstance(error, PutBackError):
                self._decide(Emit("put_back", {"peer": self.primary, "reason": str(error)}))
        self.refusal = str(error)
        self.put_back_primary = self.primary if isinstance(error, PutBackError) else ""
        self._refuse(self.primary, error)

    def _refuse(self, peer: str, error: GeomirrorError) -> None:
        superblock = self.engine.superblock
        refuse = SessionRefuse(self.session, error.wire_code, str(error))
        if isinstance(error, SupersededError):
            chain, starts = highest_chain(superblock), start_entries(highest_starts(superblock))
            refuse = msgspec.structs.replace(refuse, chain=chain, starts=starts)
        self._send_to(peer, refuse)

    # Persistence.

    def _pump_checkpoint(self) -> None:
        if self._checkpoint_wanted and not self.is_running("checkpoint"):
            limits, journal = self.limits, self.engine.journal
            needed = 2 * (limits.fold_bytes_max + limits.epoch_bytes_max)
            is_scarce = journal.room_bytes() < needed
            kept = 0 if is_scarce else int(journal.bytes_total * HISTORY_FRACTION)
            self.engine.keep_history(self.members, kept)
        super()._pump_checkpoint()

    def _checkpoint_done(self, job: Any) -> None:
        written, wanted = job.superblock, self.engine.superblock
        if (written.chain, written.starts) == (wanted.chain, wanted.starts):
            self._is_adopting = False
        super()._checkpoint_done(job)
        self._try_accept()
