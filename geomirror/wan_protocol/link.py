"""Keeps one node pair connected: when to dial, when the peer is gone, which connections to use.

```
            ┌ attempts: dialled, no control connection yet (at most 3, the oldest gives way)
 LinkCore ──┼ sets: control connection up, data connections joining (connection_set)
            └ current: the one set that is used; None means the link is down
```
Invariants: messages and frames go over `current` only; `Up` and `Down` alternate; a change from one
set to another is a `Down` followed by an `Up`, so that every user resumes its sessions.
After a silence a new set is dialled *beside* the old one, which stays until the new one is up: a
TCP that waits for its timer needs 3 to 16 s after an outage of 10 to 30 s, a new connection 0.2 s.
Deliberately not here: sockets, what is sent, and routes over third nodes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from geomirror.environment import SECOND, Entropy
from geomirror.limits import Limits
from geomirror.wan_protocol.connection_set import ConnectionSet, RoundTrip, choose

OPEN_NS_MAX = 10 * SECOND
"""An attempt, or a set without a data connection, is given up after this time."""
ATTEMPTS_MAX = 3
"""Attempts under way at once: a SYN lost in the outage must not delay the next try by its timer."""
SETS_MAX = 8
"""Sets of one node pair at once; a peer that opens more is turned away."""
LINGER_NS = 1 * SECOND
"""A set that lost the choice is closed after this time: the peer may not have chosen yet."""
SILENT_NS_MAX = 30 * SECOND
"""A silent set is kept this long in the hope that it speaks again."""
SLOW_AFTER_NS = 60 * SECOND
"""After a minute of failures attempts come five times slower, after five minutes at the cap."""


@dataclass(frozen=True, slots=True)
class Dial:
    """Open a control connection (`index` −1) or data connection to the endpoint."""

    link: bytes
    endpoint: str
    index: int = -1


@dataclass(frozen=True, slots=True)
class Close:
    """Close every connection and dial attempt of this set."""

    link: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class SendPing:
    """Send a ping on the control connection of this set."""

    link: bytes
    now_ns: int


@dataclass(frozen=True, slots=True)
class Up:
    """The link is up and uses this set."""

    link: bytes


@dataclass(frozen=True, slots=True)
class Down:
    """The link is down."""

    reason: str


Decision = Dial | Close | SendPing | Up | Down


@dataclass(slots=True)
class _Attempt:
    endpoint: str
    started_ns: int


class LinkCore:
    """Decides for one peer. Feed it events, run its decisions, call `handle_timer` when due.

    :param endpoints: where the peer can be dialled, tried in turn; empty means that only the peer
        dials.
    """

    def __init__(
        self,
        *,
        node: str,
        peer: str,
        limits: Limits,
        entropy: Entropy,
        endpoints: Sequence[str],
        now_ns: int,
    ) -> None:
        assert node != peer
        self._node = node
        self._peer = peer
        self._limits = limits
        self._entropy = entropy
        self._endpoints = list(endpoints)
        self._turn = 0
        self._attempts: dict[bytes, _Attempt] = {}
        self._sets: dict[bytes, ConnectionSet] = {}
        self._current: ConnectionSet | None = None
        self._decisions: deque[Decision] = deque()
        self._failing_since_ns = now_ns
        self._dial_ns = now_ns
        self._due_ns: int | None = None
        """What `get_timer` said last: being called much later means that this node slept."""
        self.data_connections = limits.data_connections
        """Data connections of sets that this node dials."""
        self.round_trip = RoundTrip()
        """Of the current set; after an outage, of the last one."""
        self.last_error = ""

    @property
    def current(self) -> ConnectionSet | None:
        """The set in use, if the link is up."""
        return self._current

    def is_opening(self, link: bytes) -> bool:
        """Whether this set has its control connection and waits for a data connection."""
        return link in self._sets and self._sets[link].established_ns is None

    def set_endpoints(self, endpoints: Sequence[str], now_ns: int) -> None:
        """Use other endpoints for attempts from now on; established sets stay."""
        if list(endpoints) == self._endpoints:
            return
        self._endpoints, self._turn = list(endpoints), 0
        self._dial_ns = min(self._dial_ns, now_ns)
        self._settle(now_ns)

    # Events of connections.

    def dial_failed(self, link: bytes, index: int, reason: str, now_ns: int) -> None:
        """A connection asked for by `Dial` could not be made, or its hello was refused."""
        self.last_error = reason
        if index < 0:
            self._attempts.pop(link, None)
        elif link in self._sets:
            self._sets[link].data_due_ns[index] = now_ns + self._jittered(self._retry_ns())
        self._settle(now_ns)

    def control_up(self, link: bytes, now_ns: int, *, is_dialled: bool) -> None:
        """Hellos were exchanged on a control connection: the set exists from now on."""
        assert link not in self._sets
        attempt = self._attempts.pop(link, None)
        if is_dialled and attempt is None:
            self._decisions.append(Close(link, "given up before it came up"))
            return
        if len(self._sets) >= SETS_MAX:
            self._decisions.append(Close(link, f"more than {SETS_MAX} sets of connections"))
            return
        item = ConnectionSet(
            link=link,
            is_dialled=is_dialled,
            endpoint=attempt.endpoint if attempt else "",
            opened_ns=now_ns,
            heard_ns=now_ns,
            echo_ns=now_ns,
            round_trip=RoundTrip(),
            ping_ns=now_ns,
        )
        if is_dialled:
            if item.endpoint in self._endpoints:
                self._turn = self._endpoints.index(item.endpoint)
            item.data_due_ns = dict.fromkeys(range(self.data_connections), now_ns)
        self._sets[link] = item
        self._settle(now_ns)

    def data_up(self, link: bytes, index: int, now_ns: int) -> None:
        """Hellos were exchanged on a data connection of the set."""
        item = self._sets[link]
        item.data[index] = now_ns
        if item.established_ns is None:
            item.established_ns = now_ns
        self.heard(link, now_ns)
        self._settle(now_ns)

    def data_lost(self, link: bytes, index: int, reason: str, now_ns: int) -> None:
        """A data connection that was up is gone; it is dialled again by the side that dialled."""
        item = self._sets.get(link)
        if item is None:
            return
        self.last_error = reason
        up_ns = item.data.pop(index, now_ns)
        if item.is_dialled and index < self.data_connections:
            # One that dies as soon as it is up must not be dialled in a loop.
            is_short_lived = now_ns - up_ns < self._retry_ns()
            pause_ns = self._retry_ns() if is_short_lived else self._retry_ns() // 8
            item.data_due_ns[index] = now_ns + self._jittered(pause_ns)
        if not item.data:
            item.established_ns, item.opened_ns = None, now_ns
        self._settle(now_ns)

    def set_lost(self, link: bytes, reason: str, now_ns: int) -> None:
        """The control connection is gone, and with it the set."""
        self._attempts.pop(link, None)
        if link in self._sets:
            self.last_error = reason
            self._close(self._sets[link], reason)
        self._settle(now_ns)

    def heard(self, link: bytes, now_ns: int) -> bool:
        """Bytes of the peer arrived on any connection of the set. Cheap: called for each read.

        :returns: whether there is something to do.
        """
        item = self._sets.get(link)
        if item is None:
            return False
        item.heard_ns = now_ns
        if item.is_silent and now_ns < item.silence_deadline_ns(self._limits):
            item.is_silent = False
            self._settle(now_ns)
        return bool(self._decisions)

    def pong(self, link: bytes, sent_ns: int, now_ns: int) -> None:
        """The answer to the ping that carried `sent_ns`."""
        item = self._sets.get(link)
        if item is None or not 0 <= now_ns - sent_ns <= SILENT_NS_MAX:
            return
        item.round_trip.add(now_ns - sent_ns)
        item.echo_ns, item.has_echo = now_ns, True
        if item is self._current:
            self.round_trip = item.round_trip
        self.heard(link, now_ns)

    # Time.

    def get_timer(self) -> int | None:
        """When `handle_timer` has to be called, monotonic ns; `None` if nothing is awaited."""
        due: list[int] = []
        for item in self._sets.values():
            due.append(item.ping_ns)
            due += item.data_due_ns.values()
            if item.established_ns is None:
                due.append(item.opened_ns + OPEN_NS_MAX)
            if item.is_silent:
                due.append(item.heard_ns + SILENT_NS_MAX)
            else:
                due.append(item.silence_deadline_ns(self._limits))
            if item.retire_ns is not None:
                due.append(item.retire_ns)
        due += [attempt.started_ns + OPEN_NS_MAX for attempt in self._attempts.values()]
        if self._wants_dial():
            due.append(self._dial_ns)
        self._due_ns = min(due, default=None)
        return self._due_ns

    def handle_timer(self, now_ns: int) -> None:
        """Do what is due: pings, attempts, silences, closing."""
        if self._due_ns is not None and now_ns - self._due_ns > self._limits.hello_interval_ns:
            # This node slept: what arrived meanwhile has not been read yet.
            for item in self._sets.values():
                item.heard_ns = min(now_ns, item.heard_ns + now_ns - self._due_ns)
                item.echo_ns = min(now_ns, item.echo_ns + now_ns - self._due_ns)
        self._due_ns = None
        for item in list(self._sets.values()):
            self._check_set(item, now_ns)
        for link, attempt in list(self._attempts.items()):
            if now_ns >= attempt.started_ns + OPEN_NS_MAX:
                self._give_up(link, f"{attempt.endpoint}: no answer")
        self._settle(now_ns)

    def next_decision(self) -> Decision | None:
        """The next thing to do, in order; `None` when all is done."""
        return self._decisions.popleft() if self._decisions else None

    def close(self, reason: str) -> None:
        """Close everything; the core is finished afterwards."""
        self._endpoints = []
        for link in list(self._attempts):
            self._give_up(link, reason)
        for item in list(self._sets.values()):
            self._close(item, reason)
        self._choose(0, reason)

    # Decisions.

    def _check_set(self, item: ConnectionSet, now_ns: int) -> None:
        if item.retire_ns is not None and now_ns >= item.retire_ns:
            self._close(item, "replaced by another set of connections")
        elif item.established_ns is None and now_ns >= item.opened_ns + OPEN_NS_MAX:
            self._close(item, "no data connection came up")
        elif item.is_silent and now_ns >= item.heard_ns + SILENT_NS_MAX:
            self._close(item, "silent for too long")
        else:
            if not item.is_silent and now_ns >= item.silence_deadline_ns(self._limits):
                item.is_silent = True
                silence_ms = (now_ns - item.heard_ns) // 1_000_000
                self.last_error = f"nothing heard for {silence_ms} ms"
            if now_ns >= item.ping_ns:
                item.ping_ns = now_ns + item.round_trip.interval_ns(self._limits)
                self._decisions.append(SendPing(item.link, now_ns))

    def _settle(self, now_ns: int) -> None:
        """Choose the set, then dial what is due."""
        self._choose(now_ns, self.last_error)
        for item in self._sets.values():
            for index in [i for i, due in item.data_due_ns.items() if due <= now_ns]:
                del item.data_due_ns[index]
                self._decisions.append(Dial(item.link, item.endpoint, index))
        if self._wants_dial() and now_ns >= self._dial_ns:
            self._dial(now_ns)

    def _choose(self, now_ns: int, reason: str) -> None:
        chosen = choose(self._sets.values(), node=self._node, peer=self._peer)
        if chosen is not self._current:
            if self._current is not None:
                is_replaced = chosen is not None and self._current.is_healthy
                self._decisions.append(Down("replaced" if is_replaced else reason))
                self._failing_since_ns = now_ns
            self._current = chosen
            if chosen is not None:
                self._take_into_use(chosen)
        for item in self._sets.values():
            is_loser = chosen is not None and item is not chosen and item.is_healthy
            if is_loser and item.retire_ns is None:
                item.retire_ns = now_ns + LINGER_NS

    def _take_into_use(self, chosen: ConnectionSet) -> None:
        chosen.retire_ns = None
        if chosen.has_echo:
            self.round_trip = chosen.round_trip
        for item in list(self._sets.values()):
            if item.is_silent:
                self._close(item, "silent and replaced")
        for link in list(self._attempts):
            self._give_up(link, "")
        self._decisions.append(Up(chosen.link))

    def _wants_dial(self) -> bool:
        is_coming = any(not item.is_silent for item in self._sets.values())
        return self._current is None and bool(self._endpoints) and not is_coming

    def _dial(self, now_ns: int) -> None:
        if len(self._attempts) >= ATTEMPTS_MAX:
            self._give_up(next(iter(self._attempts)), "no answer")
        endpoint = self._endpoints[self._turn % len(self._endpoints)]
        self._turn += 1
        link = self._entropy.token_bytes(16)
        self._attempts[link] = _Attempt(endpoint, now_ns)
        self._dial_ns = now_ns + self._jittered(self._pause_ns(now_ns))
        self._decisions.append(Dial(link, endpoint))

    def _pause_ns(self, now_ns: int) -> int:
        failing_ns = now_ns - self._failing_since_ns
        if failing_ns < SLOW_AFTER_NS:
            return self._retry_ns()
        if failing_ns < 5 * SLOW_AFTER_NS:
            return min(5 * self._retry_ns(), self._limits.reconnect_interval_ns_max)
        return self._limits.reconnect_interval_ns_max

    def _retry_ns(self) -> int:
        return self._limits.reconnect_interval_ns

    def _jittered(self, pause_ns: int) -> int:
        return int(pause_ns * self._entropy.uniform(0.8, 1.2))

    def _give_up(self, link: bytes, reason: str) -> None:
        self.last_error = reason or self.last_error
        del self._attempts[link]
        self._decisions.append(Close(link, reason or "another set came up"))

    def _close(self, item: ConnectionSet, reason: str) -> None:
        del self._sets[item.link]
        item.is_silent = True  # never chosen again
        self._decisions.append(Close(item.link, reason))
