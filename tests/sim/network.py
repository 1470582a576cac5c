"""A simulated network: links of one control and several data connections.

What is modelled: delay with jitter, rate, order within a connection and none between them, loss of
single data connections with everything in flight, black holes one way and both, noticed late,
flipped bits inside frames.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from geomirror.limits import KIB
from tests.sim.world import MS, SECOND, World

DATA_CONNECTIONS = 2


@dataclass
class Link:
    """State between two nodes. `number` grows with each new set of connections."""

    is_up: bool = False
    is_cut: tuple[bool, bool] = (False, False)
    number: int = 0
    has_lost: bool = False
    busy_until: dict[tuple[str, int], int] = field(default_factory=dict)
    broken: dict[tuple[str, int], int] = field(default_factory=dict)
    queued: dict[str, int] = field(default_factory=dict)


Way = tuple[Link, int, tuple[str, int], int]
"""(link, its number, (source, connection), how often that connection broke) of something sent."""


class Network:
    """Links between nodes by name. `deliver(target, source, payload)` hands over what arrives."""

    def __init__(
        self,
        world: World,
        names: list[str],
        deliver: Callable[[str, str, Any], None],
        link_event: Callable[[str, str, bool], None],
        writable: Callable[[str, str], None],
        *,
        delay_ns: dict[str, int],
        jitter_ns: int,
        bytes_per_second: int,
        flip_chance: float,
    ) -> None:
        self.world = world
        self.links = {(a, b): Link() for i, a in enumerate(names) for b in names[i + 1 :]}
        self._deliver = deliver
        self._link_event = link_event
        self._writable = writable
        self._delay_ns = delay_ns
        """By source: the way there need not take as long as the way back."""
        self._jitter_ns = jitter_ns
        self._rate = bytes_per_second
        self._flip_chance = flip_chance
        self.is_alive: Callable[[str], bool] = lambda name: True
        self.window_bytes = 256 * KIB

    def link(self, a: str, b: str) -> Link:
        """The link of two nodes."""
        return self.links[(a, b) if (a, b) in self.links else (b, a)]

    def room(self, source: str, target: str) -> int:
        """Bytes that the link's queue takes now."""
        return max(0, self.window_bytes - self.link(source, target).queued.get(source, 0))

    def send(self, source: str, target: str, payload: Any, size: int, *, is_frame: bool) -> None:
        """Put something on a connection; it arrives later, or never."""
        link = self.link(source, target)
        if not link.is_up:
            return
        world, chance = self.world, self.world.random
        world.mix(payload[4] if is_frame else payload)
        connection = 1 + chance.randrange(DATA_CONNECTIONS) if is_frame else 0
        if is_frame and self._flip_chance and chance.random() < self._flip_chance:
            payload = flip(payload, chance.randrange(1 << 30))
        key = (source, connection)
        start = max(world.now_ns, link.busy_until.get((source, -1), 0))
        sent = start + size * SECOND // self._rate
        link.busy_until[(source, -1)] = sent
        jitter = int(self._jitter_ns * chance.random())
        arrival = max(sent + self._delay_ns[source] + jitter, link.busy_until.get(key, 0))
        link.busy_until[key] = arrival
        way = (link, link.number, key, link.broken.get(key, 0))
        if is_frame:
            link.queued[source] = link.queued.get(source, 0) + size
            world.at(sent, partial(self._leave, way, target, size))
        world.at(arrival, partial(self._arrive, way, target, payload))

    def _leave(self, way: Way, target: str, size: int) -> None:
        """Bytes have left the queue; the sender hears of it when half is free."""
        link, number, (source, _), _ = way
        if link.number == number:
            before = link.queued[source]
            link.queued[source] = after = before - size
            half = self.window_bytes // 2
            if after == 0 or before >= half > after:
                self._writable(source, target)

    def _arrive(self, way: Way, target: str, payload: Any) -> None:
        link, number, key, broken = way
        if link.number != number or link.broken.get(key, 0) != broken:
            return
        source = key[0]
        if not link.is_up or not self.is_alive(target):
            return
        index = 0 if (source, target) in self.links else 1
        if link.is_cut[index]:
            link.has_lost = True
            return
        self._deliver(target, source, payload)

    def break_connection(self, a: str, b: str) -> None:
        """One data connection dies with everything in flight on it; a busy one, if there is one."""
        link = self.link(a, b)
        busy = sorted(
            {n for (_, n), until in link.busy_until.items() if n > 0 and until > self.world.now_ns}
        )
        connection = self.world.random.choice(busy or range(1, 1 + DATA_CONNECTIONS))
        for source in (a, b):
            key = (source, connection)
            link.broken[key] = link.broken.get(key, 0) + 1

    def cut(self, a: str, b: str, directions: tuple[bool, bool]) -> None:
        """A black hole, one way or both; each side notices after a while."""
        link = self.link(a, b)
        link.is_cut = directions
        number = link.number

        def notice() -> None:
            if link.number == number and link.is_up and any(link.is_cut):
                self.down(a, b)

        self.world.after(self.world.between(300 * MS, 3 * SECOND), notice)

    def heal(self, a: str, b: str) -> None:
        """The black hole is gone; a link comes up if it was noticed."""
        link = self.link(a, b)
        link.is_cut = (False, False)
        if not link.is_up:
            self.connect_later(a, b)
        elif link.has_lost:
            # A connection never goes on behind a gap: it is replaced.
            self.down(a, b)

    def lose(self, name: str) -> None:
        """A machine died: what it has sent still arrives; the others notice later."""
        for (a, b), link in self.links.items():
            if name in (a, b) and link.is_up:
                self.world.after(
                    self._delay_ns[name] + self.world.between(MS, 2 * SECOND),
                    partial(self._noticed, a, b, link, link.number),
                )

    def _noticed(self, a: str, b: str, link: Link, number: int) -> None:
        if link.number == number:
            self.down(a, b)

    def down(self, a: str, b: str) -> None:
        """The link is lost, with everything in flight."""
        link = self.link(a, b)
        if not link.is_up:
            return
        link.is_up = False
        link.number += 1
        link.queued.clear()
        link.busy_until.clear()
        for one, other in ((a, b), (b, a)):
            if self.is_alive(one):
                self._link_event(one, other, False)
        if not any(link.is_cut):
            self.connect_later(a, b)

    def connect_later(self, a: str, b: str) -> None:
        """Try to bring the link up, again and again."""

        def attempt() -> None:
            link = self.link(a, b)
            if link.is_up or any(link.is_cut):
                return
            if not (self.is_alive(a) and self.is_alive(b)):
                self.world.after(SECOND, attempt)
                return
            link.is_up = True
            link.has_lost = False
            link.number += 1
            for one, other in ((a, b), (b, a)):
                self._link_event(one, other, True)

        self.world.after(self.world.between(50 * MS, SECOND), attempt)


def flip(payload: Any, chance: int) -> Any:
    """The same frame with one bit of its body flipped."""
    kind, epoch, sequence, is_resync, body = payload
    if not body:
        return payload
    damaged = bytearray(body)
    damaged[chance % len(damaged)] ^= 1 << (chance >> 20) % 8
    return (kind, epoch, sequence, is_resync, bytes(damaged))
