"""One circuit: joins an application's TCP connection with the connection to the peer.

```
 application ──data, EOF──▶ ┌─────────┐ ──DATA…, END──▶ peer
             ◀─data, EOF─── │ Circuit │ ◀─DATA…, END───
                            └─────────┘ ◀─────DONE────▶
 out:  open ──END sent──▶ ended ──DONE came──▶ over
 in:   open ──END came──▶ ended ──handed over, DONE sent──▶ over
```
Invariant: it *finishes* only when both directions are over; everything else that ends it is a
*reset*, on both sides, so that no application takes a part for the whole. Nothing comes after
`Finish` or `Reset`.
Deliberately not here: sockets, holding back a side that is too fast (`circuit_io`), who may connect
to what (`service_policy`).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from geomirror.errors import ProtocolError, RemoteProtocolError
from geomirror.tunnel.circuit_pieces import DATA, DONE, END, PieceReader, pack


@dataclass(frozen=True, slots=True)
class ToPeer:
    """Send these bytes to the peer."""

    data: bytes


@dataclass(frozen=True, slots=True)
class ToApplication:
    """Hand these bytes to the application; valid until the next call."""

    data: memoryview


@dataclass(frozen=True, slots=True)
class EndApplication:
    """Close the sending side towards the application, and call `application_flushed` when it has
    all that it was sent."""


@dataclass(frozen=True, slots=True)
class Finish:
    """Close both connections: nothing is under way any more."""


@dataclass(frozen=True, slots=True)
class Reset:
    """Reset both connections."""

    reason: str


Decision = ToPeer | ToApplication | EndApplication | Finish | Reset


class Circuit:
    """Decides; feed it events and run its decisions at once."""

    def __init__(self) -> None:
        self._reader = PieceReader()
        self._decisions: deque[Decision] = deque()
        self._is_sending = True
        """The application has not ended."""
        self._is_receiving = True
        self._is_sent = False
        """The peer has handed over all that we sent."""
        self._is_handed_over = False
        self.is_over = False
        self.bytes_sent = 0
        """Of the application, to the peer."""
        self.bytes_received = 0

    @property
    def is_sending(self) -> bool:
        """Whether the application may still say something."""
        return self._is_sending and not self.is_over

    def next_decision(self) -> Decision | None:
        """The next thing to do, in order."""
        return self._decisions.popleft() if self._decisions else None

    # The application.

    def application_sent(self, data: memoryview) -> None:
        """Bytes of the application, at most a piece."""
        if self.is_sending:
            self.bytes_sent += len(data)
            self._decisions.append(ToPeer(pack(DATA, data)))

    def application_ended(self) -> None:
        """The application has closed its sending side."""
        if self.is_sending:
            self._is_sending = False
            self._decisions.append(ToPeer(pack(END)))

    def application_flushed(self) -> None:
        """All that came before the peer's END is handed over, and so is the end."""
        if not self.is_over and not self._is_receiving and not self._is_handed_over:
            self._is_handed_over = True
            self._decisions.append(ToPeer(pack(DONE)))
            self._look()

    def application_lost(self, reason: str) -> None:
        """Its connection is gone."""
        self.abort(reason)

    # The peer.

    def peer_sent(self, view: memoryview) -> None:
        """Bytes of the peer; what it may not say resets the circuit."""
        try:
            for kind, data in self._reader.feed(view):
                if self.is_over:
                    return
                self._piece(kind, data)
        except ProtocolError as error:
            self.abort(f"protocol error: {error}")

    def peer_lost(self, reason: str) -> None:
        """The connection to the peer is gone."""
        self.abort(reason)

    def abort(self, reason: str) -> None:
        """Reset it, unless it is over."""
        if not self.is_over:
            self.is_over = True
            self._decisions.append(Reset(reason))

    def _piece(self, kind: int, data: memoryview) -> None:
        if kind == DONE:
            if self._is_sending or self._is_sent:
                raise RemoteProtocolError("DONE without an END")
            self._is_sent = True
            self._look()
        elif not self._is_receiving:
            raise RemoteProtocolError("more after the END")
        elif kind == END:
            self._is_receiving = False
            self._decisions.append(EndApplication())
        else:
            self.bytes_received += len(data)
            self._decisions.append(ToApplication(data))

    def _look(self) -> None:
        if self._is_sent and self._is_handed_over:
            self.is_over = True
            self._decisions.append(Finish())
