"""Stories of the link core, with a clock: when it dials, when it gives up, which set it uses."""

from __future__ import annotations

import itertools
import re

import pytest

from geomirror.environment import MS, SECOND, SeededEntropy
from geomirror.errors import RemoteProtocolError
from geomirror.limits import PRODUCTION
from geomirror.wan_protocol.connection_set import RoundTrip
from geomirror.wan_protocol.data_progress import Reading
from geomirror.wan_protocol.frame_queue import FrameQueue
from geomirror.wan_protocol.link import LinkCore
from geomirror.wan_protocol.link_decisions import (
    Close,
    CloseData,
    Decision,
    Dial,
    Down,
    SendPing,
    SendUse,
    Up,
)
from geomirror.wan_protocol.pacing import connection_rate, data_connections

X, Y, Z = b"x" * 16, b"y" * 16, b"z" * 16
ONE, OTHER = b"1" * 16, b"2" * 16
"""Incarnations of the peer."""


class World:
    """A core whose timer is run at the right times, and a record of what it decided."""

    def __init__(
        self, node: str = "a", peer: str = "b", endpoints: tuple[str, ...] = ("b:1",)
    ) -> None:
        self.now_ns = 0
        self.log: list[tuple[int, Decision]] = []
        self.pings: list[tuple[bytes, int]] = []
        self.talking: dict[bytes, int] = {}
        """Sets whose other side answers pings, and after how long."""
        self.core = LinkCore(
            node=node,
            peer=peer,
            limits=PRODUCTION,
            entropy=SeededEntropy(node),
            endpoints=list(endpoints),
            now_ns=0,
        )
        self.core.handle_timer(0)
        self.drain()

    def drain(self) -> None:
        while (decision := self.core.next_decision()) is not None:
            if isinstance(decision, SendPing):
                if decision.link in self.talking:
                    due_ns = decision.now_ns + self.talking[decision.link]
                    self.pings.append((decision.link, due_ns))
            else:
                self.log.append((self.now_ns, decision))

    def run(self, until_ns: int) -> None:
        """Let time pass; sets in `talking` answer every ping."""
        while True:
            timer_ns = self.core.get_timer()
            echo = min(self.pings, key=lambda item: item[1], default=None)
            due_ns = min(
                until_ns,
                until_ns if timer_ns is None else timer_ns,
                until_ns if echo is None else echo[1],
            )
            self.now_ns = max(self.now_ns, due_ns)
            if echo is not None and echo[1] <= self.now_ns:
                self.pings.remove(echo)
                link, at_ns = echo
                if link in self.talking:
                    self.core.pong(link, at_ns - self.talking[link], self.now_ns)
            elif timer_ns is not None and timer_ns <= self.now_ns:
                self.core.handle_timer(self.now_ns)
            else:
                return
            self.drain()

    def dialled(self) -> list[tuple[int, Dial]]:
        """Attempts to make a control connection."""
        return [(at, d) for at, d in self.log if isinstance(d, Dial) and d.index < 0]

    def changes(self) -> list[Up | Down]:
        return [d for _, d in self.log if isinstance(d, Up | Down)]

    def closed(self) -> list[bytes]:
        return [d.link for _, d in self.log if isinstance(d, Close)]

    def control_up(
        self,
        link: bytes,
        *,
        is_dialled: bool,
        incarnation: bytes = ONE,
        after: bytes = b"",
        rank: int = 0,
    ) -> None:
        self.core.control_up(
            link,
            self.now_ns,
            is_dialled=is_dialled,
            incarnation=incarnation,
            after=after,
            rank=rank,
        )
        self.drain()

    def join(
        self,
        link: bytes | None = None,
        *,
        round_trip_ns: int = 40 * MS,
        incarnation: bytes = ONE,
        after: bytes = b"",
        rank: int = 0,
    ) -> bytes:
        """A set is ready: dialled by this node, or accepted under the name given."""
        is_dialled = link is None
        if link is None:
            link = self.dialled()[-1][1].link
        self.talking[link] = round_trip_ns
        self.control_up(
            link, is_dialled=is_dialled, incarnation=incarnation, after=after, rank=rank
        )
        self.core.data_up(link, 0, self.now_ns)
        self.drain()
        return link

    def lose(self, link: bytes, reason: str = "reset") -> None:
        """The control connection is lost."""
        self.core.set_lost(link, reason, self.now_ns)
        self.drain()

    def use(self, link: bytes, number: int) -> None:
        """The leader says to use the set."""
        self.core.use_received(link, number, self.now_ns)
        self.drain()

    def reason(self) -> str:
        """Of the last change, which was down."""
        change = self.changes()[-1]
        assert isinstance(change, Down)
        return change.reason


def follower(*, endpoints: tuple[str, ...] = ("a:1",)) -> World:
    return World("b", "a", endpoints)


def test_the_link_is_up_with_control_and_one_data_connection() -> None:
    world = World()
    ((_, dial),) = world.dialled()
    world.now_ns = 5 * MS
    world.control_up(dial.link, is_dialled=True)
    data = [d for _, d in world.log if isinstance(d, Dial) and d.index >= 0]
    assert [d.index for d in data] == [0, 1, 2, 3]
    assert all(d.link == dial.link and d.endpoint == "b:1" for d in data)
    assert world.changes() == []
    world.core.data_up(dial.link, 2, 6 * MS)
    world.drain()
    assert world.changes() == [Up(dial.link)]


def test_the_leader_says_which_set_it_uses_before_it_is_up() -> None:
    world = World()
    link = world.join()
    said = [d for _, d in world.log if isinstance(d, SendUse | Up)]
    assert said == [SendUse(link, 1), Up(link)]
    world.lose(link)
    world.run(2 * SECOND)
    link = world.join()
    said = [d for _, d in world.log if isinstance(d, SendUse | Up)]
    assert said[2:] == [SendUse(link, 2), Up(link)]


def test_the_follower_is_up_when_told_also_before_its_first_data_connection() -> None:
    world = follower()
    link = world.join()
    world.run(1 * SECOND)
    assert world.changes() == []
    assert not [d for _, d in world.log if isinstance(d, SendUse)]
    world.use(link, 1)
    assert world.changes() == [Up(link)]
    world.control_up(X, is_dialled=False, after=link)
    world.talking[X] = 40 * MS
    assert world.reason() == "the peer has given up the connections"
    world.use(X, 2)
    assert world.changes()[-1] == Up(X)
    world.run(world.now_ns + 2900 * MS)
    assert world.changes()[-1] == Up(X)
    world.run(world.now_ns + 200 * MS)
    assert world.reason() == "no data connection came up"


def test_a_peer_answers_no_choice_that_is_not_its_own() -> None:
    leader = World()
    link = leader.join()
    with pytest.raises(RemoteProtocolError, match="does not choose"):
        leader.core.use_received(link, 1, leader.now_ns)
    world = follower()
    link = world.join()
    world.use(link, 1)
    with pytest.raises(RemoteProtocolError, match="only once"):
        world.core.use_received(link, 2, world.now_ns)


def test_a_choice_that_a_later_one_overtook_is_ignored() -> None:
    world = follower(endpoints=())
    early, late = world.join(X), world.join(Y)
    world.use(late, 2)
    world.use(early, 1)
    assert world.changes() == [Up(late)]
    assert world.closed() == [early]
    # A leader that was started anew counts from the beginning.
    new = world.join(Z, incarnation=OTHER)
    assert world.changes() == [Up(late)]
    world.use(new, 1)
    assert world.changes()[1:] == [Down("the peer was restarted"), Up(new)]


def test_a_peer_that_answers_stays_up_and_its_round_trip_is_known() -> None:
    world = World()
    link = world.join(round_trip_ns=80 * MS)
    world.run(60 * SECOND)
    assert world.changes() == [Up(link)]
    assert world.core.round_trip.smoothed_ns == 80 * MS
    assert len(world.dialled()) == 1


def pauses(world: World, from_s: int, until_s: int) -> list[int]:
    """Between attempts of a stretch of time."""
    times = [at for at, _ in world.dialled() if from_s * SECOND <= at < until_s * SECOND]
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def test_attempts_come_four_times_a_second_then_slower_and_never_end() -> None:
    world = World()
    world.run(4000 * SECOND)
    first = pauses(world, 0, 59)
    assert all(200 * MS <= pause <= 300 * MS for pause in first)
    assert len(set(first)) > 10  # jitter
    assert all(800 * MS <= pause <= 1200 * MS for pause in pauses(world, 61, 299))
    assert all(4 * SECOND <= pause <= 6 * SECOND for pause in pauses(world, 301, 3590))
    assert all(12 * SECOND <= pause <= 18 * SECOND for pause in pauses(world, 3610, 4000))
    assert world.dialled()[-1][0] > 3970 * SECOND


def test_a_host_that_answers_without_its_daemon_is_dialled_once_a_second() -> None:
    world = World()
    while world.now_ns < 30 * SECOND:
        world.run(world.now_ns + 50 * MS)
        world.core.dial_answered(world.dialled()[-1][1].link, world.now_ns)
        world.drain()
    assert all(pause >= 800 * MS for pause in pauses(world, 1, 30))
    assert len(world.dialled()) - len(world.closed()) <= 7


def test_endpoints_are_tried_in_turn_and_few_attempts_hang_at_once() -> None:
    world = World(endpoints=("b:1", "b:2"))
    world.run(8 * SECOND)
    assert [d.endpoint for _, d in world.dialled()][:4] == ["b:1", "b:2", "b:1", "b:2"]
    assert len(world.dialled()) - len(world.closed()) <= 12


def test_a_path_of_three_seconds_has_time_to_answer() -> None:
    world = World()
    first = world.dialled()[0][1].link
    world.run(2500 * MS)
    assert first not in world.closed()
    world.core.dial_answered(first, world.now_ns)
    world.drain()
    world.run(7 * SECOND)
    assert first not in world.closed()
    world.run(20 * SECOND)
    assert first in world.closed()


def test_the_first_data_connection_is_dialled_beside_the_control_connection() -> None:
    world = World()
    link = world.dialled()[0][1].link
    world.run(80 * MS)
    world.core.dial_answered(link, world.now_ns)
    world.drain()
    assert world.log[-1][1] == Dial(link, "b:1", 0)
    world.run(300 * MS)
    world.control_up(link, is_dialled=True)
    data = [d.index for _, d in world.log if isinstance(d, Dial) and d.index >= 0]
    assert data == [0, 1, 2, 3]  # each once
    world.core.data_up(link, 0, world.now_ns)
    world.drain()
    assert world.changes() == [Up(link)]


def test_a_data_connection_that_failed_before_its_set_existed_is_dialled_again() -> None:
    world = World()
    link = world.dialled()[0][1].link
    world.core.dial_answered(link, world.now_ns)
    world.core.dial_failed(link, 0, "reset", world.now_ns)
    world.drain()
    world.control_up(link, is_dialled=True)
    data = [d.index for _, d in world.log if isinstance(d, Dial) and d.index >= 0]
    assert data == [0, 0, 1, 2, 3]


def test_a_node_without_endpoints_of_its_peer_only_waits() -> None:
    world = World(endpoints=())
    world.run(100 * SECOND)
    assert world.log == []
    link = world.join(X)
    assert world.changes() == [Up(link)]
    del world.talking[link]
    world.run(200 * SECOND)
    assert isinstance(world.changes()[-1], Down)
    assert world.dialled() == []


def test_silence_is_noticed_after_five_intervals_and_a_new_set_is_dialled() -> None:
    world = World()
    old = world.join()
    world.run(10 * SECOND)
    del world.talking[old]
    world.log.clear()
    world.run(12 * SECOND)
    (at_ns, down), (_, close), (dial_ns, dial) = world.log[:3]
    assert 600 * MS <= at_ns - 10 * SECOND <= 900 * MS
    # Rounded down; the last sign of life came with the last pong.
    assert isinstance(down, Down) and down.reason == "nothing heard for 750 ms"
    assert close == Close(old, down.reason)
    assert isinstance(dial, Dial) and dial_ns == at_ns
    new = world.join()
    assert world.changes()[-1] == Up(new)


def test_a_long_path_gets_more_patience() -> None:
    world = World()
    link = world.join(round_trip_ns=600 * MS)
    world.run(30 * SECOND)
    assert world.changes() == [Up(link)]
    del world.talking[link]
    world.log.clear()
    world.run(40 * SECOND)
    at_ns = next(at for at, d in world.log if isinstance(d, Down))
    assert 3 * 600 * MS - 600 * MS <= at_ns - 30 * SECOND <= 3 * SECOND


def test_a_set_that_was_given_up_is_never_used_again() -> None:
    world = World()
    link = world.join()
    world.run(5 * SECOND)
    del world.talking[link]
    world.run(6 * SECOND)
    assert world.closed() == [link]
    # What was under way arrives nevertheless, before the peer learns that the set is closed.
    world.core.heard(link, world.now_ns)
    world.core.pong(link, world.now_ns - 40 * MS, world.now_ns)
    world.core.moved(link, world.now_ns)
    world.core.data_lost(link, 0, "reset", world.now_ns)
    world.drain()
    world.run(8 * SECOND)
    assert isinstance(world.changes()[-1], Down)
    new = world.join()
    world.run(20 * SECOND)
    assert world.changes()[-1] == Up(new)
    assert [d.link for d in world.changes() if isinstance(d, Up)] == [link, new]


def test_the_peer_learns_from_a_hello_that_its_set_was_given_up() -> None:
    world = World()
    old = world.join()
    world.run(5 * SECOND)
    # The peer's patience was shorter; the close of the old set has not come through.
    new = world.join(X, after=old)
    assert world.changes() == [
        Up(old),
        Down("the peer has given up the connections"),
        Up(new),
    ]
    assert world.closed() == [old]


def test_a_restarted_peer_is_not_mixed_up_with_its_former_life() -> None:
    world = World()
    old = world.join()
    world.run(5 * SECOND)
    waiting = world.join(X)
    world.control_up(Y, is_dialled=False, incarnation=OTHER)
    assert world.changes() == [Up(old)]  # whoever it is has not shown that it can do more
    new = world.join(Z, incarnation=OTHER)
    assert world.changes() == [Up(old), Down("the peer was restarted"), Up(new)]
    assert set(world.closed()) == {old, waiting}


def test_one_way_silence_is_noticed_though_the_peer_is_heard() -> None:
    world = World()
    link = world.join()
    world.run(5 * SECOND)
    del world.talking[link]  # our pings are lost, theirs arrive
    while world.now_ns < 8 * SECOND and len(world.changes()) == 1:
        world.run(world.now_ns + 100 * MS)
        world.core.heard(link, world.now_ns)
        world.drain()
    assert isinstance(world.changes()[-1], Down)
    assert world.now_ns - 5 * SECOND <= 2 * 750 * MS + 400 * MS
    # What is missing are the answers: the text must not blame silence.
    assert re.fullmatch(r"pings not answered for 1\d\d\d ms, peer heard \d+ ms ago", world.reason())
    assert len(world.dialled()) >= 2


def test_a_node_that_slept_itself_does_not_blame_its_peer() -> None:
    world = World()
    link = world.join()
    world.run(5 * SECOND)
    world.now_ns = 15 * SECOND  # the process was stopped for ten seconds
    world.core.handle_timer(world.now_ns)
    world.drain()
    assert world.changes() == [Up(link)]
    world.core.heard(link, world.now_ns)
    world.run(20 * SECOND)
    assert world.changes() == [Up(link)]
    del world.talking[link]
    world.run(22 * SECOND)
    assert isinstance(world.changes()[-1], Down)


def test_when_both_dial_the_leader_uses_the_first_set_that_is_ready_and_only_that() -> None:
    for order in (0, 1):
        world = World()
        mine, theirs = world.dialled()[0][1].link, X
        for link in [mine, theirs] if order == 0 else [theirs, mine]:
            world.talking[link] = 10 * MS
            if link in [d.link for _, d in world.dialled()] and world.core.current:
                assert link in world.closed()  # given up before it came up
            else:
                world.control_up(link, is_dialled=link == mine)
                world.core.data_up(link, 0, world.now_ns)
            world.now_ns += 1 * MS
            world.drain()
        world.run(5 * SECOND)
        assert world.changes() == [Up(mine if order == 0 else theirs)]
        # Its own loser is closed; the peer's is left to the peer, which knows whether it is one.
        assert world.closed() == ([] if order == 0 else [mine])


def test_the_follower_closes_what_it_dialled_when_another_set_is_chosen() -> None:
    world = follower()
    mine = world.join()
    theirs = world.join(X)
    assert world.changes() == []
    world.use(theirs, 1)
    assert world.changes() == [Up(theirs)]
    assert world.closed() == [mine]


def test_a_set_dialled_before_the_choice_was_known_waits_and_helps_if_the_chosen_one_dies() -> None:
    world = World()
    old = world.join()
    late = world.join(X)
    world.run(10 * SECOND)
    assert world.changes() == [Up(old)]
    world.lose(old)
    assert world.changes() == [Up(old), Down("reset"), Up(late)]


def test_a_change_is_one_down_and_one_up() -> None:
    world = World()
    old = world.join()
    world.run(10 * SECOND)
    del world.talking[old]
    world.run(13 * SECOND)  # a black hole: both gave up and both dial
    first = world.join()
    world.join(X, after=old)
    world.join(Y, after=old)
    world.run(20 * SECOND)
    assert [type(change) for change in world.changes()] == [Up, Down, Up]
    assert world.changes()[-1] == Up(first)


def test_a_lost_data_connection_is_dialled_again_and_is_no_event() -> None:
    world = World()
    link = world.join()
    world.core.data_up(link, 1, world.now_ns)
    world.run(20 * SECOND)
    world.log.clear()
    world.core.data_lost(link, 1, "reset", world.now_ns)
    world.drain()
    world.run(21 * SECOND)
    assert [type(d) for _, d in world.log] == [Dial]
    at_ns, dial = world.log[0]
    assert dial == Dial(link, "b:1", 1)
    assert at_ns - 20 * SECOND <= 150 * MS
    world.core.dial_failed(link, 1, "refused", world.now_ns)
    world.run(23 * SECOND)
    assert [d for _, d in world.log] == [dial, dial]


def test_without_any_data_connection_the_link_is_down_after_a_while() -> None:
    world = World()
    link = world.join()
    world.run(2 * SECOND)
    world.core.data_lost(link, 0, "reset", world.now_ns)
    world.drain()
    world.run(3 * SECOND)
    world.core.data_up(link, 1, world.now_ns)
    world.run(10 * SECOND)
    assert world.changes() == [Up(link)]
    world.core.data_lost(link, 1, "reset", world.now_ns)
    world.run(14 * SECOND)
    assert world.changes()[1:] == [Down("no data connection came up")]
    assert link in world.closed()
    assert world.dialled()[-1][1].link != link


def test_a_flapping_link_is_never_dialled_faster_than_each_second() -> None:
    world = World()
    for _ in range(20):
        link = world.join()
        world.run(world.now_ns + 100 * MS)
        world.lose(link)
        count = len(world.dialled())
        while len(world.dialled()) == count:
            world.run(world.now_ns + 50 * MS)
    times = [at for at, _ in world.dialled()]
    assert all(later - earlier >= 800 * MS for earlier, later in itertools.pairwise(times))


def test_a_peer_cannot_open_sets_without_end() -> None:
    world = World(endpoints=())
    for number in range(20):
        world.control_up(bytes([number]) * 16, is_dialled=False)
    assert len(world.closed()) == 12


def test_closing_closes_everything_and_leaves_no_timer() -> None:
    world = World()
    link = world.join()
    world.core.close("stop", world.now_ns)
    world.drain()
    assert world.changes() == [Up(link), Down("stop")]
    assert link in world.closed()
    assert world.core.get_timer() is None


def test_round_trip_follows_the_rules_of_rfc_6298() -> None:
    trip = RoundTrip()
    assert trip.patience_ns(PRODUCTION) == 750 * MS
    trip.add(100 * MS)
    assert (trip.smoothed_ns, trip.variation_ns) == (100 * MS, 50 * MS)
    trip.add(180 * MS)
    assert (trip.smoothed_ns, trip.variation_ns) == (110 * MS, 57_500_000)
    assert trip.patience_ns(PRODUCTION) == 750 * MS
    assert trip.interval_ns(PRODUCTION) == 150 * MS


def test_a_path_that_stalled_gets_more_patience_for_a_while() -> None:
    trip = RoundTrip()
    for _ in range(50):
        trip.add(80 * MS)
    trip.add(700 * MS)
    for _ in range(20):
        trip.add(80 * MS)  # three seconds later the variation has forgotten it
    assert 3 * trip.smoothed_ns + 4 * trip.variation_ns < 750 * MS
    assert trip.patience_ns(PRODUCTION) > 1200 * MS
    for _ in range(400):
        trip.add(80 * MS)
    assert trip.patience_ns(PRODUCTION) == 750 * MS


def test_a_set_whose_data_moves_is_given_more_time_but_not_for_ever() -> None:
    world = World()
    link = world.join()
    world.run(10 * SECOND)
    del world.talking[link]
    world.log.clear()
    while not world.log and world.now_ns < 20 * SECOND:
        world.core.moved(link, world.now_ns)
        world.run(world.now_ns + 50 * MS)
    assert 3 * 700 * MS <= world.log[0][0] - 10 * SECOND <= 3 * 750 * MS + 200 * MS


def test_a_stall_of_this_node_is_not_the_silence_of_its_peer() -> None:
    world = World()
    link = world.join()
    for _ in range(20):
        world.run(world.now_ns + 1 * SECOND)
        world.now_ns += 700 * MS  # the loop did not run; then the timer comes before the reads
        world.core.handle_timer(world.now_ns)
        world.drain()
    assert world.changes() == [Up(link)]


def test_data_connections_follow_the_bandwidth_delay_product() -> None:
    assert data_connections(PRODUCTION, None, 100 * MS) == 4
    assert data_connections(PRODUCTION, 12_500_000, 40 * MS) == 2
    assert data_connections(PRODUCTION, 125_000_000, 100 * MS) == 5
    assert data_connections(PRODUCTION, 1_250_000_000, 200 * MS) == 8
    assert connection_rate(12_500_000, 4) == 2_937_500


def test_frames_are_taken_by_turns_and_resync_waits_for_live() -> None:
    queue = FrameQueue()
    full, small = b"f" * 65_536, b"s" * 1000
    for _ in range(3):
        queue.push(9, b"R", full, is_resync=True)
        queue.push(1, b"A", full, is_resync=False)
    for _ in range(100):
        queue.push(2, b"B", small, is_resync=False)
    order = "".join(part.decode() for part in iter_headers(queue))
    # A full frame of session 1, then as many bytes of session 2, and so on; resync last.
    assert order.startswith("A" + "B" * 66 + "A" + "B" * 34 + "A")
    assert order.endswith("RRR")
    assert queue.queued_bytes == 0
    queue.push(1, b"A", full, is_resync=False)
    queue.clear()
    assert queue.pop(1000) == []


def iter_headers(queue: FrameQueue) -> list[bytes]:
    headers = []
    while queue.queued_bytes:
        headers += queue.pop(1)[::2]
    return headers


def sample(world: World, link: bytes, readings: dict[int, Reading], seconds: int) -> None:
    """TCP's word on data connections, at every heartbeat."""
    until_ns = world.now_ns + seconds * SECOND
    while world.now_ns < until_ns:
        world.run(world.now_ns + 150 * MS)
        for index, reading in readings.items():
            world.core.data_sampled(link, index, reading, world.now_ns)
        world.drain()


def waiting(acked_bytes: int, rtt_ns: int = 40 * MS) -> Reading:
    return Reading(acked_bytes, is_waiting=True, rtt_ns=rtt_ns)


def test_a_data_connection_that_gets_nothing_through_is_replaced() -> None:
    world = World()
    link = world.join()
    world.core.data_up(link, 1, world.now_ns)
    world.run(5 * SECOND)
    sample(world, link, {0: waiting(5000), 1: waiting(70_000)}, 1)
    world.log.clear()
    since_ns = world.now_ns
    slow = 5000
    while not world.log:
        slow += 100  # a slow one is not stuck
        sample(world, link, {0: waiting(slow), 1: waiting(70_000)}, 1)
    at_ns, close = world.log[0]
    assert isinstance(close, CloseData) and (close.link, close.index) == (link, 1)
    assert "while pings are answered" in close.reason
    assert at_ns - since_ns <= 4 * SECOND
    assert world.core.last_error == close.reason
    world.run(world.now_ns + 2 * SECOND)
    assert [d for _, d in world.log[1:]] == [Dial(link, "b:1", 1)]  # and no change of the link


def test_nothing_that_waits_is_not_stuck_and_a_dead_path_is_not_the_connections_fault() -> None:
    world = World()
    link = world.join()
    sample(world, link, {0: Reading(5000, is_waiting=False, rtt_ns=40 * MS)}, 15)
    del world.talking[link]
    sample(world, link, {0: waiting(5000)}, 5)
    assert not any(isinstance(d, CloseData) for _, d in world.log)
    down = next(d for _, d in world.log if isinstance(d, Down))
    assert down.reason == "nothing heard for 750 ms"


def seconds_of_patience(rtt_ns: int) -> float:
    """How long a set lives whose data goes on while nothing else does."""
    world = World()
    link = world.join(round_trip_ns=100 * MS)
    world.run(5 * SECOND)
    del world.talking[link]
    acked_bytes = 0
    while len(world.changes()) == 1:
        acked_bytes += 1000
        world.run(world.now_ns + 150 * MS)
        world.core.data_sampled(link, 0, waiting(acked_bytes, rtt_ns), world.now_ns)
        world.drain()
    return (world.now_ns - 5 * SECOND) / SECOND


def test_pings_that_wait_in_a_deep_queue_with_the_data_are_waited_for() -> None:
    # The kernel of a hung daemon takes bytes at once: the path is short.
    assert seconds_of_patience(40 * MS) < 3
    # The same bytes through seconds of queue: the path is slow, the daemon may be well.
    assert 6 < seconds_of_patience(2 * SECOND) < 15
    assert seconds_of_patience(60 * SECOND) < 40


def test_a_queue_of_the_past_asks_for_no_patience() -> None:
    world = World()
    link = world.join()
    sample(world, link, {0: waiting(1000, 3 * SECOND)}, 1)
    sample(world, link, {0: Reading(1000, is_waiting=False, rtt_ns=3 * SECOND)}, 10)
    del world.talking[link]
    since_ns = world.now_ns
    sample(world, link, {0: Reading(1000, is_waiting=False, rtt_ns=3 * SECOND)}, 2)
    at_ns = next(at for at, d in world.log if isinstance(d, Down))
    assert at_ns - since_ns <= 900 * MS


def test_a_node_that_only_receives_knows_a_deep_queue_by_its_control_connection() -> None:
    """Its pings go out at once; the answers wait behind the data that it gets."""
    world = World()
    link = world.join(round_trip_ns=100 * MS)
    world.run(5 * SECOND)
    del world.talking[link]
    # The queue fills: what the kernel measures on pings grows with it, and data arrives.
    for step in range(40):
        world.run(world.now_ns + 150 * MS)
        world.core.heard(link, world.now_ns, is_bulk=True)
        world.core.data_sampled(link, -1, waiting(100 * step, step * 100 * MS), world.now_ns)
        world.drain()
    assert world.changes() == [Up(link)]
    # When data comes no more, it ends.
    world.run(world.now_ns + 40 * SECOND)
    assert isinstance(world.changes()[1], Down)


@pytest.mark.parametrize(("is_bulk", "least", "most"), [(True, 4, 5), (False, 1, 2)])
def test_bulk_data_that_arrives_is_progress_for_a_while(
    is_bulk: bool, least: float, most: float
) -> None:
    """A queue that fills at once is known before any round trip through it has been measured."""
    world = World()
    link = world.join(round_trip_ns=10 * MS)
    world.run(5 * SECOND)
    del world.talking[link]
    while len(world.changes()) == 1:
        world.run(world.now_ns + 50 * MS)
        world.core.heard(link, world.now_ns, is_bulk=is_bulk)
        world.drain()
    assert least < (world.now_ns - 5 * SECOND) / SECOND < most


def test_pings_that_a_kernel_takes_for_a_hung_daemon_are_no_sign_of_life() -> None:
    world = World()
    link = world.join()
    world.run(5 * SECOND)
    del world.talking[link]
    for step in range(20):
        world.run(world.now_ns + 150 * MS)
        world.core.data_sampled(link, -1, waiting(100 * step), world.now_ns)
        world.drain()
    at_ns = next(at for at, d in world.log if isinstance(d, Down))
    assert at_ns - 5 * SECOND <= 900 * MS
    assert not any(isinstance(d, CloseData) for _, d in world.log)


def test_a_connection_that_waits_for_its_timer_after_a_queue_has_drained_is_replaced() -> None:
    world = World()
    link = world.join(round_trip_ns=100 * MS)
    sample(world, link, {0: waiting(1000, 6 * SECOND)}, 1)
    since_ns = world.now_ns
    sample(world, link, {0: waiting(1000, 6 * SECOND)}, 5)
    at_ns = next(at for at, d in world.log if isinstance(d, CloseData))
    assert at_ns - since_ns <= 4 * SECOND
