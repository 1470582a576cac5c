"""Settings of the synchronous modes: what they mean, and what is refused."""

from __future__ import annotations

import pytest

from geomirror.environment import MS, SECOND
from geomirror.errors import UsageError
from geomirror.wan_protocol.rejoin_policy import is_automatic
from geomirror.wan_protocol.sync_policy import ASYNCHRONOUS, SyncPolicy, parse_policy

PEERS = ["colo", "west"]


@pytest.mark.parametrize(
    ("settings", "policy"),
    [
        ({}, ASYNCHRONOUS),
        ({"ack": "completed"}, ASYNCHRONOUS),
        ({"ack": "durable"}, SyncPolicy({"colo": "durable", "west": "durable"})),
        ({"ack.west": "applied"}, SyncPolicy({"west": "applied"})),
        ({"ack": "received", "ack.colo": "completed"}, SyncPolicy({"west": "received"})),
        ({"ack": "durable", "copies": "all"}, SyncPolicy(dict.fromkeys(PEERS, "durable"))),
        ({"ack": "durable", "copies": "1"}, SyncPolicy(dict.fromkeys(PEERS, "durable"), 1)),
        ({"degrade_after": "2.5s"}, SyncPolicy({}, None, 2500 * MS)),
        ({"degrade_after": "0"}, SyncPolicy({}, None, 0)),
        ({"degrade_after": "3600"}, SyncPolicy({}, None, 3600 * SECOND)),
        ({"degrade_after": "block"}, SyncPolicy({}, None, None)),
        ({"auto_rejoin": "on"}, ASYNCHRONOUS),
        ({"auto_rejoin": "off"}, ASYNCHRONOUS),
    ],
)
def test_settings_are_understood(settings: dict[str, str], policy: SyncPolicy) -> None:
    assert parse_policy(settings, PEERS) == policy


def test_a_member_comes_back_by_itself_only_when_that_is_set() -> None:
    assert is_automatic({"auto_rejoin": "on"})
    assert not is_automatic({"auto_rejoin": "off"})
    assert not is_automatic({})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ack": "maybe"}, "none of completed, received, durable, applied"),
        ({"ack.east": "durable"}, "no secondary"),
        ({"ack.west": "C"}, "none of"),
        ({"acks": "durable"}, "unknown setting"),
        ({"ack": "durable", "copies": "3"}, "only 2 secondaries are synchronous"),
        ({"copies": "1"}, "only 0 secondaries are synchronous"),
        ({"copies": "0"}, "copies"),
        ({"copies": "-1"}, "copies"),
        ({"copies": "²"}, "copies"),
        ({"degrade_after": "soon"}, "degrade_after"),
        ({"degrade_after": "3601"}, "degrade_after"),
        ({"degrade_after": "-1"}, "degrade_after"),
        ({"auto_rejoin": "yes"}, "auto_rejoin: 'yes' is none of on, off"),
    ],
)
def test_other_settings_are_refused(settings: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_policy(settings, PEERS)
