"""Two real daemons in two network namespaces, over a link that treats packets as a bad WAN does.

In every story a client writes all the time; the mirror is read and judged: it holds a legal cut of
what was written, never goes back, loses nothing, is never resynced, and the writer never waits for
the link. `GEOMIRROR_LONG=1` adds daemons that hang for longer than a minute.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from tests.lab.packet_support import need_packet_emulator
from tests.system.far_sites import Pair
from tests.system.support import until

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

BASE = (
    "rtt=80ms,jitter=5ms,rate=100mbit,queue=512KiB,loss=1%,burst=0,"
    "reorder=1%/10ms,duplicate=1%,corrupt=0,mtu=1500"
)
HANG_S = [3, 90] if os.environ.get("GEOMIRROR_LONG") == "1" else [3]
"""How long a daemon hangs: a minute and a half takes three, twice."""

RETURN_S_MAX = 3.0
"""From the return of the link to a whole frame at the mirror: an attempt's pause, five round trips
of handshakes, one and a half of the session, two or three of TCP's slow start are 0.8 s. The rest
is for a machine that has other things to do; a TCP that waits for its timer takes 3 to 16 s."""
SLOW_S = 4
"""Of a link that is slow: longer than it takes to declare one dead."""
NOTICED_S_MAX = 9.5
"""Until a hang is noticed: a second, but for a machine that has just stalled itself, whose patience
grows to three seconds, and three times that while answers to bulk data come in."""
LATE_RETURN_S_MAX = RETURN_S_MAX + 1
"""After a minute attempts begin once a second, not four times."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    need_packet_emulator()
    pair = Pair(tmp_path_factory.mktemp("far"), BASE)
    try:
        yield pair
        assert pair.a.crashes() == pair.b.crashes() == []
        assert pair.wan.emulator.log() == ""
        for site in (pair.a, pair.b):
            assert site.stop() == 0
    finally:
        pair.close()


@pytest.fixture
def pair(shared: Pair) -> Iterator[Pair]:
    """The path is as `BASE` says, and everything is written and mirrored, before and after."""
    shared.wan.set(BASE)
    shared.writer.start()
    until(lambda: len(shared.writer.latencies_s) >= 20, what="the writer writes")
    shared.writer.latencies_s.clear()
    yield shared
    shared.wan.up()
    shared.wan.set(BASE)
    shared.writer.drained(shared.a, shared.b)


def lag_s(pair: Pair) -> float:
    return float(pair.a.peer()["lag"]["seconds"])


def catch_up_s(away_s: float) -> float:
    """Seconds in which the backlog of an outage crosses: at a few times the writer's rate, as each
    lost packet of a hundred makes TCP slower, and unfolded below a quarter of the journal."""
    return 30 + away_s


def test_loss_reordering_duplicates_and_corruption_change_no_byte(pair: Pair) -> None:
    pair.wan.set("corrupt=0.1%,burst=0.5%/5")
    lags = []
    for _ in range(6):
        time.sleep(1)
        pair.writer.look(pair.b)
        lags.append(lag_s(pair))
    assert min(lags) < 3, lags
    pair.writer.never_waited()
    seen = pair.wan.statistics("a")
    assert seen["lost"] and seen["reordered"] and seen["duplicated"] and seen["corrupted"]


@pytest.mark.parametrize("seconds", [1, 8, 60])
def test_after_an_outage_data_flows_at_once(pair: Pair, seconds: float) -> None:
    pair.wan.down()
    time.sleep(seconds)  # The length of the outage.
    assert lag_s(pair) > seconds - 0.5
    assert pair.a.peer()["state"] == "Disconnected"
    assert pair.a.link()["last_error"]
    took_s = pair.seconds_to_data(pair.wan.up())
    assert took_s < (RETURN_S_MAX if seconds < 60 else LATE_RETURN_S_MAX)
    pair.writer.look(pair.b)
    pair.writer.never_waited()
    until(lambda: lag_s(pair) < 2, catch_up_s(seconds), "the lag goes back")


@pytest.mark.parametrize("source", ["a", "b"])
def test_a_black_hole_of_one_direction_is_an_outage(pair: Pair, source: str) -> None:
    pair.wan.down(source)
    for site in (pair.a, pair.b):
        until(lambda site=site: not site.link()["is_established"], 10, f"{site.name} sees it")
    assert pair.a.peer()["state"] == "Disconnected"
    assert pair.seconds_to_data(pair.wan.up(source)) < RETURN_S_MAX
    pair.writer.never_waited()


@pytest.mark.parametrize("source", ["a", "b", None])
def test_a_path_that_swallows_large_packets_is_not_even_noticed(
    pair: Pair, source: str | None
) -> None:
    downs = pair.a.downs(), pair.b.downs()
    pair.wan.set("mtu=1280", source)
    for _ in range(4):
        time.sleep(0.5)
        assert lag_s(pair) < 2
    assert (pair.a.downs(), pair.b.downs()) == downs
    # New connections, with certificates in their handshakes, are made through it too.
    pair.wan.down()
    time.sleep(2)
    assert pair.seconds_to_data(pair.wan.up()) < RETURN_S_MAX
    assert pair.wan.statistics("a")["oversized"] == pair.wan.statistics("b")["oversized"] == 0


@pytest.mark.parametrize("seconds", HANG_S)
@pytest.mark.parametrize("name", ["a", "b"])
def test_a_daemon_that_hangs_is_an_outage_for_the_other_one(
    pair: Pair, name: str, seconds: float
) -> None:
    site = pair.a if name == "a" else pair.b
    assert site.process is not None
    if site is pair.a:
        pair.writer.stop()  # It is served by what is about to hang.
    site.process.send_signal(signal.SIGSTOP)
    try:
        # The kernel goes on accepting connections and bytes for it.
        hung, other = time.monotonic(), pair.b if site is pair.a else pair.a
        until(lambda: other.peer()["state"] == "Disconnected", NOTICED_S_MAX, "it is noticed")
        time.sleep(max(0.0, hung + seconds - time.monotonic()))  # The length of the outage.
        assert other.peer()["state"] == "Disconnected"
        if other is pair.a:
            assert lag_s(pair) > seconds - 0.5
            pair.writer.never_waited()
    finally:
        site.process.send_signal(signal.SIGCONT)
    since = time.monotonic()
    if site is pair.a:
        pair.writer.start()
    assert pair.seconds_to_data(since) < 2 * RETURN_S_MAX
    until(lambda: lag_s(pair) < 2, catch_up_s(seconds), "the lag goes back")


def test_a_rate_that_falls_to_a_tenth_and_comes_back_is_no_outage(pair: Pair) -> None:
    downs = pair.a.downs(), pair.b.downs()
    pair.wan.set("rate=5mbit,queue=64KiB")
    time.sleep(SLOW_S)  # The event is that nothing happens meanwhile.
    pair.writer.never_waited()
    pair.wan.set("rate=100mbit,queue=512KiB")
    until(lambda: lag_s(pair) < 1, what="the lag goes back")
    assert (pair.a.downs(), pair.b.downs()) == downs


def test_a_path_that_swallows_even_small_packets_is_named_and_used_again(pair: Pair) -> None:
    """Below 1280 bytes no path may go; heartbeats get through nevertheless."""
    pair.wan.set("mtu=800")
    until(lambda: "while pings are answered" in pair.a.peer()["reason"], 15, "the stall is seen")
    assert pair.a.events("link_stalled")
    lag = lag_s(pair)
    assert lag > 2  # and it is said, too
    until(lambda: pair.a.peer()["state"] == "Disconnected", 30, "nothing goes through")
    assert pair.a.peer()["reason"]
    pair.writer.never_waited()
    pair.wan.set("mtu=1500")
    # An attempt may be in a handshake that began in the hole.
    assert pair.seconds_to_data(time.monotonic()) < 2 * RETURN_S_MAX


def test_pings_behind_seconds_of_data_in_a_deep_queue_are_waited_for(pair: Pair) -> None:
    downs = pair.a.downs(), pair.b.downs()
    pair.writer.pause_s = 0.01  # more than the line will take
    pair.wan.set("rate=10mbit,loss=0,reorder=0,duplicate=0")
    time.sleep(2)
    pair.wan.set("rate=1mbit,queue=4MiB")
    time.sleep(5)
    rtt_s = pair.a.link()["rtt_seconds"]
    pair.writer.never_waited()
    pair.writer.pause_s = 0.02
    pair.wan.set("rate=100mbit")  # What is in the queue still leaves at its own pace.
    until(lambda: lag_s(pair) < 1, what="the lag goes back")
    assert (pair.a.downs(), pair.b.downs()) == downs, f"round trip {rtt_s:.1f} s"
