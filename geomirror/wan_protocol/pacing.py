"""How many data connections a node pair gets and how fast each may send.

Pacing is the most valuable knob of a long path: below the link's rate its queue stays empty, so
that nothing is lost and a commit takes little more than a round trip; unpaced connections fill the
queue until packets are thrown away.
Deliberately not here: finding out the rate of a link that is not configured.
"""

from __future__ import annotations

import math

from geomirror.environment import SECOND
from geomirror.limits import Limits

LINK_FRACTION = 0.94
"""Part of the link's rate that is used: headers, acknowledgements and the control connection."""
SEND_BUFFER_BYTES = 3_000_000
"""What one connection keeps in flight with the default `tcp_wmem` of 4 MB, of which the
kernel needs a part for itself."""
DATA_CONNECTIONS_MIN = 2


def data_connections(limits: Limits, bytes_per_second: int | None, round_trip_ns: int) -> int:
    """Data connections for a link of this rate; the default when the rate is not known."""
    if not bytes_per_second or not round_trip_ns:
        return limits.data_connections
    wanted = math.ceil(bytes_per_second * round_trip_ns / SECOND / SEND_BUFFER_BYTES)
    return max(DATA_CONNECTIONS_MIN, min(wanted, limits.data_connections_max))


def connection_rate(bytes_per_second: int, connections: int) -> int:
    """Pace of one data connection, bytes per second."""
    assert connections > 0
    return max(1, int(bytes_per_second * LINK_FRACTION / connections))
