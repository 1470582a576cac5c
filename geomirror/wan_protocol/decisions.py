"""What replica cores ask their shell to do. The shell executes, in order, and decides nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from geomirror.errors import GeomirrorError
from geomirror.wan_protocol.messages import Message


class Job(Protocol):
    """Blocking work prepared by a core. `run` touches only files and values it was given, so it may
    run on any thread; its results are attributes that the core reads afterwards."""

    def run(self) -> None:
        """Do the work. Raises `GeomirrorError` only."""


class RunJob(msgspec.Struct, eq=False):
    """Run `job` off the loop, then call `core.job_done(this, error, …)`.

    Jobs of different kinds run side by side; a core never starts a kind twice.
    """

    kind: str
    job: Job
    done: Callable[[Any], None]


@dataclass(slots=True)
class SendMessage:
    """Send on the peer's control connection; may be dropped when the link is down."""

    peer: str
    session: int
    message: Message


@dataclass(slots=True)
class SendFrame:
    """Send on one of the peer's data connections; may be dropped when the link is down."""

    peer: str
    session: int
    epoch: int
    sequence: int
    body: bytes = field(repr=False)
    is_resync: bool = False


class FlushDone(msgspec.Struct):
    """Answer the flush with this token; with an error when its writes may not be durable."""

    token: object
    error: GeomirrorError | None = None


@dataclass(slots=True)
class RoomAvailable:
    """Writers that were held back may try again."""


@dataclass(slots=True)
class Emit:
    """Publish an event of this kind."""

    kind: str
    fields: dict[str, object]


Decision = RunJob | SendMessage | SendFrame | FlushDone | RoomAvailable | Emit
