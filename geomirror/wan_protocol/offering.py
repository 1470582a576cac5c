"""The primary's side of a session's begin: it is offered once this start of the primary is durable.

```
 start ─▶ listed in the superblock (`primary_starts`) ─▶ SessionOpen, to each peer with a link
```
Deliberately not here: what a peer answers (`primary`), why it may refuse (`session`).
"""

from __future__ import annotations

from typing import Any

from geomirror.limits import Limits
from geomirror.volume.engine import Engine
from geomirror.wan_protocol.decisions import SendMessage
from geomirror.wan_protocol.growth import volumes_at
from geomirror.wan_protocol.messages import SessionOpen
from geomirror.wan_protocol.primary_starts import add_start, start_entries
from geomirror.wan_protocol.sender import UNANSWERED_NS, Sender
from geomirror.wan_protocol.session import chain_entries
from geomirror.wan_protocol.verifying import Verifying


class Offering(Verifying):
    """The part of the primary that offers sessions."""

    def __init__(self, engine: Engine, limits: Limits, incarnation: bytes) -> None:
        super().__init__(engine, limits)
        self.incarnation = incarnation
        # The next checkpoint, which each start begins with, makes it durable.
        add_start(engine.superblock, incarnation, engine.sealed_epoch, engine.sealed_hash)
        self._is_start_durable = False

    def _offer(self, sender: Sender) -> None:
        # A superseded primary, say, has no answer, until it follows.
        sender.reopen_at_ns = self.now_ns + UNANSWERED_NS
        if not self._is_start_durable:
            return  # Offered as soon as it is.
        superblock = self.engine.superblock
        message = SessionOpen(
            self.session,
            bytes.fromhex(superblock.resource_id),
            superblock.name,
            chain_entries(superblock),
            volumes_at(self.engine, self.engine.sealed_epoch),
            self.engine.sealed_epoch,
            self.engine.sealed_hash,
            self.incarnation,
            start_entries(superblock.starts),
        )
        self._decide(SendMessage(sender.name, self.session, message))

    def _checkpoint_done(self, job: Any) -> None:
        super()._checkpoint_done(job)
        is_first = not self._is_start_durable
        self._is_start_durable = True
        for sender in self.senders.values():
            if is_first and sender.is_link_up and not self.is_frozen:
                self._offer(sender)
