"""What the status says of a disk that was put back, and what has to be chosen then."""

from __future__ import annotations

from geomirror.environment import SECOND
from geomirror.node.replica_status import PrimaryStatus, SecondaryStatus
from tests.wan_protocol.core_support import PEER, PRIMARY, Stage
from tests.wan_protocol.put_back_support import disk_of_copy, put_back_copy, put_back_primary


def test_a_primary_says_what_it_has_lost_and_what_to_do_until_that_is_chosen() -> None:
    stage = Stage()
    stage.write_epochs(3)
    stage.pass_time(1000)
    put_back_primary(stage, 2)
    stage.link_up()
    stage.pass_time(1000)
    status = PrimaryStatus(stage.primary)
    (peer,) = status.peers(stage.now_ns)
    assert (status.state(), peer["state"]) == ("degraded", "Refused")
    assert status.choice() == peer["reason"]
    assert f'the disk of "{PRIMARY}", primary of "orders", was put back' in status.choice()
    assert "geomirror failover orders" in status.choice()
    copy = SecondaryStatus(stage.secondary)
    assert copy.peers()[0]["reason"] == peer["reason"]
    assert copy.state() == "degraded"
    stage.primary.remove_peer(PEER)
    assert status.choice() == "", "it was chosen"


def test_a_copy_with_an_older_disk_is_told_of_until_it_has_as_much_again() -> None:
    stage = Stage()
    store = disk_of_copy(stage)
    said = stage.write_epochs(4, seed=5)
    stage.pass_time(1000)
    put_back_copy(stage, store)
    status = PrimaryStatus(stage.primary)
    reason = status.peers(stage.now_ns)[0]["reason"]
    assert reason.startswith(f"it had epoch {said} durable and came back with less")
    assert status.choice() == "", "nobody has to choose"
    stage.unpark()
    stage.pass_time(2 * SECOND // 1_000_000)
    assert status.peers(stage.now_ns)[0]["reason"] == ""
