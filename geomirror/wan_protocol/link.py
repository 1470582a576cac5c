"""Keeps one node pair connected: when to dial, when the peer is gone, which connections to use.

```
            ┌ attempts: dialled, no control connection yet (dial_attempts)
 LinkCore ──┼ sets: control connection up, data connections joining (connection_set)
            └ current: the one set that is used; None means the link is down
```
The node with the smaller name *leads*: it alone chooses, the first set that is ready, and says so
with a numbered `Use` before anything else on that control connection; the other one obeys.
Invariants: a side is up on a set only after (follower) or at (leader) its `Use`, and a set is used
once: who gives it up closes it for ever. So both sides are up on the same set or soon on none, and
nothing of a session can reach a side that is not up on the set that it was sent on. `Up` and `Down`
alternate; a change of the set is a `Down` and an `Up` on both sides.
Why a silent set is not kept: a TCP that waits for its timer needs 3 to 16 s after an outage of 10
to 30 s, a new connection 0.2 s, and the sessions start anew in both cases.
While the set in use takes a path of a worse rank, sets on better ones are dialled beside it now and
then; the leader moves to one as soon as it is ready, not before.
Deliberately not here: sockets, what is sent, and routes over third nodes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from geomirror.environment import MS, SECOND, Entropy
from geomirror.errors import RemoteProtocolError
from geomirror.limits import Limits
from geomirror.tunnel.link_path import rank_of
from geomirror.wan_protocol.connection_set import ConnectionSet, RoundTrip
from geomirror.wan_protocol.data_progress import Reading
from geomirror.wan_protocol.dial_attempts import Attempt, Attempts
from geomirror.wan_protocol.link_decisions import (
    Close,
    CloseData,
    Decision,
    Dial,
    Down,
    SendPing,
    SendUse,
    Up,
)
from geomirror.wan_protocol.path_choice import PathChoice
from geomirror.wan_protocol.set_choice import best_ready, is_vain, vain_deadline_ns

DATA_RETRY_NS, DATA_RETRY_NS_MIN = 1 * SECOND, SECOND // 8
"""A data connection that failed, or died as soon as it was up, is dialled again after the first
time; one that was lost otherwise after the second."""
SETS_MAX = 8
"""Sets of one node pair at once; a peer that opens more is turned away."""
ECHO_NS_MAX = 30 * SECOND
"""An older answer to a ping is no measurement."""


class LinkCore:
    """Decides for one peer. Feed it events, run its decisions, call `handle_timer` when due.

    :param endpoints: paths on which the peer can be dialled; empty means that only the peer dials.
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
        self._is_leader = node < peer
        self._limits = limits
        self._entropy = entropy
        self.choice = PathChoice(rank_of, entropy, endpoints, now_ns)
        self._attempts = Attempts(limits, entropy, self.choice, now_ns)
        self._sets: dict[bytes, ConnectionSet] = {}
        self._current: ConnectionSet | None = None
        self._use_number = 0
        """Of the last `Use` sent or obeyed."""
        self._use_incarnation = b""
        """Of the leader that sent it."""
        self._decisions: deque[Decision] = deque()
        self._due_ns: int | None = None
        """What `get_timer` said last: being called later means that this node did not run."""
        self._last_used = b""
        self.data_connections = limits.data_connections
        """Data connections of sets that this node dials."""
        self.round_trip = RoundTrip()
        """Of the current set; after an outage, of the last one."""
        self.last_error = ""

    @property
    def current(self) -> ConnectionSet | None:
        """The set in use, if the link is up."""
        return self._current

    @property
    def given_up(self) -> bytes:
        """The set used last, if none is used now. A hello tells it: the peer must not use it on."""
        return self._last_used if self._current is None else b""

    def rank(self, link: bytes) -> int:
        """Of the path that an attempt takes."""
        attempt = self._attempts.get(link)
        return attempt.rank if attempt is not None else 0

    def set_endpoints(self, endpoints: Sequence[str], now_ns: int) -> None:
        """Use other endpoints for attempts from now on; sets stay."""
        if self.choice.set_paths(endpoints, now_ns):
            self._attempts.hurry(now_ns)
            self._settle(now_ns)

    # Events of connections.

    def dial_answered(self, link: bytes, now_ns: int) -> None:
        """The peer's host answers the attempt: time to dial the first data connection beside it,
        which then needs no round trips of its own after the control connection's."""
        attempt = self._attempts.answered(link, now_ns)
        if attempt is not None:
            attempt.is_data_dialled = True
            self._decisions.append(Dial(link, attempt.endpoint, 0))

    def dial_failed(self, link: bytes, index: int, reason: str, now_ns: int) -> None:
        """A connection asked for by `Dial` could not be made, or its hello was refused."""
        self.last_error = reason
        attempt = self._attempts.get(link)
        if index < 0:
            self._attempts.end(link, reason)
        elif link in self._sets:
            self._sets[link].data_due_ns[index] = now_ns + self._jittered(DATA_RETRY_NS)
        elif attempt is not None:
            attempt.is_data_dialled = False
        self._settle(now_ns)

    def control_up(
        self,
        link: bytes,
        now_ns: int,
        *,
        is_dialled: bool,
        incarnation: bytes,
        after: bytes,
        rank: int = 0,
    ) -> None:
        """Hellos were exchanged on a control connection: the set exists from now on.

        :param incarnation: of the peer's daemon.
        :param after: a set that a dialling peer has given up.
        :param rank: of the path that a dialling peer took.
        """
        assert link not in self._sets
        attempt = self._attempts.end(link)
        if is_dialled and attempt is None:
            self._decisions.append(Close(link, "given up before it came up"))
            return
        if not is_dialled and self._current is not None and after == self._current.link:
            self._close(self._current, "the peer has given up the connections", now_ns)
        if len(self._sets) >= SETS_MAX:
            self._decisions.append(Close(link, f"more than {SETS_MAX} sets of connections"))
            return
        item = ConnectionSet(
            link=link,
            is_dialled=is_dialled,
            endpoint=attempt.endpoint if attempt else "",
            rank=attempt.rank if attempt else rank,
            incarnation=incarnation,
            opened_ns=now_ns,
            heard_ns=now_ns,
            echo_ns=now_ns,
            ping_ns=now_ns,
            moved_ns=now_ns,
        )
        if attempt is not None:
            self._attempts.succeeded(item.endpoint, now_ns)
            item.data_due_ns = dict.fromkeys(range(self.data_connections), now_ns)
            if attempt.is_data_dialled:
                del item.data_due_ns[0]
        self._sets[link] = item
        self._settle(now_ns)

    def data_up(self, link: bytes, index: int, now_ns: int) -> None:
        """Hellos were exchanged on a data connection of the set."""
        item = self._sets.get(link)
        if item is not None:
            item.data[index] = item.heard_ns = now_ns
            self._settle(now_ns)

    def data_lost(self, link: bytes, index: int, reason: str, now_ns: int) -> None:
        """A data connection that was up is gone; it is dialled again by the side that dialled."""
        item = self._sets.get(link)
        if item is None:
            return
        self.last_error = reason
        up_ns = item.data.pop(index, now_ns)
        item.progress.pop(index, None)
        if item.is_dialled and index < self.data_connections:
            # One that dies as soon as it is up must not be dialled in a loop.
            is_short_lived = now_ns - up_ns < DATA_RETRY_NS
            pause_ns = DATA_RETRY_NS if is_short_lived else DATA_RETRY_NS_MIN
            item.data_due_ns[index] = now_ns + self._jittered(pause_ns)
        if not item.data:
            item.opened_ns = now_ns
        self._settle(now_ns)

    def set_lost(self, link: bytes, reason: str, now_ns: int) -> None:
        """The control connection is gone, and with it the set."""
        self._attempts.end(link)
        if link in self._sets:
            self._close(self._sets[link], reason, now_ns)
        self._settle(now_ns)

    # What arrives.

    def use_received(self, link: bytes, number: int, now_ns: int) -> None:
        """The leader uses this set from now on.

        :raises RemoteProtocolError: this node leads, or the set has been used already.
        """
        item = self._sets.get(link)
        if item is None:
            return
        if self._is_leader:
            raise RemoteProtocolError("the follower does not choose the connections")
        if item is self._current:
            raise RemoteProtocolError("connections are used only once")
        is_same_leader = item.incarnation == self._use_incarnation
        if is_same_leader and number <= self._use_number:
            # Overtaken by a later choice, which came on another connection.
            self._close(item, "another choice came first", now_ns)
        else:
            self._use_number, self._use_incarnation = number, item.incarnation
            self._use(item, now_ns)
        self._settle(now_ns)

    def heard(self, link: bytes, now_ns: int, *, is_bulk: bool = False) -> None:
        """Bytes of the peer arrived on any connection of the set, or on a data connection. Cheap:
        called for each read."""
        item = self._sets.get(link)
        if item is not None:
            item.heard_ns = now_ns
            if is_bulk:
                item.moved_ns = now_ns

    def moved(self, link: bytes, now_ns: int) -> None:
        """A data connection of the set that was full takes more: the other side took some."""
        item = self._sets.get(link)
        if item is not None:
            item.moved_ns = now_ns

    def data_sampled(self, link: bytes, index: int, reading: Reading, now_ns: int) -> None:
        """What TCP says of a connection; a data connection that is stuck while pings are answered
        is given up."""
        item = self._sets.get(link)
        if item is None or (index >= 0 and index not in item.data):
            return
        progress = item.sampled(index, reading, now_ns)
        if index >= 0 and item.is_stuck(progress, now_ns, self._limits):
            silent_ms = (now_ns - progress.since_ns) // MS
            reason = f"data connection {index}: nothing gets through for {silent_ms} ms, "
            reason += "while pings are answered"
            self._decisions.append(CloseData(link, index, reason))
            self.data_lost(link, index, reason, now_ns)

    def pong(self, link: bytes, sent_ns: int, now_ns: int) -> None:
        """The answer to the ping that carried `sent_ns`."""
        item = self._sets.get(link)
        if item is None or not 0 <= now_ns - sent_ns <= ECHO_NS_MAX:
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
            due += [item.ping_ns, *item.data_due_ns.values()]
            due.append(item.heard_deadline_ns(self._limits))
            due.append(item.echo_deadline_ns(self._limits))
            if is_vain(item, self._current):
                due.append(vain_deadline_ns(item, self._current))
        due += self._attempts.deadlines_ns() + self._probes_due_ns()
        if self._wants_dial():
            due.append(self._attempts.due_ns)
        self._due_ns = min(due, default=None)
        return self._due_ns

    def handle_timer(self, now_ns: int) -> None:
        """Do what is due: pings, attempts, silences, closing."""
        if self._due_ns is not None and now_ns > self._due_ns:
            for item in self._sets.values():
                item.forgive(now_ns - self._due_ns, now_ns)
        self._due_ns = None
        for item in list(self._sets.values()):
            self._check_set(item, now_ns)
        for attempt in self._attempts.expired(now_ns):
            self._give_up(attempt.link, f"{attempt.endpoint}: no answer")
        self._settle(now_ns)

    def next_decision(self) -> Decision | None:
        """The next thing to do, in order; `None` when all is done."""
        return self._decisions.popleft() if self._decisions else None

    def close(self, reason: str, now_ns: int) -> None:
        """Close everything; the core is finished afterwards."""
        self.choice.set_paths([], now_ns)
        for link in self._attempts.links:
            self._give_up(link, reason)
        for item in list(self._sets.values()):
            self._close(item, reason, now_ns)

    # Decisions.

    def _check_set(self, item: ConnectionSet, now_ns: int) -> None:
        current, silence = self._current, item.silence(now_ns, self._limits)
        if silence:
            self._close(item, silence, now_ns)
        elif is_vain(item, current) and now_ns >= vain_deadline_ns(item, current):
            reason = "the peer does not use it" if item.data else "no data connection came up"
            self._close(item, reason, now_ns)
        elif now_ns >= item.ping_ns:
            item.ping_ns = now_ns + item.round_trip.interval_ns(self._limits)
            self._decisions.append(SendPing(item.link, now_ns))

    def _settle(self, now_ns: int) -> None:
        """Choose a set if this node leads, then dial what is due."""
        if self._is_leader and (chosen := best_ready(self._sets.values(), self._current)):
            self._use(chosen, now_ns)
        for item in self._sets.values():
            for index in [i for i, due in item.data_due_ns.items() if due <= now_ns]:
                del item.data_due_ns[index]
                self._decisions.append(Dial(item.link, item.endpoint, index))
        if self._wants_dial() and now_ns >= self._attempts.due_ns:
            self._dial(now_ns)
        elif any(due_ns <= now_ns for due_ns in self._probes_due_ns()):
            self._begin(self._attempts.begin_probe(now_ns))

    def _probes_due_ns(self) -> list[int]:
        """When a better path is to be tried, if one is; one at a time."""
        is_one_tried = bool(self._attempts.links) or len(self._sets) > 1
        due_ns = None if is_one_tried else self.choice.probe_due_ns()
        return [] if due_ns is None else [due_ns]

    def _use(self, chosen: ConnectionSet, now_ns: int) -> None:
        """Go up on a set. Other sets that the peer dialled are left to it: it knows of the choice
        soon and closes them, or it does not know because the chosen one is dead."""
        for item in list(self._sets.values()):
            if item.incarnation != chosen.incarnation:
                self._close(item, "the peer was restarted", now_ns)
        if self._current is not None:
            self._close(self._current, "others are used, on a better path or by a new life", now_ns)
        self._current, self._last_used = chosen, chosen.link
        self.choice.used(chosen.rank, now_ns)
        chosen.opened_ns = now_ns
        if chosen.has_echo:
            self.round_trip = chosen.round_trip
        for link in self._attempts.links:
            self._give_up(link, "")
        for item in list(self._sets.values()):
            if item.is_dialled and item is not chosen and item.rank >= chosen.rank:
                self._close(item, "another set is used", now_ns)
        if self._is_leader:
            self._use_number += 1
            self._decisions.append(SendUse(chosen.link, self._use_number))
        self._decisions.append(Up(chosen.link))

    def _wants_dial(self) -> bool:
        return bool(self.choice.paths) and not self._sets

    def _dial(self, now_ns: int) -> None:
        surplus = self._attempts.surplus()
        if surplus is not None:
            self._give_up(surplus.link, f"{surplus.endpoint}: no answer")
        self._begin(self._attempts.begin(now_ns))

    def _begin(self, attempt: Attempt) -> None:
        self._decisions.append(Dial(attempt.link, attempt.endpoint))

    def _jittered(self, pause_ns: int) -> int:
        return int(pause_ns * self._entropy.uniform(0.8, 1.2))

    def _give_up(self, link: bytes, reason: str) -> None:
        self.last_error = reason or self.last_error
        self._attempts.end(link, reason)
        self._decisions.append(Close(link, reason or "another set came up"))

    def _close(self, item: ConnectionSet, reason: str, now_ns: int) -> None:
        del self._sets[item.link]
        if item is self._current:
            self._current, self._attempts.failing_since_ns = None, now_ns
            self.choice.lost(now_ns)
            self._decisions.append(Down(reason))
        if self._current is None:
            self.last_error = reason
        self._decisions.append(Close(item.link, reason))
