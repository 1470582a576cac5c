"""`peers[].verify` of `status --json`, and what `verify` shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from geomirror.environment import SECOND
from geomirror.limits import BLOCK_BYTES
from geomirror.node.rfc3339 import rfc3339
from geomirror.node.verify_book import PeerBook, Tally
from geomirror.wan_protocol.verify_schedule import VerifySchedule


def verify_object(
    book: PeerBook | None,
    schedule: VerifySchedule,
    volumes: Mapping[int, str],
    wall_ns: int,
    problem: str,
) -> dict[str, Any]:
    """What is known of one copy.

    :param volumes: names by index.
    :param problem: why earlier results cannot be read.
    """
    known = book or PeerBook()
    running, times = known.running, known.times
    reason = problem if running is None and known.last is None else ""
    clean_ns = None if times is None else times.clean_wall_ns
    return {
        "state": "idle" if running is None else "running",
        "reason": reason if running is None else running.tally.reason,
        "current": None if running is None else _tally(running.tally, volumes),
        "last": None if known.last is None else _tally(known.last, volumes),
        "last_clean_at": None if clean_ns is None else rfc3339(clean_ns),
        **_due(known, schedule, wall_ns),
    }


def _due(book: PeerBook, schedule: VerifySchedule, wall_ns: int) -> dict[str, Any]:
    every_ns, times = schedule.every_ns, book.times
    if every_ns is None:
        return {"every_seconds": None, "next_at": None, "is_overdue": False}
    is_waiting = times is not None and book.running is None
    next_ns = times.due_wall_ns(every_ns, wall_ns) if times is not None and is_waiting else None
    return {
        "every_seconds": every_ns // SECOND,
        "next_at": None if next_ns is None else rfc3339(next_ns),
        "is_overdue": times is not None and times.is_overdue(every_ns, wall_ns),
    }


def _tally(tally: Tally, volumes: Mapping[int, str]) -> dict[str, Any]:
    ended_ns = tally.ended_wall_ns
    is_over = ended_ns is not None
    return {
        "result": (tally.result or "stopped") if is_over else None,
        "reason": tally.reason if is_over else "",
        "is_scheduled": tally.is_scheduled,
        "heals": tally.heals,
        "rate_bytes_per_second": tally.bytes_per_second,
        "started_at": rfc3339(tally.started_wall_ns),
        "ended_at": None if ended_ns is None else rfc3339(ended_ns),
        "epoch": tally.epoch,
        "total_bytes": tally.total_blocks * BLOCK_BYTES,
        "compared_bytes": tally.compared_blocks * BLOCK_BYTES,
        "different_blocks": tally.different_blocks,
        "healed_blocks": tally.healed_blocks,
        "unhealed_blocks": tally.unhealed_blocks,
        "different": [
            {"volume": volumes.get(e.volume, str(e.volume)), "block": e.first, "blocks": e.count}
            for e in tally.different
        ],
    }
