"""What happened on this node, newest last: a bounded ring and its subscribers.

A slow subscriber loses the oldest events, never holds anybody back; each event has a number, so a
gap can be seen.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from heapq import merge
from operator import itemgetter
from typing import Any

EVENTS_MAX = 2000
"""Events kept; about 300 bytes of RAM each."""
FOREIGN_EVENTS_MAX = 200
"""Kept beside them: events that strangers can cause, which must not push the others out."""
SUBSCRIBER_EVENTS_MAX = 1000
"""Events that wait for one subscriber."""
SUBSCRIBERS_MAX = 64

Event = dict[str, Any]


class EventRing:
    """The last events and the queues of those who follow."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque(maxlen=EVENTS_MAX)
        self._foreign: deque[Event] = deque(maxlen=FOREIGN_EVENTS_MAX)
        self._subscribers: list[asyncio.Queue[Event]] = []
        self._number = 0

    def publish(
        self, kind: str, time: str, fields: Mapping[str, Any], *, is_foreign: bool = False
    ) -> Event:
        """Number an event, keep it and hand it to every subscriber.

        :param time: RFC 3339.
        :param is_foreign: somebody outside the network can cause it.
        """
        self._number += 1
        event: Event = {"number": self._number, "time": time, "kind": kind, **fields}
        (self._foreign if is_foreign else self._events).append(event)
        for queue in self._subscribers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(event)
        return event

    def recent(self, count: int = EVENTS_MAX) -> list[Event]:
        """The newest `count` events, oldest first."""
        found = list(merge(self._events, self._foreign, key=itemgetter("number")))
        return found[-count:] if count else []

    def subscribe(self) -> asyncio.Queue[Event] | None:
        """A queue that gets every event from now on; None when there are too many already."""
        if len(self._subscribers) >= SUBSCRIBERS_MAX:
            return None
        queue: asyncio.Queue[Event] = asyncio.Queue(SUBSCRIBER_EVENTS_MAX)
        self._subscribers.append(queue)
        return queue

    def unsubscribe(self, queue: asyncio.Queue[Event]) -> None:
        """Forget a subscriber."""
        self._subscribers.remove(queue)
