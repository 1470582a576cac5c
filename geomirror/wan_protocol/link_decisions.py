"""What the core of a link (`link`) wants done, in order."""

from __future__ import annotations

from dataclasses import dataclass


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
class CloseData:
    """Close one data connection, which gets nothing through; the core knows that it is lost."""

    link: bytes
    index: int
    reason: str


@dataclass(frozen=True, slots=True)
class SendPing:
    """Send a ping on the control connection of this set."""

    link: bytes
    now_ns: int


@dataclass(frozen=True, slots=True)
class SendUse:
    """Tell the peer to use this set, before anything of a session is sent on it."""

    link: bytes
    number: int


@dataclass(frozen=True, slots=True)
class Up:
    """The link is up and uses this set, which it never used before."""

    link: bytes


@dataclass(frozen=True, slots=True)
class Down:
    """The link is down; the set in use is closed next."""

    reason: str


Decision = Dial | Close | CloseData | SendPing | SendUse | Up | Down
