"""Which TCP connection carries what goes into one end of a socket pair.

```
 TLS of a link ── end of the pair ⇢ carrier: the TCP connection to the front end
```
Where a WebSocket carries a link, TLS has a socket that is no TCP. What the kernel is told or asked
of the link (its rate, what was acknowledged, timeouts) is about the carrier. An event loop hands
out sockets of its own making, hence ends are told apart by the number that the kernel gave them.
"""

from __future__ import annotations

import os
import socket
from typing import Any

_carriers: dict[int, Any] = {}


def set_carrier(end: socket.socket, carrier: Any) -> int:
    """From now on this end of a pair is carried by a connection; returns what ends that."""
    number = os.fstat(end.fileno()).st_ino
    _carriers[number] = carrier
    return number


def forget_carrier(number: int) -> None:
    """The pair is gone."""
    _carriers.pop(number, None)


def carrier_of(sock: Any) -> Any:
    """The connection below a socket: the socket itself, if nothing is known to carry it.

    None for one that is closed, as a carrier is for a moment before its link is.
    """
    if sock is None or sock.fileno() < 0:
        return None
    if sock.family != socket.AF_UNIX:
        return sock
    carrier = _carriers.get(os.fstat(sock.fileno()).st_ino, sock)
    return carrier if carrier.fileno() >= 0 else None
