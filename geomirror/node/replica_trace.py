"""What `log.level = "debug"` adds of a resource: how sessions are negotiated, and its passes.

Never a line for a write, a flush, a frame or an epoch; nothing of a volume's content, and no key.
"""

from __future__ import annotations

import structlog

from geomirror.environment import MS, Clock
from geomirror.errors import GeomirrorError
from geomirror.node.log import is_debugging
from geomirror.wan_protocol.messages import (
    ResyncBegin,
    ResyncEnd,
    SessionAccept,
    SessionOpen,
    SessionRefuse,
)

_log = structlog.get_logger(component="replica")
PASSES = frozenset({"apply", "thin", "grow", "return"})
"""Jobs that are of interest one by one: blocks into the images, undo that is merged, a growth, and
before-images that go back behind a promotion."""
_REASON_MAX = 300


class ReplicaTrace:
    """Of one resource, on the event loop; silent unless the level is debug."""

    def __init__(self, name: str, clock: Clock) -> None:
        self._name = name
        self._clock = clock
        self._began_ns: dict[str, int] = {}

    def told(self, peer: str, message: object, *, is_sent: bool) -> None:
        """A message went to a peer, or came from it."""
        if not is_debugging():
            return
        fields = step_of(message)
        if fields is not None:
            way = "sent" if is_sent else "received"
            _log.debug("session_step", resource=self._name, peer=peer, way=way, **fields)

    def began(self, kind: str) -> None:
        """A job begins; of each kind there is one at a time."""
        if kind in PASSES and is_debugging():
            self._began_ns[kind] = self._clock.now_ns()

    def ended(self, kind: str, error: GeomirrorError | None, applied_epoch: int) -> None:
        """It has ended."""
        began_ns = self._began_ns.pop(kind, None)
        if began_ns is None or not is_debugging():
            return
        _log.debug(
            "pass_ended",
            resource=self._name,
            kind=kind,
            milliseconds=(self._clock.now_ns() - began_ns) // MS,
            applied_epoch=applied_epoch,
            error=None if error is None else str(error),
        )


def step_of(message: object) -> dict[str, object] | None:
    """The fields that are said of a message; None: it is none of a negotiation."""
    match message:
        case SessionOpen():
            token = message.chain[-1].token if message.chain else 0
            generation = message.chain[-1].identity.hex()[:8] if message.chain else ""
            fields = {"step": "open", "epoch": message.epoch, "token": token}
            return {**fields, "generation": generation}
        case SessionAccept():
            return {
                "step": "accept",
                "durable_epoch": message.durable_epoch,
                "applied_epoch": message.applied_epoch,
                "data_state": message.data_state,
                "generation": message.generation.hex()[:8],
            }
        case SessionRefuse():
            return {"step": "refuse", "reason": message.error_text[:_REASON_MAX]}
        case ResyncBegin():
            fields = {"step": "resync_begin", "epoch": message.epoch}
            return {**fields, "number": message.number, "bytes": message.total_bytes}
        case ResyncEnd():
            return {"step": "resync_end", "epoch": message.epoch, "number": message.number}
    return None
