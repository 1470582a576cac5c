"""Which set of connections is used, as the leader chooses, and which are of no use."""

from __future__ import annotations

from collections.abc import Iterable

from geomirror.environment import SECOND
from geomirror.wan_protocol.connection_set import ConnectionSet
from geomirror.wan_protocol.dial_attempts import OPEN_NS_MAX

DATALESS_NS_MAX = 3 * SECOND
"""A set in use that lost all data connections is given up unless one is back after this time."""


def best_ready(
    sets: Iterable[ConnectionSet], current: ConnectionSet | None
) -> ConnectionSet | None:
    """The set to use instead of `current`; None: go on as it is."""
    ready = [item for item in sets if item.data and _may_replace(item, current)]
    return max(ready, key=lambda item: _merit(item, current), default=None)


def _may_replace(item: ConnectionSet, current: ConnectionSet | None) -> bool:
    # With a set in use, others were dialled before the choice was known, or by a new life of the
    # peer, or on a better path.
    if current is None or item.incarnation != current.incarnation:
        return True
    return item.rank < current.rank


def _merit(item: ConnectionSet, current: ConnectionSet | None) -> tuple[bool, int, int]:
    is_new_life = current is not None and item.incarnation != current.incarnation
    return is_new_life, -item.rank, item.opened_ns


def is_vain(item: ConnectionSet, current: ConnectionSet | None) -> bool:
    """Whether a set is of no use as it is: it has until `vain_deadline_ns` to change that."""
    is_beside = item.is_dialled and current is not None and item is not current
    return not item.data or is_beside


def vain_deadline_ns(item: ConnectionSet, current: ConnectionSet | None) -> int:
    """When a set that is of no use is closed, monotonic ns."""
    return item.opened_ns + (DATALESS_NS_MAX if item is current else OPEN_NS_MAX)
