"""Catching up: when that ends, and when it never does."""

from __future__ import annotations

import pytest

from geomirror.cli.advice import advise
from geomirror.limits import MIB
from geomirror.node.peer_pace import Pace
from tests.cli.test_commands import peer, resource


@pytest.mark.parametrize(
    ("pace", "is_converging", "eta_seconds"),
    [
        (Pace(0, 5 * MIB, None), True, 0.0),
        (Pace(60 * MIB, MIB, 4 * MIB), True, 20.0),
        (Pace(60 * MIB, 4 * MIB, 4 * MIB), False, None),
        (Pace(60 * MIB, 5 * MIB, 4 * MIB), False, None),
        (Pace(60 * MIB, MIB, None), None, None),
        (Pace(60 * MIB, MIB, 0.0), None, None),
        # A resync: what is compared does not grow, but the journal fills up.
        (Pace(60 * MIB, 5 * MIB, 4 * MIB, room=80 * MIB), True, 15.0),
        (Pace(60 * MIB, 6 * MIB, 4 * MIB, room=80 * MIB), False, None),
        (Pace(60 * MIB, 6 * MIB, 0.0, room=80 * MIB), None, None),
    ],
)
def test_verdict_and_time(pace: Pace, is_converging: bool | None, eta_seconds: float | None):
    assert (pace.is_converging, pace.eta_seconds) == (is_converging, eta_seconds)


def words(pace: Pace, **changes) -> str:
    found = advise(resource(peers=[peer(**pace.describe(), **changes)]), "east-1")
    return " ".join(each.meaning for each in found)


def test_the_words_tell_what_comes_in_and_what_goes_out():
    slow = Pace(60 * MIB, 5 * MIB, 4 * MIB)
    text = words(slow, state="Fold", rpo_seconds=12.0)
    assert "5.0 MiB/s are written, 4.0 MiB/s reach it: not converging." in text
    assert "left" not in text
    assert "falls behind" in words(slow, rpo_seconds=12.0)
    assert "behind" not in words(slow, rpo_seconds=0.4), "noise of a copy that is up to date"
    text = words(Pace(60 * MIB, MIB, 4 * MIB), state="Fold")
    assert "4.0 MiB/s reach it. About 20 s left." in text
    resync = {"held_epoch": 4, "compared_bytes": 0, "total_bytes": 1, "sent_bytes": 0}
    text = words(Pace(60 * MIB, 6 * MIB, 4 * MIB, room=80 * MIB), state="Resync", resync=resync)
    assert "6.0 MiB/s are written, 4.0 MiB/s are compared: not converging." in text
