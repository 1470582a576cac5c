"""How a primary learns that somebody else was promoted, and stops.

```
 SessionOpen ────┐                          higher ─▶ fenced at once, `superseded_by` set
 SessionRefuse ──┴─ chain ─▶ whose claim? ──┤
                                            lower ──▶ SessionRefuse with the own chain
```
Invariants (I8): two primaries that hear of each other agree on which of them stops, before either
takes anything from the other; who stops answers nothing as done from that moment on, and keeps all
that it has (I13). Deliberately not here: making it durable and what becomes of the tail (the node).
"""

from __future__ import annotations

from collections.abc import Sequence

from geomirror.cluster.history import outranks
from geomirror.errors import GeomirrorError, SupersededError
from geomirror.limits import Limits
from geomirror.volume.engine import Engine
from geomirror.volume.generations import chain_records
from geomirror.wan_protocol.decisions import Emit, FlushDone, SendMessage
from geomirror.wan_protocol.epoch_sealing import EpochSealing
from geomirror.wan_protocol.messages import (
    GenerationEntry,
    SessionOpen,
    SessionRefuse,
    StartEntry,
)
from geomirror.wan_protocol.primary_starts import check_starts, start_entries
from geomirror.wan_protocol.session import chain_entries


class Supersession(EpochSealing):
    """The part of the primary that may lose its role."""

    session: int

    def __init__(self, engine: Engine, limits: Limits) -> None:
        super().__init__(engine, limits)
        self.superseded_by: list[GenerationEntry] = []
        """The chain with the higher token, once one was heard of."""
        self.superseded_starts: list[StartEntry] = []
        """The starts of that history, as far as they were told."""
        self.is_draining = False

    def resume_superseded(self) -> None:
        """At a start: the superblock says that a higher token was seen."""
        known = self.engine.superblock.superseded_by
        if known:
            chain = chain_entries(self.engine.superblock, known)
            starts = start_entries(self.engine.superblock.superseded_starts)
            self._superseded(chain[-1].by, chain, starts)

    def supersede(
        self, peer: str, chain: Sequence[GenerationEntry], starts: Sequence[StartEntry] = ()
    ) -> bool:
        """Stop if the chain has a higher claim and is about the same data; whether it has.

        :param starts: of that history, as far as they are known.
        :raises RemoteProtocolError: they cannot be.
        """
        check_starts(starts)
        mine = chain_entries(self.engine.superblock)
        is_related = bool(chain) and bool(mine) and chain[0].identity == mine[0].identity
        if not is_related or not outranks(chain, mine):
            return False
        if self.is_frozen and not self.superseded_by:
            return True  # It is becoming a secondary already.
        if not self.superseded_by or outranks(chain, self.superseded_by):
            self._superseded(peer, chain, starts)
        return True

    def _heard_primary(self, peer: str, message: SessionOpen) -> None:
        """Another member offers a session as the primary."""
        superblock = self.engine.superblock
        if message.resource.hex() != superblock.resource_id:
            return
        if self.supersede(peer, message.chain, message.starts):
            return
        mine = chain_entries(superblock)
        error = SupersededError(
            f'"{peer}" offers token {message.chain[-1].token if message.chain else 0} of '
            f'"{superblock.name}", token {mine[-1].token if mine else 0} is written here'
        )
        starts = start_entries(superblock.starts)
        refuse = SessionRefuse(self.session, error.wire_code, str(error), mine, starts)
        self._decide(SendMessage(peer, self.session, refuse))

    def _superseded(
        self, peer: str, chain: Sequence[GenerationEntry], starts: Sequence[StartEntry]
    ) -> None:
        superblock = self.engine.superblock
        is_new = not self.superseded_by
        self.superseded_by, self.superseded_starts = list(chain), list(starts)
        mine, theirs = superblock.chain[-1].token, chain[-1].token
        by = chain[-1].by or peer
        self.fenced = SupersededError(
            f'resource "{superblock.name}" holds token {mine} here, "{by}" holds {theirs}: '
            "nothing is written here any more",
            hint=f'run "geomirror status {superblock.name}"',
        )
        if not is_new:
            return
        self.retire(self.fenced)
        if chain_records(chain) != superblock.superseded_by:
            self._decide(Emit("superseded", {"by": by, "token": theirs, "own_token": mine}))

    def retire(self, error: GeomirrorError) -> None:
        """Answer nothing as done from now on, but with this error. What runs ends as usual: the
        engine is used on, by another core or to keep the tail."""
        self.fenced = error
        self.freeze()
        for token, _ in self._flushes:
            self._decide(FlushDone(token, error))
        self._flushes.clear()
        self._release_everything(error)

    # Orderly demotion.

    def drain(self, now_ns: int) -> None:
        """Hold writers back and seal everything; `is_sealed` tells when that is done."""
        self.is_draining = True
        self.seal_now(now_ns)

    def undrain(self, now_ns: int) -> None:
        """Go on as before: writers that were held back may try again."""
        self.now_ns = max(self.now_ns, now_ns)
        self.is_draining = False
        self._room_wanted = True
        self._pump()
